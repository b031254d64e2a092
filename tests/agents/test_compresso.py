"""Compresso: its gates and formulas, the cut model beside the masked one, what it learns, keeps, counts and refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.language_workload import workload_of
from helpers.lm import tiny_lm, tokens
from helpers.synthetic import FakeAccount, make_synthetic_task
from rlprune.agents import SearchRequest, SearchResult, StateDir, make_agent
from rlprune.agents.baselines import compresso
from rlprune.cli.main import main
from rlprune.config.config import Config
from rlprune.config.search import CompressoConfig, SearchConfig
from rlprune.config.training import FinishConfig, RecoveryConfig
from rlprune.envs.task import Task
from rlprune.errors import ConfigError, RunError
from rlprune.evaluation.evaluator import Evaluator
from rlprune.experiments.methods import check_learning
from rlprune.language.calibration.masks import MaskedHidden, MaskedUnits
from rlprune.language.tuning.gates import Gates, Lagrangian
from rlprune.language.tuning.learned import LearnedWeights
from rlprune.language.tuning.peft import attached, low_rank
from rlprune.language.workload import LanguageWorkload
from rlprune.pruning.plan import Plan
from rlprune.pruning.surgery import prune
from rlprune.tracing.trace import TraceOptions


def gates_at(location: float, count: int = 4000) -> Gates:
    found = Gates(count, torch.Generator().manual_seed(0))
    with torch.no_grad():
        found.location.fill_(location)
    return found


@pytest.mark.parametrize("location", [-3.0, -0.5, 0.0, 2.0])
def test_gates_are_open_as_often_as_they_say(location: float) -> None:
    """The share of samples above 0 and at 1, by the distribution function of the logistic noise."""
    gates = gates_at(location)
    drawn = gates.sample(torch.Generator().manual_seed(1)).detach()

    def above(x: float) -> float:
        """P(gate > x), from u > sigmoid(beta logit(x stretched) - log alpha)."""
        inner = (x + 0.1) / 1.2
        return 1.0 - 1.0 / (1.0 + math.exp(-(2 / 3 * math.log(inner / (1 - inner)) - location)))

    assert float(gates.kept().detach()[0]) == pytest.approx(above(0.0), abs=1e-6)
    assert float((drawn > 0).float().mean()) == pytest.approx(above(0.0), abs=0.03)
    assert float((drawn == 1).float().mean()) == pytest.approx(above(1.0), abs=0.03)
    assert drawn.min() >= 0 and drawn.max() <= 1


def test_gates_begin_where_the_authors_do_and_stay_within_bounds() -> None:
    generator = torch.Generator().manual_seed(0)
    assert float(Gates(1000, generator).location.detach().mean()) == pytest.approx(math.log(99), abs=0.01)
    high = Gates(1000, generator, location=10.0)
    assert float(high.location.detach().std()) == pytest.approx(0.01, rel=0.2)
    high.hold()
    assert torch.equal(high.location.detach(), torch.full((1000,), math.log(100)))
    assert float(high.values()[0]) == pytest.approx(1 / (1 + math.exp(-1.2 * math.log(100))))


def test_multipliers_climb_while_too_little_is_cut() -> None:
    lagrangian = Lagrangian()
    optimizer = torch.optim.AdamW(lagrangian.parameters(), lr=0.1, weight_decay=0.0, maximize=True)
    sparsity = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        optimizer.zero_grad()
        lagrangian(sparsity, 0.3).backward()
        optimizer.step()
    assert float(lagrangian.first.detach()) < 0 < float(lagrangian.second.detach())
    (gradient,) = torch.autograd.grad(lagrangian(sparsity, 0.3), sparsity)
    assert gradient < 0, "descent raises the sparsity"


def traced(name: str, hidden: bool, **changes: Any) -> tuple[Any, Any]:
    model = tiny_lm(name, seed=3, **changes).double().eval()
    workload = workload_of(model)
    options = TraceOptions(round_to=1, hidden=hidden)
    return model, workload.adapter.trace(model, workload.example_inputs, options)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=7, max_size=7))
def test_expected_sparsity_is_the_formula_of_the_widths(shares: list[float]) -> None:
    space = _SPACE[1]
    formula = space.costs["block_params"]
    expected = compresso._ExpectedCost(formula, space.widths.astype(np.float64), list(range(7)))
    kept = np.array(shares) * space.widths
    found = expected.sparsity(torch.from_numpy(kept))
    assert float(found) == pytest.approx(
        1 - float(formula(kept)) / space.dense_cost("block_params"), abs=1e-12
    )


_SPACE = traced("llama", True)


@pytest.mark.parametrize(
    ("name", "hidden", "adapters"),
    [
        ("llama", True, "query_value"),
        ("llama-biases", True, "all"),
        ("llama-mha-tied", True, "query_value"),
        ("gemma2", True, "query_value"),
        ("gpt2", False, "all"),
        ("phi3", False, "query_value"),
    ],
)
def test_the_cut_model_is_the_masked_one_with_its_adapters(name: str, hidden: bool, adapters: str) -> None:
    model, space = traced(name, hidden)
    generator = np.random.default_rng(1)
    kept = tuple(np.flatnonzero(generator.random(g.units) < 0.6) for g in space.groups)
    kept = tuple(k if len(k) else np.array([0]) for k in kept)
    plan = Plan(space, space.widths_of(kept), kept)
    values = {
        g: torch.from_numpy(generator.uniform(0.2, 1.0, group.units)) for g, group in enumerate(space.groups)
    }
    ids = tokens(9, 2)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    for module in model.modules():  # what is added to the mean of squares is not what is tested
        for epsilon in ("variance_epsilon", "eps"):
            if hasattr(module, epsilon):
                setattr(module, epsilon, 1e-14)
    with torch.no_grad(), ExitStack() as stack:
        torch.manual_seed(0)
        stack.enter_context(attached(model, FinishConfig(adapters=adapters, dropout=0.0), merge=False))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2)
        learned = low_rank(model)
        units = stack.enter_context(MaskedUnits(model, space, "test"))
        for group in units.groups:
            units.mask[group] = values[group] * torch.zeros(space.groups[group].units).index_fill(
                0, torch.from_numpy(kept[group]), 1.0
            )
        if hidden:
            masked = stack.enter_context(MaskedHidden(model, space, len(space.groups) - 1))
            masked.mask = torch.zeros(space.groups[-1].units).index_fill(0, torch.from_numpy(kept[-1]), 1.0)
        wanted = model(ids).logits
    assert {n: p.shape for n, p in model.state_dict().items()} == {n: p.shape for n, p in before.items()}
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    slim = prune(model, plan)
    LearnedWeights(model, space, learned, values)(slim, plan)
    with torch.no_grad():
        found = slim(ids).logits
    assert torch.allclose(found, wanted, atol=5e-5), float((found - wanted).abs().max())
    assert not torch.allclose(found, prune(model, plan)(ids).logits, atol=1e-3), "adapters and gates count"


def search(
    steps: int = 24,
    state: StateDir | None = None,
    model: Any = None,
    make: Callable[[Any], LanguageWorkload] = lambda model: workload_of(model, sizes=(16, 4, 4, 4)),
    **own: Any,
) -> tuple[Evaluator, SearchResult]:
    workload = make(model if model is not None else tiny_lm("llama", seed=1))
    space = workload.adapter.trace(
        workload.model, workload.example_inputs, TraceOptions(round_to=1, hidden=True)
    )
    evaluator = Evaluator(
        workload, space, importance="l2", recovery=RecoveryConfig(steps=("none",)), metric="block_params"
    )
    settings = SearchConfig(compresso=CompressoConfig(**{"steps": steps, "batch_size": 2, "lr": 1e-2} | own))
    request = SearchRequest(
        [Task(evaluator, 0.6, "block_params")], [FakeAccount(evaluator, 3)], seed=1, state=state
    )
    return evaluator, make_agent("compresso", settings).search(request)


def test_the_plan_keeps_what_was_learned_within_the_budget() -> None:
    evaluator, found = search()
    space, widths = evaluator.space, found.widths()
    assert space.cost(widths, "block_params") <= space.target(0.6, "block_params")
    plan = evaluator.plan(widths)
    for scores, kept in zip(evaluator.importance, plan.kept, strict=True):
        gone = np.setdiff1d(np.arange(len(scores)), kept)
        assert not len(gone) or scores[kept].min() >= scores[gone].max()
    assert found.learning == {"steps": 24, "forward": 48, "backward": 48, "tokens": 48 * 16}
    # The dense model has lost nothing and gained nothing; the plan's model has what was learned.
    dense, built = evaluator.workload.model, evaluator.build(widths)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            dense.state_dict().values(), tiny_lm("llama", seed=1).state_dict().values(), strict=True
        )
    )
    assert evaluator.dense.score == pytest.approx(0.0, abs=1e-6)
    cut = dict(prune(dense, plan).named_parameters())
    changed = {
        n.rpartition(".")[0].rpartition(".")[2]
        for n, p in built.named_parameters()
        if not torch.equal(p, cut[n])
    }
    norms = {"input_layernorm", "post_attention_layernorm", "norm"}
    assert changed == {"q_proj", "v_proj", "o_proj", "down_proj", *norms}


def test_neurons_that_do_nothing_go_first() -> None:
    """Half of the neurons reach nothing: their gates feel the sparsity alone, those of the others the loss as well."""
    model = tiny_lm("llama", seed=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= 20.0
            layer.mlp.down_proj.weight[:, ::2] = 0.0
    evaluator, found = search(steps=80, model=model, lr=1e-4)
    plan = evaluator.plan(found.widths())
    kept = np.concatenate(
        [k for k, g in zip(plan.kept, evaluator.space.groups, strict=True) if g.kind == "ffn"]
    )
    assert len(kept) < 3 * 40 and (kept % 2 == 1).mean() > 0.65


def test_the_same_seed_and_a_killed_search_give_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compresso, "_SAVED", 5)
    whole, expected = search()

    class Killed(Exception):
        pass

    update = compresso._Learner._update

    def dying(self: Any, *given: Any) -> Any:
        if self._step == 13:
            raise Killed
        return update(self, *given)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(compresso._Learner, "_update", dying)
        search(state=StateDir(tmp_path))
    before = torch.random.get_rng_state()
    resumed, found = search(state=StateDir(tmp_path))
    assert torch.equal(before, torch.random.get_rng_state())
    assert found.best == expected.best and found.learning == expected.learning
    assert all(np.array_equal(a, b) for a, b in zip(resumed.importance, whole.importance, strict=True))
    for one, other in zip(
        resumed.build(found.widths()).parameters(), whole.build(found.widths()).parameters(), strict=True
    ):
        assert torch.equal(one, other)
    # Once more: the learning is over, nothing is read again.
    monkeypatch.setattr(compresso._Learner, "_update", dying)
    assert search(state=StateDir(tmp_path))[1].best == expected.best


def test_what_others_scored_is_not_taken_for_the_learned_units() -> None:
    evaluator, found = search()
    widths = found.widths()
    fresh = Evaluator(
        evaluator.workload,
        evaluator.space,
        importance="l2",
        recovery=RecoveryConfig(steps=("none",)),
        metric="block_params",
    )
    fork = fresh.fork()
    before = fork.evaluate(widths).score  # another method's, in the bank that forks share
    own = fresh.fork()
    own.rerank(evaluator.importance, evaluator._builder.dense.change)
    assert own.evaluate(widths).score == evaluator.evaluate(widths).score != before
    assert fresh.fork().evaluate(widths).score == before, "and the other way round"


def test_refusals() -> None:
    task = make_synthetic_task(4, budget=0.6)
    with pytest.raises(ConfigError, match=r"'compresso' prunes one model to one budget"):
        make_agent("compresso").search(SearchRequest([task], [FakeAccount(task.evaluator, 5)]))
    with pytest.raises(RunError, match=r"search\.compresso: the loss is not finite after 24 steps; lower"):
        search(make=_diverging)
    given = {"model": {"name": "tiny_llama"}, "data": {"name": "help_texts"}}

    def refused(match: str, **changes: Any) -> None:
        search = {"agent": "compresso", "starts": "none", "baselines": []} | changes.pop("search", {})
        with pytest.raises(ConfigError, match=match):
            check_learning("compresso", Config.from_dict({**given, "search": search, **changes}))

    refused(r"search\.starts: 'compresso' learns which units stay.*allowed: none", search={"starts": "rules"})
    refused(r"search\.baselines: 'compresso' learns.*allowed: \[\]", search={"baselines": ["random"]})
    refused(r"rounds\.count: what 'compresso' learns.*allowed: 1", rounds={"count": 2, "steps": 1})
    workload = workload_of(tiny_lm("llama", seed=1))
    space = workload.adapter.trace(workload.model, workload.example_inputs, TraceOptions(round_to=1))
    evaluator = Evaluator(workload, space, importance="l2", recovery=RecoveryConfig(steps=("bias",)))
    scores = [np.ones(g.units) for g in space.groups]
    with pytest.raises(ConfigError, match=r"recovery\.steps: 'bias' is measured on the dense model"):
        evaluator.rerank(scores, lambda slim, plan: None)


def test_models_of_images_are_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["search.agent=compresso", "search.starts=none", "search.baselines=[]", "recovery.steps=[none]"]
    words = ["train", "digits", "--out", str(tmp_path / "run"), *(w for s in sets for w in ("--set", s))]
    assert main(words) == 2
    assert (
        "search.agent: 'compresso' is for language models only; allowed here: ppo," in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def _diverging(model: Any) -> LanguageWorkload:
    workload = workload_of(model)
    loss_of = workload.loss_of
    workload.loss_of = lambda outputs, targets: loss_of(outputs, targets) * math.nan  # type: ignore[method-assign]
    return workload


def test_a_table_of_latencies_has_no_gradient() -> None:
    costs = _SPACE[1].costs
    timed: Any = SimpleNamespace(
        metric="latency", space=SimpleNamespace(costs=dict(costs) | {"latency": object()})
    )
    with pytest.raises(
        ConfigError,
        match=r"budget\.metric: 'compresso' learns by the gradient.*'latency' is not; allowed: macs",
    ):
        compresso._formula(timed)
