"""Latency tables: the arithmetic, what is measured, the cache, and budgets of milliseconds through the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from lm import tiny_lm
from nets import NETS, build, example
from small import SMALL_DIGITS
from torch import nn

from rlprune import cli, profiling
from rlprune.artifacts import read_plan
from rlprune.config import BudgetConfig
from rlprune.errors import ArtifactError, BudgetError, ConfigError
from rlprune.profiling import TABLE_FILE, read_table, with_latency
from rlprune.pruning.budget import Limits, parse_budget, project
from rlprune.pruning.cost import AxisSize
from rlprune.pruning.latency_table import (
    Calibration,
    LatencyTable,
    LayerTable,
    TableCost,
    monotone,
    rising,
    table_cost,
)
from rlprune.pruning.plan import Plan
from rlprune.pruning.surgery import prune
from rlprune.pruning.tracing import trace
from rlprune.report import read_results

GRIDS = hnp.arrays(
    np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(0, 100)
)


# Smoothing


@settings(max_examples=50, deadline=None)
@given(GRIDS)
def test_smoothing_is_monotone_and_as_near_as_an_isotonic_regression(values: np.ndarray) -> None:
    found = monotone(values)
    assert (np.diff(found, axis=0) >= 0).all() and (np.diff(found, axis=1) >= 0).all()
    np.testing.assert_allclose(monotone(found), found, atol=1e-6)
    # The nearest monotone table is nearer than the two that are easy to name.
    for other in (
        np.full_like(values, values.mean()),
        np.maximum.accumulate(np.maximum.accumulate(values, 0), 1),
    ):
        assert ((found - values) ** 2).sum() <= ((other - values) ** 2).sum() + 1e-3


def test_smoothing_pools_the_neighbours_that_fall() -> None:
    # By hand: 3 and 1 fall, their mean is 2; nothing else changes.
    np.testing.assert_allclose(monotone(np.array([[0.0, 3.0, 1.0, 4.0]])), [[0, 2, 2, 4]], atol=1e-9)
    np.testing.assert_allclose(monotone(np.array([[0.0], [3.0], [1.0]])), [[0], [2], [2]], atol=1e-9)


def test_a_flat_table_rises_a_little_and_an_empty_layer_costs_nothing() -> None:
    found = rising(np.full((3, 2), 5.0), np.array([0, 4, 8]), np.array([1, 2]))
    assert (found[0] == 0).all()
    assert (np.diff(found[1:], axis=0) > 0).all() and (np.diff(found[1:], axis=1) > 0).all()
    np.testing.assert_allclose(found[1:], 5.0, rtol=0.01)


# The cost


@st.composite
def costs(draw: st.DrawFn) -> tuple[TableCost, Limits]:
    """A ring of layers with random monotone tables, widths, steps and minimums; some axes carry fixed slots."""
    groups = draw(st.integers(1, 4))
    dense = np.array(draw(st.lists(st.integers(1, 40), min_size=groups, max_size=groups)))
    step = np.minimum(draw(st.sampled_from([1, 1, 2, 8])), dense)
    lowest = draw(st.integers(1, 9))
    minimum = np.minimum(-(-lowest // step) * step, dense)
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    terms = []
    for i in range(groups):
        axes: list[AxisSize | None] = []
        nodes = []
        for g, most in ((i, 3), ((i + 1) % groups, 2)):
            axis = AxisSize(float(draw(st.integers(0, 3))), np.eye(groups)[g] * draw(st.integers(1, most)))
            top = int(axis.constant + axis.slope @ dense)
            if draw(st.booleans()) or top == 1:
                axes.append(axis)
                nodes.append(np.unique([1, *generator.integers(1, top + 1, 4), top]))
            else:
                axes.append(None)
                nodes.append(np.array([top]))
        raw = generator.exponential(size=(len(nodes[0]), len(nodes[1])))
        table = LayerTable("any", nodes[0], nodes[1], rising(np.round(raw, 1), *nodes), float(i % 2))
        terms.append((table, draw(st.floats(0.1, 3.0)), draw(st.floats(0.0, 0.01)), *axes))
    return TableCost(terms, draw(st.floats(0, 1)), groups), Limits(dense, minimum, step)


@settings(max_examples=60, deadline=None)
@given(costs(), st.data(), st.floats(0.0, 1.0))
def test_a_projection_meets_the_target_and_no_step_more_fits(space, data, share) -> None:
    cost, limits = space
    count = len(limits.dense)
    numbers = st.lists(st.floats(0.0, 1.0), min_size=count, max_size=count).filter(any)
    rows = np.array(data.draw(st.lists(numbers, min_size=1, max_size=3)))
    low, high = float(cost(limits.minimum)), float(cost(limits.dense))
    target = low + share * (high - low)
    widths = project(rows, target, cost, limits, metric="latency")
    assert (widths >= limits.minimum).all() and (widths <= limits.dense).all()
    assert ((widths % limits.step == 0) | (widths == limits.dense) | (widths == limits.minimum)).all()
    assert (cost(widths) <= target).all()
    for row, found in zip(rows, widths, strict=True):
        assert np.array_equal(project(row, target, cost, limits, metric="latency"), found)
        for g in range(count):
            more = found.copy()
            more[g] = limits.above(found)[g]
            assert more[g] == found[g] or float(cost(more)) > target


@settings(max_examples=60, deadline=None)
@given(costs(), st.data())
def test_an_increase_is_the_difference_of_two_costs_to_the_last_bit(space, data) -> None:
    cost, limits = space
    widths = np.array([data.draw(st.integers(1, int(d))) for d in limits.dense])
    steps = np.array([data.draw(st.integers(-int(w) + 1, 9)) for w in widths])
    increase = cost.increase(widths.astype(float), steps.astype(float))
    for g in range(len(widths)):
        moved = widths.copy()
        moved[g] += steps[g]
        assert float(cost(widths)) + increase[g] == float(cost(moved))
    both = np.stack([widths, limits.dense])
    assert np.array_equal(cost(both), [float(cost(widths)), float(cost(limits.dense))])


def test_between_grid_points_the_value_is_bilinear() -> None:
    table = LayerTable("any", np.array([2, 6]), np.array([1, 5]), np.array([[1.0, 5.0], [3.0, 11.0]]), 1.0)
    axes = AxisSize(0.0, np.array([1.0, 0.0])), AxisSize(1.0, np.array([0.0, 2.0]))
    cost = TableCost([(table, 2.0, 0.5, *axes)], 7.0, 2)
    # out 3 is a quarter of the way, in 1 + 2 * 1 = 3 half of it: (3 + (7 - 3) / 4) * 2 + 3 * 0.5 + 7.
    assert float(cost([3, 1])) == pytest.approx(16.5, abs=1e-8)


# What is measured


def fake_seconds(module: nn.Module) -> float:
    """A latency that is a known function of a layer's sizes, for tests that must not depend on the clock."""
    return 1e-6 * (2.0 + sum(p.numel() for p in module.parameters()))


