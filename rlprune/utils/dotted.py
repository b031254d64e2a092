"""Nested mappings as flat ones, whose keys are dotted names as in ``--set a.b=c``."""

from __future__ import annotations

from collections.abc import Mapping


def flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """{dotted name: value} in the order of ``values``; an empty mapping stays a value."""
    found: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
