"""Latency tables of real models: what is measured, the calibration, the cache, and damaged files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from helpers.fake_clock import called, fake_clock, fake_seconds
from helpers.lm import tiny_lm
from helpers.nets import NETS, build, example
from helpers.tasks import made
from rlprune.api import trace
from rlprune.errors import ArtifactError, BudgetError
from rlprune.latency import calibrate as calibration
from rlprune.latency import profile as profiling
from rlprune.latency.cost import TableCost, table_cost
from rlprune.latency.profile import read_table, with_latency
from rlprune.latency.table import Calibration, LatencyTable, LayerTable
from rlprune.pruning.plan import Plan
from rlprune.pruning.surgery import prune


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_clock(monkeypatch)
    monkeypatch.setenv("RLPRUNE_CACHE", str(tmp_path / "cache"))


def any_widths(space: Any, seed: int) -> np.ndarray:
    shares = np.random.default_rng(seed).random(len(space.groups))
    return space.limits.floor(space.minimums + shares * (space.widths - space.minimums))


def built(model: nn.Module, space: Any, widths: np.ndarray) -> nn.Module:
    return prune(model, Plan(space, widths, tuple(np.arange(w) for w in widths)))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "resnet18" else n for n in (*NETS, "llama", "gpt2")],
)
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


class Early(nn.Module):
    """A pooling after the first layer, which a sum over the output elements of all layers alike does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.last = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.first(x).relu(), 4)
        return self.last(self.second(x).relu().mean((2, 3)))


def test_functions_between_layers_are_told_apart_by_the_size_of_the_image(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_clock(monkeypatch)
    monkeypatch.setenv("RLPRUNE_CACHE", str(tmp_path))
    pooled = 1e-3  # ms of each element that the pooling reads

    def measure(models: Any, inputs: Any, sizes: Any, *_: Any, **__: Any) -> Any:
        def ms(model: nn.Module) -> float:
            return (
                1e3 * sum(map(fake_seconds, called(model, inputs))) + pooled * 256 * model.first.out_channels
            )

        return {name: {sizes[0]: ms(model)} for name, model in models.items()}

    monkeypatch.setattr(calibration, "measure", measure)
    model, inputs = Early(), torch.randn(1, 3, 16, 16)
    space = with_latency(trace(model, inputs), model, inputs)
    for first, second in ((2, 12), (12, 2), (6, 6)):
        widths = np.array([first if g.name == "first" else second for g in space.groups])
        small = built(model, space, widths)
        expected = measure({"": small}, inputs, (1,))[""][1]
        assert space.cost(widths, "latency") == pytest.approx(expected, rel=0.05)
    slopes = space.costs["latency"].table.calibration.element
    assert slopes[256.0] == pytest.approx(pooled, rel=0.1)


@pytest.mark.parametrize("moment", range(3))
def test_a_slow_moment_does_not_reach_the_table(
    moment: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_clock(monkeypatch)
    monkeypatch.setenv("RLPRUNE_CACHE", str(tmp_path))
    model, inputs, space = tiny()
    quiet = with_latency(space, model, inputs).costs["latency"].table
    layers, whole, calls = profiling._layer_times, calibration.measure, {"layers": 0, "whole": 0}

    def slow_layers(*args: Any) -> Any:
        now = calls["layers"] // len(quiet.tables)
        calls["layers"] += 1
        return layers(*args) * (2.0 if now == moment else 1.0)

    def slow_models(*args: Any, **settings: Any) -> Any:
        slowness = 2.0 if calls["whole"] == moment else 1.0
        calls["whole"] += 1
        found = whole(*args, **settings)
        return {name: {size: slowness * ms for size, ms in times.items()} for name, times in found.items()}

    monkeypatch.setattr(profiling, "_layer_times", slow_layers)
    monkeypatch.setattr(calibration, "measure", slow_models)
    monkeypatch.setenv("RLPRUNE_CACHE", str(tmp_path / "again"))
    busy = with_latency(space, model, inputs).costs["latency"].table
    assert calls == {"layers": 3 * len(quiet.tables), "whole": 3}
    assert busy.to_dict() == quiet.to_dict()


def test_there_are_twice_as_many_whole_models_as_unknowns(no_clock: None) -> None:
    model, inputs = build("Residual", torch.float32), example(torch.float32)[:1]
    space = trace(model, inputs)
    assert len(calibration.WholeModels(space, model, inputs, 5).widths) == 24
    assert len(calibration.WholeModels(space, model, inputs, 20).widths) == 40


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


BEYOND = "1e999"  # a JSON number that float64 has no room for


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
    elif change == "infinite":
        found["calibration"]["constant"] = BEYOND
    elif change == "nothing":
        found["calibration"]["dense"] = 0
    elif change == "null":
        found["calibration"]["weighted"] = None
    elif change == "elements":
        found["tables"][0]["elements"] = BEYOND
    elif change == "too long":
        found["calibration"]["dense"] = 10**400
    elif change == "too wide":
        found["tables"][0]["outs"] = [1, 10**30]
    elif change == "text":
        found["tables"][0]["ins"] = ["three"]
    elif change == "missing":
        del found["machine"]
    elif change == "newer":
        found["version"] = 99
    return found


def test_a_table_of_version_1_is_read(tmp_path: Path) -> None:
    document = broken("")
    document["version"] = 1
    del document["calibration"]["dense"]
    document["calibration"]["element"] = 0.5
    document["tables"] += [document["tables"][0] | {"elements": e} for e in (16.0, 0.0)]
    (tmp_path / "t.json").write_text(json.dumps(document))
    # One number for all weighted layers' elements; layers without any had none then, either.
    assert read_table(tmp_path / "t.json").calibration == Calibration(element={1.0: 0.5, 16.0: 0.5})


# The reason that a person sees, for each damage.
DAMAGES = {
    "falls": "never fall",
    "grid": "does not fit",
    "layer": "without a table",
    "negative": "is negative",
    "infinite": "too large a number",
    "nothing": "more than 0 ms",
    "null": "damaged",
    "elements": "too large a number",
    "too long": "too large a number",
    "too wide": "damaged",
    "text": "damaged",
    "missing": "machine",
    "newer": "version",
}


@pytest.mark.parametrize("change", DAMAGES)
def test_a_damaged_table_is_refused_in_one_line(change: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(broken("")))
    assert read_table(tmp_path / "t.json").tables[0].outs.tolist() == [1, 2]
    (tmp_path / "t.json").write_text(json.dumps(broken(change)).replace(f'"{BEYOND}"', BEYOND))
    with pytest.raises(ArtifactError, match=f"t.json.*{DAMAGES[change]}") as error:
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


@pytest.mark.parametrize("kind", ["two inputs", "named inputs", "detection"])
def test_inputs_of_any_kind_are_timed(kind: str, no_clock: None) -> None:
    workload = made(kind)
    example = workload.example_inputs
    space = with_latency(trace(workload.model, example), workload.model, example, batch_size=2)
    table = space.costs["latency"].table
    assert table.batch_size == 2
    assert space.cost(np.maximum(space.widths // 2, 1), "latency") < space.dense_cost("latency")