def fake_clock(patch: pytest.MonkeyPatch) -> None:
    """Layers take what `fake_seconds` says, models twice the sum of their layers and 0.25 ms."""

    def measure(models, inputs, batch_sizes, *_, **__):
        ms = {n: 2e3 * sum(map(fake_seconds, called(m, inputs))) for n, m in models.items()}
        return {name: {batch_sizes[0]: 0.25 + own} for name, own in ms.items()}

    patch.setattr(profiling, "timed", lambda module, inputs: (module(inputs), fake_seconds(module))[1])
    patch.setattr(profiling, "in_turns", lambda calls, *_: {n: [s] for n, s in calls.items()})
    patch.setattr(profiling, "measure", measure)


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_clock(monkeypatch)
    monkeypatch.setenv("RLPRUNE_CACHE", str(tmp_path / "cache"))


def called(model: nn.Module, inputs: torch.Tensor) -> list[nn.Module]:
    """The leaf modules with parameters that a forward pass runs, once for each call."""
    found: list[nn.Module] = []
    leaves = [m for m in model.modules() if not list(m.children()) and list(m.parameters())]
    handles = [m.register_forward_hook(lambda module, *_: found.append(module)) for m in leaves]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return found


def any_widths(space: Any, seed: int) -> np.ndarray:
    shares = np.random.default_rng(seed).random(len(space.groups))
    return space.limits.floor(space.minimums + shares * (space.widths - space.minimums))


