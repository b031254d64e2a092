"""What a command has found: a text for people, and the same as plain values for programs."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Findings:
    """``text`` is printed; ``facts`` is what ``--json`` prints instead: numbers, texts, lists and mappings of them."""

    text: str
    facts: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text
