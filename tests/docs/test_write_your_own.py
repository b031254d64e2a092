"""docs/write-your-own.md as the text stands: its blocks register, keep the contracts and run in a benchmark."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.small import SMALL_DIGITS, SMALL_RUN, SMALL_SEARCH, without
from helpers.synthetic import FakeAccount, make_synthetic_task
from helpers.workloads import Noise
from rlprune import plugins
from rlprune.agents import AGENTS, SearchRequest, make_agent
from rlprune.api import trace
from rlprune.cli import main as cli
from rlprune.importance import importance
from rlprune.rules import RULES, Context
from rlprune.vision.zoo import build_model

PAGE = Path(__file__).parent.parent.parent / "docs" / "write-your-own.md"
RULE, AGENT, CLASS, SCRIPT = re.findall(
    r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S
)
COMMANDS = re.findall(r"^(rlprune .*)$", PAGE.read_text(encoding="utf-8"), re.M)
ARE_METHODS = ("skewed", "hill_climb")


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """mine.py as the page says, in the current folder; what it registers is forgotten afterwards."""
    before = dict(RULES), dict(AGENTS), dict(plugins._LOADED)
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(f"{RULE}\n\n{AGENT}\n\n{CLASS}", encoding="utf-8")
    yield tmp_path / "mine.py"
    for registry, content in zip((RULES, AGENTS, plugins._LOADED), before, strict=True):
        registry.clear()
        registry.update(content)
    sys.modules.pop("mine", None)


def test_neither_is_longer_than_twenty_lines() -> None:
    assert all(len(text.strip().splitlines()) <= 20 for text in (RULE, AGENT))


@pytest.mark.parametrize(("budget", "metric"), [(0.8, "macs"), ("30%", "params")])
def test_the_rule_keeps_the_contract_of_rules(mine: Path, budget: object, metric: str) -> None:
    plugins.load(["mine.py"])
    model = build_model("cifar_resnet20", channels=1, arguments={"width": 6})
    workload = Noise(model)
    space = trace(model, workload.example_inputs)
    scores = importance.taylor(model, space, workload.batches("calibration"), workload.loss)
    context = Context(space, model, scores, budget, metric, workload)
    found, weights = RULES["skewed"], {n: t.clone() for n, t in model.state_dict().items()}
    distribution = found.function(context)
    assert distribution.shape == (len(space.groups),) and distribution.dtype == np.float64
    assert (distribution >= 0).all() and len(set(distribution)) > 1
    widths = space.project(distribution, budget, metric)
    assert space.cost(widths, metric) <= space.target(budget, metric)
    assert np.array_equal(distribution, found.function(context))
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())
    assert found.summary and found.function.__doc__ and not found.shipped
    whole = replace(context, importance=[np.ones(w) for w in space.widths])
    assert found.function(whole).any(), "groups whose units are alike still give a distribution"


def _searched(seed: int, spend: int = 40, budget: object = 0.4, agent: str = "hill_climb") -> FakeAccount:
    task = make_synthetic_task(6, budget=budget)
    account = FakeAccount(task.evaluator, spend)
    result = make_agent(agent).search(SearchRequest([task], [account], seed=seed))
    limit = task.space.target(budget if isinstance(budget, float) else 0.6)
    fits = [c.score for w, c in account.seen.items() if task.space.cost(np.array(w)) <= limit]
    assert task.space.cost(result.widths()) <= limit
    assert account.seen[result.best[0][0]].score == max(fits)
    return account


def test_the_agent_keeps_the_contract_of_agents(mine: Path) -> None:
    plugins.load(["mine.py"])
    account = _searched(1)
    assert account.spent == 40
    assert list(account.seen) == list(_searched(1).seen)
    assert list(account.seen) != list(_searched(2).seen)
    assert list(account.seen)[:15] == list(_searched(1, 15).seen), "a resumed search goes the same way"
    first = next(iter(account.seen.values()))
    assert max(c.score for c in account.history) > first.score, "it climbs above uniform"
    assert _searched(1, budget=(0.3, 0.6)).spent == 40


def test_the_class_keeps_the_contract_of_agents(mine: Path) -> None:
    plugins.load(["mine.py"])
    account = _searched(1, agent="Shuffle")
    assert account.spent == 40
    assert list(account.seen) == list(_searched(1, agent="Shuffle").seen)
    assert list(account.seen) != list(_searched(2, agent="Shuffle").seen)


def test_the_commands_of_the_page_run(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The benchmark in the size of seconds; what the page's commands say is otherwise untouched."""
    listing, comparison, pruning, _ = COMMANDS
    assert cli.main(listing.split()[1:]) == 0
    assert re.search(r"^hill_climb +keeps the best plan so far", capsys.readouterr().out, re.M)
    small = without(SMALL_SEARCH)
    words = comparison.replace("--seeds 3 --evaluations 100", "--seeds 1 --evaluations 14").split()[1:]
    assert cli.main([*words, *small, "--out", "compared"]) == 0
    rows = json.loads(Path("compared/results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["dense", "skewed", "hill_climb", "uniform", "random"]
    spent = {row["method"]: row["evaluations"] for row in rows}
    assert spent == {"dense": 0, "skewed": 1, "hill_climb": 14, "uniform": 1, "random": 14}
    score = {row["method"]: row["score"] for row in rows}
    assert score["hill_climb"] >= score["uniform"]
    pruned = [*pruning.split()[1:], *without(SMALL_DIGITS), "--out", "pruned"]
    assert cli.main(pruned) == 0
    assert Path("pruned/plan.json").is_file()


def test_the_script_of_the_page_runs(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = SCRIPT.replace('load_config("digits")', f'load_config("digits", {SMALL_RUN!r})')
    assert text != SCRIPT and "evaluations=100" in text
    exec(compile(text.replace("evaluations=100", "evaluations=14"), str(PAGE), "exec"), {})
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if " -" in line]
    assert {*ARE_METHODS, "uniform", "random"} <= set(printed)