def built(model: nn.Module, space: Any, widths: np.ndarray) -> nn.Module:
    return prune(model, Plan(space, widths, tuple(np.arange(w) for w in widths)))


@pytest.mark.parametrize("name", [*NETS, "llama", "gpt2"])
def test_the_sizes_of_the_table_are_those_of_the_built_model(name: str, no_clock: None) -> None:
    if name in NETS:
        model, inputs = build(name, torch.float32), example(torch.float32)[:1]
    else:
        model, inputs = tiny_lm(name).float(), torch.zeros(1, 8, dtype=torch.long)
    plain = trace(model, inputs)
    space = with_latency(plain, model, inputs, 2)
    cost = space.costs["latency"]
    assert isinstance(cost, TableCost) and cost.table is not None
    for seed in range(3):
        widths = space.widths if seed == 0 else any_widths(space, seed)
        small = built(model, plain, widths)
        outs, ins = cost.sizes(widths.astype(float))
        for use, out, into in zip(cost.table.layers, outs, ins, strict=True):
            real = small.get_submodule(use.module)
            twin = profiling.replica(
                model.get_submodule(use.module),
                use.module,
                profiling.SpaceSizes(plain),
                round(out),
                round(into),
            )
            assert {n: t.shape for n, t in twin.state_dict().items()} == {
                n: t.shape for n, t in real.state_dict().items()
            }
            numbers = {n: v for n, v in vars(real).items() if isinstance(v, int) and n != "training"}
            assert numbers == {n: v for n, v in vars(twin).items() if n in numbers}
        # Every layer is in the sum as often as the model calls it.
        calls = called(small, inputs)
        assert sum(use.calls for use in cost.table.layers) == len(calls)


def test_the_value_of_a_model_is_the_sum_of_its_layers(no_clock: None) -> None:
    model, inputs = build("SharedModule", torch.float32), example(torch.float32)[:1]
    space = with_latency(trace(model, inputs), model, inputs)
    table = space.costs["latency"].table
    for widths in (space.widths, space.minimums):
        small = built(model, space, widths)
        by_hand = sum(1e3 * fake_seconds(m) for m in called(small, inputs))
        plain = table_cost(replace(table, calibration=Calibration()), space)
        # The slight slope that keeps a table from being flat is at most 0.4% of the whole layer.
        assert by_hand <= float(plain(widths)) <= 1.02 * by_hand


@pytest.mark.parametrize("name", ["Residual", "cifar_resnet20", "mobilenet_v3_small"])
def test_the_calibration_finds_what_models_take_beside_their_layers(name: str, no_clock: None) -> None:
    model, inputs = build(name, torch.float32), example(torch.float32)[:1]
    space = with_latency(trace(model, inputs), model, inputs)
    for seed in range(1, 6):
        widths = any_widths(space, seed)
        small = built(model, space, widths)
        expected = 0.25 + 2e3 * sum(map(fake_seconds, called(small, inputs)))
        assert space.cost(widths, "latency") == pytest.approx(expected, rel=0.05)


def test_rounding_leaves_only_reachable_grid_points(no_clock: None) -> None:
    model, inputs = build("resnet18", torch.float32), example(torch.float32)[:1]
    space = with_latency(trace(model, inputs, round_to=8), model, inputs)
    for layer in space.costs["latency"].table.tables:
        for sizes in (layer.outs, layer.ins):
            assert len(sizes) == 1 or (sizes % 8 == 0).all()
    widths = space.project(np.ones(len(space.groups)), 0.6, "latency")
    assert (widths % 8 == 0).all()
    assert space.cost(widths, "latency") <= 0.6 * space.dense_cost("latency")


