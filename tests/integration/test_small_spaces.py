"""Every verb that searches on a model with fewer plans than evaluations."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlprune.cli import main as cli
from rlprune.config.config import load_config
from rlprune.experiments.incremental import incremental
from rlprune.experiments.prepare import prepare_experiment

NETS = """
from torch import nn

def block(before, after, stride=1):
    return [nn.Conv2d(before, after, 3, stride), nn.BatchNorm2d(after), nn.ReLU()]

def head(width):
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]

def one():
    return nn.Sequential(*block(1, 8, 2), *head(8))

def two():
    return nn.Sequential(*block(1, 8, 2), *block(8, 8), *head(8))
"""
SETS = (
    "model.arguments={}", "model.train.epochs=1", "data.calibration=32", "data.validation=64", "device=cpu",
    "budget.target=0.7", "prune.round_to=4",
)  # fmt: skip
SEARCH = (
    "search.batch=4",
    "search.ppo.surrogate_steps=64",
    "search.ppo.surrogate_envs=8",
    "finish.rules=false",
)


def words(net: str, *sets: str, finish: bool = True) -> list[str]:
    """CONFIG and --set of a command; ``finish``: whether it fine-tunes at the end."""
    every = [*SETS, f"model.name=small_nets:{net}", *(["finish.epochs=1"] if finish else []), *sets]
    return ["digits", *(word for text in every for word in ("--set", text))]


@pytest.fixture(autouse=True)
def nets(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "small_nets.py").write_text(NETS)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "small_nets", raising=False)


@pytest.mark.parametrize("net", ["one", "two"])
def test_train_then_apply_and_refine(net: str, place: Path) -> None:
    run = words(net, *SEARCH, "search.evaluations=24")
    assert cli.main(["train", *run, "--out", "run"]) == 0
    rows = {row["method"]: row for row in json.loads((place / "run/results.json").read_text())["rows"]}
    assert 1 <= rows["ppo"]["evaluations"] < 24
    assert rows["ppo"]["score"] >= rows["random"]["score"] - 1e-9
    assert cli.main(["train", *run, "--out", "run", "--resume"]) == 0
    assert (
        cli.main(
            ["apply", "run", *words(net, *SEARCH[:-1], finish=False), "--refine", "10", "--out", "applied"]
        )
        == 0
    )
    assert (place / "applied" / "plan.json").is_file()


def test_a_benchmark(place: Path) -> None:
    methods = "uniform,random,evopress,rl_pruner,bypass,ppo"
    run = words("two", *SEARCH[:-1])
    assert (
        cli.main(
            ["benchmark", *run, "--methods", methods, "--seeds", "1", "--evaluations", "12", "--out", "b"]
        )
        == 0
    )
    rows = json.loads((place / "b" / "results.json").read_text())["rows"]
    assert {row["method"] for row in rows} >= set(methods.split(","))


def test_fidelity_needs_plans_to_compare(refused: Callable[..., str]) -> None:
    line = refused(
        "fidelity", *words("one", "prune.importance=l2"), "--candidates", "6", "--out", "f", unchanged=False
    )
    assert line == (
        "rlprune: error: budget.target: 0.7 leaves 1 different plan to compare, and fidelity needs 4; "
        "choose another budget or a smaller prune.round_to\n"
    )


@pytest.mark.parametrize("target", ["0.55", "1.0"])
@pytest.mark.parametrize("net", ["one", "two"])
def test_incremental(net: str, target: str, place: Path) -> None:
    sets = [w for w in words(net, f"budget.target={target}")[1:] if w != "--set"]
    experiment = prepare_experiment(load_config("digits", sets))
    found = incremental(experiment, "uniform", stages=5)
    assert experiment.space.cost(found.plan.widths) <= experiment.target * (1 + 1e-12)
    assert len(found.history) == 5
