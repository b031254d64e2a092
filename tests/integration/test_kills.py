"""Runs that are killed between two writes and go on are those that were not killed (docs/scripts/kills.py).

The script runs in a process of its own: it forks a child for every run, which wants no threads beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "scripts" / "kills.py"
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
COMMANDS = [
    "train", "benchmark", "fidelity", "prune --stages", "apply --refine", "prune over a folder that is there"
]  # fmt: skip


def tried(record: Path, *options: str) -> dict[str, dict[str, list[str]]]:
    """Command -> moment -> what differed after going on."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--record", str(record), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" moments tried, 0 not equal") == len(list(record.glob("*.json"))), done.stdout
    found = {}
    for path in record.glob("*.json"):
        kept = json.loads(path.read_text())
        assert not kept.get("twice"), "two uninterrupted runs differ"
        found[path.stem] = {kept["moments"][int(m)]: wrong for m, wrong in kept["found"].items()}
    return found


def test_killed_at_some_moments(tmp_path: Path) -> None:
    found = tried(tmp_path, "--sample", "2", "--only", *COMMANDS[:5])
    assert [len(moments) for moments in found.values()] == [2] * 5
    assert not any(wrong for moments in found.values() for wrong in moments.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_every_moment(name: str, tmp_path: Path) -> None:
    (moments,) = tried(tmp_path, "--only", name).values()
    assert len(moments) > 20
    assert not any(moments.values()), moments