def test_a_dropped_part_costs_nothing(no_clock: None) -> None:
    model, inputs = tiny_lm("llama").float(), torch.zeros(1, 8, dtype=torch.long)
    space = with_latency(trace(model, inputs, drop=True), model, inputs)
    cost = space.costs["latency"]
    parts = dict(zip((u.module for u in cost.table.layers), cost.by_layer(space.minimums), strict=True))
    gone = [ms for n, ms in parts.items() if n.endswith("_proj")]
    assert len(gone) == 3 * 7 and not any(gone)
    assert all(ms > 0 for n, ms in parts.items() if not n.endswith("_proj"))


# Measured for real, kept, and read back


def tiny() -> tuple[nn.Module, torch.Tensor, Any]:
    model, inputs = build("Residual", torch.float32), example(torch.float32)[:1]
    return model, inputs, trace(model, inputs)


def test_a_second_run_reads_the_same_numbers_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLPRUNE_CACHE", str(tmp_path))
    model, inputs, space = tiny()
    first = with_latency(space, model, inputs, 4)
    low, dense = first.feasible("latency")
    assert 0 < low < dense
    assert first.costs["latency"].table.checks[0]["widths"] == space.widths.tolist()

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(profiling, "_measure_all", never)
    again = with_latency(space, model, inputs, 4)
    assert again.costs["latency"].table.to_dict() == first.costs["latency"].table.to_dict()
    widths = any_widths(space, 1)
    assert again.cost(widths, "latency") == first.cost(widths, "latency")
    with pytest.raises(AssertionError, match="measured again"):  # another batch size is another table
        with_latency(space, model, inputs, 5)


def test_a_broken_cache_file_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_clock: None
) -> None:
    monkeypatch.setenv("RLPRUNE_CACHE", str(tmp_path))
    model, inputs, space = tiny()
    first = with_latency(space, model, inputs)
    (file,) = (tmp_path / "latency").glob("*.json")
    file.write_text(file.read_text()[:100])
    assert with_latency(space, model, inputs).dense_cost("latency") == first.dense_cost("latency")
    assert read_table(file).fingerprint == space.fingerprint


def broken(change: str) -> dict[str, Any]:
    layer = LayerTable("any", np.array([1, 2]), np.array([3]), np.array([[1.0], [2.0]]), 1.0)
    found = LatencyTable("mark", 1, {}, (layer,), ()).to_dict()
    if change == "falls":
        found["tables"][0]["milliseconds"] = [[2.0], [1.0]]
    elif change == "grid":
        found["tables"][0]["outs"] = [1, 2, 3]
    elif change == "layer":
        found["layers"] = [{"module": "a", "table": 1, "calls": 1}]
    elif change == "negative":
        found["calibration"]["constant"] = -1.0
    elif change == "text":
        found["tables"][0]["ins"] = ["three"]
    elif change == "missing":
        del found["machine"]
    elif change == "newer":
        found["version"] = 99
    return found


@pytest.mark.parametrize("change", ["falls", "grid", "layer", "negative", "text", "missing", "newer"])
def test_a_damaged_table_is_refused_in_one_line(change: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(broken("")))
    assert read_table(tmp_path / "t.json").tables[0].outs.tolist() == [1, 2]
    (tmp_path / "t.json").write_text(json.dumps(broken(change)))
    with pytest.raises(ArtifactError, match="t.json") as error:
        read_table(tmp_path / "t.json")
    assert "\n" not in str(error.value)


def test_the_table_of_another_model_and_unusable_batches_are_refused(no_clock: None) -> None:
    model, inputs, space = tiny()
    other, shapes = build("Depthwise", torch.float32), example(torch.float32)[:1]
    foreign = with_latency(trace(other, shapes), other, shapes).costs["latency"].table
    with pytest.raises(ArtifactError, match="another architecture"):
        with_latency(space, model, inputs, table=foreign)
    with pytest.raises(BudgetError, match="batch_size"):
        with_latency(space, model, inputs, 0)
    with pytest.raises(BudgetError, match="needs a table"):
        space.dense_cost("latency")


