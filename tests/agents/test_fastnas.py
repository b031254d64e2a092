"""FastNAS by ModelOpt: our widths for its channels, our scores and costs for its search, and who is refused."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rlprune
from helpers.nets import Depthwise
from helpers.small import SMALL_RUN
from helpers.synthetic import FakeAccount
from helpers.workloads import Images
from rlprune.agents import SearchRequest, make_agent
from rlprune.agents.baselines.fastnas import FastNAS, kept_widths
from rlprune.api import trace
from rlprune.cli.main import main
from rlprune.config.search import FastNASConfig, SearchConfig
from rlprune.envs.task import Task
from rlprune.errors import BudgetError, ConfigError, GraphError
from rlprune.evaluation.evaluator import Evaluator
from rlprune.report import read_results
from rlprune.vision.resnet_cifar import CifarResNet

needs_modelopt = pytest.mark.skipif(
    importlib.util.find_spec("modelopt") is None, reason="needs nvidia-modelopt (extra peers)"
)
torch.set_num_threads(1)
INNER = ("layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1")


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    torch.manual_seed(0)
    return Evaluator(Images(CifarResNet(depth=8, width=8), size=32), importance="taylor")


def search(evaluator: Any, limit: int, *, budget: Any = 0.5, stop: int | None = None, **own: Any) -> Any:
    """The account and the result of a search, its start the uniform plan."""
    task = Task(evaluator, budget)
    account = FakeAccount(evaluator, limit, stop)
    starts = [[task.uniform_widths(budget), np.maximum(task.uniform_widths(budget) - 1, 1)]]
    agent = make_agent("fastnas", SearchConfig(fastnas=FastNASConfig(**own)))
    return account, agent.search(SearchRequest([task], [account], starts=starts))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command line says, in one line, and ends with exit code 2."""
    assert main([*words, "--progress", "none"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_without_modelopt_the_extra_is_named(monkeypatch: Any, capsys: Any, tmp_path: Any) -> None:
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(
        ConfigError, match=r"^search\.agent: 'fastnas' needs `pip install 'rlprune\[peers\]'`$"
    ):
        make_agent("fastnas")
    out = str(tmp_path / "run")
    line = refused(capsys, "train", "digits", "--set", "search.agent=fastnas", "--out", out)
    assert line.endswith("search.agent: 'fastnas' needs `pip install 'rlprune[peers]'`")
    line = refused(capsys, "benchmark", "digits", "--methods", "fastnas,uniform", "--out", out)
    assert "--methods: 'fastnas' cannot run here" in line and "rlprune[peers]" in line
    assert not (tmp_path / "run").exists(), "before anything is trained or written"


def test_language_models_are_refused(capsys: Any, tmp_path: Any) -> None:
    out = str(tmp_path / "run")
    line = refused(capsys, "train", "tiny_llama", "--set", "search.agent=fastnas", "--out", out)
    assert "search.agent: 'fastnas' is for models of images" in line and "allowed here: ppo, " in line
    line = refused(capsys, "benchmark", "tiny_llama", "--methods", "fastnas", "--out", out)
    assert "--methods: 'fastnas' is for models of images" in line
    line = refused(capsys, "train", "tiny_llama", "--set", "search.baselines=[fastnas]", "--out", out)
    assert "search.baselines[0]: 'fastnas' is for models of images" in line


@pytest.fixture(scope="module")
def rounded() -> Any:
    model = CifarResNet(depth=8, width=8).eval()
    return model, trace(model, torch.zeros(1, 3, 16, 16)).with_rounding(2)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_group_keeps_the_share_of_its_layers_channels(rounded: Any, data: st.DataObject) -> None:
    model, space = rounded
    names = {g.name: i for i, g in enumerate(space.groups)}
    full = {name: model.get_submodule(name).out_channels for name in INNER}
    kept = {name: data.draw(st.integers(1, count)) for name, count in full.items()}
    widths = kept_widths(space, {name: (kept[name], full[name]) for name in INNER})
    for name, index in names.items():
        if name not in INNER:
            assert widths[index] == space.widths[index], "what ModelOpt does not touch stays dense"
        elif kept[name] == full[name]:
            assert widths[index] == full[name]
        else:
            assert widths[index] == max(kept[name] // 2 * 2, space.groups[index].minimum)
    # A layer whose channels are counted otherwise than here, and one of two that keep different shares.
    assert (kept_widths(space, {INNER[0]: (1, full[INNER[0]] + 1)}) == space.widths).all()
    pair = {"conv1": (4, 8), "layer1.0.conv2": (6, 8)}
    assert kept_widths(space, pair)[names["conv1"]] == 6


@needs_modelopt
def test_each_score_is_an_evaluation_and_the_plan_keeps_the_budget(evaluator: Evaluator, capsys: Any) -> None:
    account, found = search(evaluator, 40)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", ""), "ModelOpt says nothing"
    space = evaluator.space
    uniform, dense, *rest = [np.array(plan) for plan in account.seen]
    assert (uniform == Task(evaluator, 0.5).uniform_widths(0.5)).all(), "one start, so that there is a plan"
    assert (dense == space.widths).all()
    single = [plan for plan in rest if (plan != space.widths).sum() == 1]
    assert len(single) >= 3 and len(account.seen) <= 40
    touched = {space.groups[int(np.flatnonzero(plan != space.widths)[0])].name for plan in single}
    assert touched == set(INNER), "shortcuts of padded channels are not searched"
    target = space.target(0.5)
    own, exact = rest[-2:]
    assert space.cost(own) <= target and space.cost(exact) <= target
    assert (space.project(1.0 - own / space.widths, 0.5) == exact).all(), "no further step fits"
    within = {plan: c.score for plan, c in account.seen.items() if c.cost <= target}
    assert found.best[0][0] == max(within, key=within.__getitem__)
    counter = FlopCounterMode(display=False)
    slim = evaluator.build(found.widths())
    with counter, torch.no_grad():
        slim(evaluator.workload.example_inputs)
    assert counter.get_total_flops() == 2 * space.cost(found.widths())


@needs_modelopt
def test_its_choice_is_the_lowest_bound_that_meets_the_budget(evaluator: Evaluator) -> None:
    """Recomputed from the scores: losses made monotone, and the lowest bound whose widths meet the cost."""
    account, _ = search(evaluator, 60, ratios=8, channel_divisor=1)
    space, target = evaluator.space, evaluator.space.target(0.5)
    dense = account.seen[tuple(int(w) for w in space.widths)].score
    added: dict[int, dict[int, float]] = {}
    for plan, candidate in account.seen.items():
        changed = np.flatnonzero(np.array(plan) != space.widths)
        if len(changed) == 1:
            added.setdefault(int(changed[0]), {})[plan[changed[0]]] = dense - candidate.score
    for group, losses in added.items():
        size = int(space.widths[group])
        most, monotone = 0.0, {size: 0.0}
        # A smaller width that cost nothing ended the scores of its group: the larger ones count as free.
        for width in sorted({int(size * i / 8) for i in range(1, 8)}, reverse=True):
            most = max(most, losses.get(width, 0.0))
            monotone[width] = most
        added[group] = monotone

    def widths(bound: float) -> np.ndarray:
        chosen = space.widths.copy()
        for group, losses in added.items():
            chosen[group] = min(w for w, loss in losses.items() if loss <= bound)
        return chosen

    bounds = sorted({loss for losses in added.values() for loss in losses.values()})
    expected = next(w for b in bounds if space.cost(w := widths(b)) <= target)
    assert (np.array([*account.seen][-2]) == expected).all()


@needs_modelopt
def test_the_same_again_and_after_an_interruption(evaluator: Evaluator) -> None:
    whole, found = search(evaluator, 20)
    again, _ = search(evaluator, 20)
    assert [*again.seen] == [*whole.seen]
    for stop in (0, 1, 7):
        with pytest.raises(KeyboardInterrupt):
            search(evaluator, 20, stop=stop)
        resumed, same = search(evaluator, 20)
        assert [*resumed.seen] == [*whole.seen] and same.best == found.best


class Branches(nn.Module):
    """Two layers whose outputs lie side by side in the input of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(3, 8, 1)
        self.c = nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(torch.cat([self.a(x), self.b(x)], 1))
        return self.head(torch.relu(self.c(x)).mean((2, 3)))


@needs_modelopt
@pytest.mark.parametrize(("net", "touched"), [(Branches, {"a", "b"}), (Depthwise, {"stem"})])
def test_other_architectures(net: Any, touched: set[str]) -> None:
    torch.manual_seed(0)
    evaluator = Evaluator(Images(net(), size=16))
    account, found = search(evaluator, 30, budget=0.7)
    space = evaluator.space
    cut = np.array([*account.seen][2:]) < space.widths
    assert touched <= {g.name for g, any_cut in zip(space.groups, cut.any(0)) if any_cut}
    assert space.cost(found.widths()) <= space.target(0.7)


@needs_modelopt
def test_what_cannot_be_done_is_said_in_one_line(evaluator: Evaluator) -> None:
    with pytest.raises(
        ConfigError, match=r"^search\.evaluations: 'fastnas' needs \d+ .* got 4; allowed: more"
    ):
        search(evaluator, 5, ratios=8, channel_divisor=1)
    with pytest.raises(
        BudgetError, match=r"^search\.agent: 'fastnas' cannot meet the budget .* leaves .*% of"
    ):
        search(evaluator, 60, budget=float(evaluator.space.lowest()) * 1.05)
    with pytest.raises(ConfigError, match=r"^search\.budget_range: the agent 'fastnas' searches one budget"):
        task = Task(evaluator, (0.3, 0.6))
        make_agent("fastnas").search(SearchRequest([task], [FakeAccount(evaluator, 5)]))
    with pytest.raises(GraphError, match=r"cannot convert CifarResNet .*smaller search\.fastnas\.channel"):
        search(evaluator, 20, channel_divisor=64)


@needs_modelopt
def test_a_search_that_is_stopped_early_ends_with_its_start(evaluator: Evaluator) -> None:
    class Stopped(FakeAccount):
        @property
        def left(self) -> int:
            return 20 - self.spent

        def _charge(self, key: Any, score: Any) -> Any:
            if self.spent == 3:
                from rlprune.evaluation.ledger import BudgetExhausted

                raise BudgetExhausted
            return super()._charge(key, score)

    task = Task(evaluator, 0.5)
    account = Stopped(evaluator, 20)
    request = SearchRequest([task], [account], starts=[[task.uniform_widths(0.5)]])
    found = FastNAS().search(replace(request))
    assert found.best[0][0] == tuple(task.uniform_widths(0.5))


@needs_modelopt
@pytest.mark.slow
def test_a_run_of_the_command_line(tmp_path: Any, capsys: Any) -> None:
    out = tmp_path / "run"
    own = [*SMALL_RUN, "search.agent=fastnas", "search.baselines=[]", "search.evaluations=20"]
    own = [text for text in own if not text.startswith(("search.batch", "search.ppo"))]
    words = [word for text in own for word in ("--set", text)]
    assert main(["train", "digits", *words, "--out", str(out), "--progress", "none"]) == 0
    results = read_results(out)
    row = next(row for row in results["rows"] if row["method"] == "fastnas")
    assert row["kind"] == "agent" and 3 < row["evaluations"] <= 20
    assert row["cost"] <= 0.5 * results["budget"]["dense"]
    rlprune.load(out / "pruned")
    names = {path.name for path in out.iterdir()}
    assert {"report.html", "ledger.jsonl", "pruned"} <= names and "policy" not in names
    capsys.readouterr()
    asked = ["benchmark", "digits", *words[:10], "--methods", "fastnas,uniform,random", "--evaluations", "20"]
    assert main([*asked, "--seeds", "1", "--out", str(tmp_path / "b"), "--progress", "none"]) == 0
    rows = {row["method"]: row for row in read_results(tmp_path / "b")["rows"]}
    assert {"fastnas", "uniform", "random", "dense"} == set(rows) and rows["fastnas"]["evaluations"] <= 20
