"""What plugins register, forgotten again: registries and modules as they were before a test."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from rlprune import plugins
from rlprune.utils import registry
from rlprune.workloads.adapter import adapters


@contextlib.contextmanager
def forgotten(*words: str) -> Iterator[None]:
    """Afterwards nothing is registered that was not before; modules with one of ``words`` in their name are gone."""
    adapters()
    before, loaded = plugins._foreign(), dict(plugins._LOADED)
    modules, read = set(sys.modules), set(plugins._read)
    try:
        yield
    finally:
        plugins._forget(set(plugins._foreign()) - set(before))
        plugins._LOADED.clear()
        plugins._LOADED.update(loaded)
        plugins._read.clear()
        plugins._read.update(read)
        registry.installed.cache_clear()
        for name in set(sys.modules) - modules:
            if any(word in name for word in words):
                del sys.modules[name]


def install(module: Path, points: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution "mine-dist" on sys.path that holds a module and announces it by entry points."""
    site = module.parent / "site"
    about = site / "mine_dist-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: mine-dist\nVersion: 1.0\n", encoding="utf-8"
    )
    lines = [f"{name} = {value}" for name, value in points.items()]
    (about / "entry_points.txt").write_text("\n".join([f"[{registry.GROUP}]", *lines, ""]), encoding="utf-8")
    module.rename(site / module.name)
    monkeypatch.syspath_prepend(site)
    registry.installed.cache_clear()
    return site