# Budgets


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [(0.5, "ratio", 0.5), ("50%", "ratio", 0.5), ("0.5 ms", "absolute", 0.5), (3.5, "absolute", 3.5)],
)  # fmt: skip
def test_latency_budgets_are_shares_or_milliseconds(text: Any, kind: str, value: float) -> None:
    found = parse_budget(text, "latency")
    assert (found.kind, found.value) == (kind, value)
    assert BudgetConfig(target=text, metric="latency").target == text


@pytest.mark.parametrize("text", ["-1ms", "0ms", "5M", "120%", "ms", "nan", "3.5s", -1, 0])
def test_other_latency_budgets_are_refused(text: Any) -> None:
    with pytest.raises(BudgetError, match="milliseconds"):
        parse_budget(text, "latency")
    with pytest.raises(ConfigError, match="milliseconds"):
        BudgetConfig(target=text, metric="latency")


def test_milliseconds_are_no_budget_of_macs() -> None:
    with pytest.raises(BudgetError, match="150M"):
        parse_budget("3.5ms")
    with pytest.raises(ConfigError, match="150M"):
        BudgetConfig(target="3.5ms")


# The command line

SETS = [w for o in (*SMALL_DIGITS, "budget.metric=latency", "budget.batch_size=16") for w in ("--set", o)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latency") / "run"
    with pytest.MonkeyPatch.context() as patch:
        fake_clock(patch)
        assert cli.main(["train", "digits", *SETS, "--set", "budget.target=0.6", "--out", str(out)]) == 0
    return out


def test_a_run_within_a_latency_budget(run: Path) -> None:
    table, results = read_table(run / TABLE_FILE), read_results(run)
    assert table.batch_size == 16
    assert results["budget"]["metric"] == "latency"
    assert results["budget"]["target"] == pytest.approx(0.6 * results["budget"]["dense"])
    pruned = [row for row in results["rows"] if row["method"] != "dense"]
    assert pruned and all(row["cost"] <= results["budget"]["target"] for row in pruned)
    plan = read_plan(run / "pruned")
    assert plan["cost"]["latency"] <= 0.6 * plan["dense_cost"]["latency"]
    assert plan["budget"]["metric"] == "latency"
    assert "latency (ms)" in (run / "report.html").read_text()


def test_apply_and_replay_use_the_numbers_of_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLPRUNE_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(profiling, "_measure_all", None)  # would fail if it were called
    out = tmp_path / "applied"
    again = [*SETS, "--set", "model.train.epochs=1"]
    assert cli.main(["apply", str(run), "digits", *again, "--budget", "0.6", "--out", str(out)]) == 0
    assert "latency kept" in capsys.readouterr().out
    assert read_plan(out)["dense_cost"]["latency"] == read_plan(run / "pruned")["dense_cost"]["latency"]
    replayed = tmp_path / "replayed"
    assert cli.main(["apply", str(run / "pruned"), "digits", *again, "--out", str(replayed)]) == 0
    assert " ms of " in capsys.readouterr().out


def test_inspect_shows_the_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--set", f"budget.table={run / TABLE_FILE}", "--set", "budget.target=0.6"]
    assert cli.main(["inspect", "digits", *SETS, *words]) == 0
    text = capsys.readouterr().out
    assert "us/unit" in text and "batch size 16" in text and "budget: 0.6 of latency = " in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget.target=-1ms", "milliseconds"),
        ("budget.target=5M", "milliseconds"),
        ("budget.target=1e9ms", "above the dense model"),
        ("budget.target=0.000001ms", "below the feasible minimum"),
        ("budget.batch_size=0", "budget.batch_size"),
        ("budget.batch_size=8", "batch size 16"),
        ("budget.table=nowhere.json", "no such file"),
        ("model.arguments.width=5", "another architecture"),
        ("device=cuda:77", "device"),
    ],
)
def test_wrong_latency_settings_are_refused_in_one_line(
    run: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--set", f"budget.table={run / TABLE_FILE}", "--set", override]
    assert cli.main(["inspect", "digits", *SETS, *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
