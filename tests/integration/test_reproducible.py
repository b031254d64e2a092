"""What is saved is the same to the byte in every process: nothing depends on the order of a hash table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from helpers.scripts import load_script

ROOT = Path(__file__).parents[2]
DIGITS = (
    "model.arguments.width=4", "model.train.epochs=1", "data.train=64", "data.calibration=32", "data.validation=40",
    "device=cpu", "threads=1",
)  # fmt: skip
SEARCH = (
    "data.test=40", "search.evaluations=6", "search.ppo.surrogate_steps=128",
    "search.ppo.surrogate_envs=8", "finish.epochs=1", "finish.candidates=2", "finish.rules=false",
)  # fmt: skip
LLAMA = (
    "model.arguments.layers=2", "model.train.epochs=1", "data.train=32", "data.calibration=8", "data.validation=8",
    "device=cpu", "threads=1",
)  # fmt: skip
COMMANDS = (
    ("train", "digits", "--out", "run", "--set", *DIGITS, *SEARCH),
    ("apply", "run", "digits", "--budget", "40%", "--out", "applied", "--set", *DIGITS),
    ("export", "applied", "--to", "torch-export", "--out", "applied.pt2"),
    ("benchmark", "digits", "--methods", "uniform,ppo", "--seeds", "1", "--evaluations", "6", "--out", "bench",
     "--set", *DIGITS, *(s for s in SEARCH if s[:18] not in ("search.evaluations", "finish.rules=false"))),
    ("prune", "tiny_llama", "--rule", "uniform", "--out", "llama", "--set", *LLAMA),
    ("export", "llama", "--to", "hf", "--out", "llama-hf"),
)  # fmt: skip
SCRIPT = f"""
import sys
from rlprune.cli.main import main
for words in {COMMANDS!r}:
    assert main(list(words)) == 0, words
"""


@pytest.fixture(scope="module")
def kills() -> ModuleType:
    """docs/scripts/kills.py, which knows what a clock says in each file."""
    return load_script("kills")


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path: Path, kills: ModuleType) -> None:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    running = []
    for seed in ("1", "22"):
        place = tmp_path / seed / "place"
        place.mkdir(parents=True)
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        environment["RLPRUNE_CACHE"] = str(place / "cache")
        command = [sys.executable, "-c", SCRIPT]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append((place, subprocess.Popen(command, cwd=place, env=environment, **pipes)))  # type: ignore[call-overload]
    trees = []
    for place, process in running:
        output, _ = process.communicate()
        assert process.returncode == 0, output[-2000:]
        trees.append(kills.tree(place))
    assert len([name for name in trees[0] if name.endswith(".safetensors")]) >= 6
    assert kills.differences(*trees) == []
