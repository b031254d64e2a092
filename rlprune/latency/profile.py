"""Measures a model's latency table: every distinct layer on a grid of widths, and whole models to tie them to.

The table is kept in the cache folder by content (architecture, input, batch size, processor, threads, torch), so
that a second run on the same machine sees the same numbers.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..artifacts.documents import check_fields, read_document
from ..errors import ArtifactError, BudgetError
from ..language.linear import features, is_linear
from ..pruning.cost import AxisSize
from ..pruning.space import PruningSpace
from ..utils.arrays import Floats, Ints
from ..utils.cache import cache_folder
from ..utils.checkpoints import settings_key
from ..utils.files import exclusive, write_json_atomic
from ..utils.machine import processor
from ..utils.pytrees import Inputs, call, device_of, map_tensors, repeat
from ..utils.pytrees import batch_size as samples
from ..utils.timing import in_turns, quiet_clock, timed
from ..utils.torch_internals import BATCH_OR_INSTANCE_NORM, CONVOLUTION
from .calibrate import PARTS, WholeModels, calibrated, image_sizes
from .cost import SpaceSizes, table_cost
from .table import FORMAT, VERSION, LatencyTable, LayerTable, LayerUse, rising

TABLE_FILE = "latency_table.json"
# Part of the cache key: raise it when what or how is measured changes.
_METHOD = 7
# Layers and whole models are timed at several moments, each all the others apart: a slow one lasts for seconds.
_MOMENTS = 3
_REPEATS, _ROW_SECONDS = 7, 0.4
# Kernels compute channels in blocks of 8 (AVX2) or 16 (AVX-512 and tensor cores): time jumps from 8 to 9, so the grid
# has both sides of such steps; in a wide layer, where one block more is a small share, of some.
_BLOCKS = (8, 16)
_BOTH_SIDES = (32, 64)
_POINTS = 8
Progress = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True)
class _Layer:
    """One layer of the model as its forward pass called it."""

    module: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    dtype: torch.dtype


def with_latency(
    space: PruningSpace,
    model: nn.Module,
    example_inputs: Inputs,
    batch_size: int = 1,
    *,
    table: LatencyTable | None = None,
    progress: Progress | None = None,
) -> PruningSpace:
    """The space with a ``latency`` cost in milliseconds, from ``table`` or from one measured here and now (cached).

    Args:
        model: the dense model that ``space`` was traced from; it runs where its parameters are.
        example_inputs: one sample, (1, ...) or a nest of inputs, on the model's device.
        batch_size: samples in a forward pass.

    Raises:
        ArtifactError: the table is another model's.
        BudgetError: the batch size is unusable.
        DataError: the example holds no tensor with a batch.
    """
    if batch_size < 1:
        raise BudgetError(f"budget.batch_size: must be at least 1, got {batch_size}")
    if table is None:
        table = measured(space, model, example_inputs, batch_size, progress)
    return replace(space, costs={**space.costs, "latency": table_cost(table, space)})


def read_table(path: str | Path) -> LatencyTable:
    """The table in a JSON file; ArtifactError for a missing, damaged, foreign or newer one."""
    source = Path(path)
    document = read_document(source, FORMAT, VERSION)
    fields: dict[str, type] = {"fingerprint": str, "batch_size": int, "machine": dict, "calibration": dict}
    check_fields(document, fields | {"tables": list, "layers": list, "checks": list}, source)
    try:
        return LatencyTable.from_dict(document)
    except ArtifactError as error:
        raise ArtifactError(f"{source}: {error}") from None


def measured(
    space: PruningSpace,
    model: nn.Module,
    example_inputs: Inputs,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> LatencyTable:
    """The table of this model on this machine: the cached one, or a new one; see :func:`with_latency`."""
    inputs = repeat(example_inputs, batch_size)
    layers, sizes = _called_layers(model, inputs), SpaceSizes(space)
    planned = [_planned(layer, calls, model, sizes) for layer, calls in layers.items()]
    where = machine(device_of(inputs))
    facts = [
        VERSION,
        _METHOD,
        space.fingerprint,
        *_described(inputs),
        where,
        [p.key for p in planned],
    ]
    key = settings_key(facts)[:32]
    path = cache_folder() / "latency" / f"{key}.json"
    # Two processes would slow each other down and end with different tables: the second waits for the first.
    with exclusive(path.with_suffix(".lock")):
        if path.is_file():
            try:
                return read_table(path)
            except ArtifactError:
                path.unlink(missing_ok=True)  # a broken cache file is made again
        table = _measure_all(space, model, inputs, planned, where, progress)
        write_json_atomic(path, table.to_dict())
    return table


def _described(inputs: Inputs) -> list[object]:
    """Shapes and formats of a model's inputs, part of what a table is kept under."""
    if isinstance(inputs, Tensor):
        return [list(inputs.shape), str(inputs.dtype)]
    return [repr(map_tensors(lambda tensor: (tuple(tensor.shape), str(tensor.dtype)), inputs))]


def machine(device: torch.device) -> dict[str, Any]:
    """What a latency depends on apart from the model."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or device.type,
        "processor": processor(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


# Which layers, on which grid


def _called_layers(model: nn.Module, inputs: Inputs) -> dict[_Layer, int]:
    """The leaf modules with tensors of their own that a forward pass calls on one tensor, and how often."""
    found: dict[_Layer, int] = {}

    def hook(name: str, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            layer = _Layer(name, tuple(args[0].shape), tuple(output.shape), args[0].dtype)
            found[layer] = found.get(layer, 0) + 1

    handles = [
        module.register_forward_hook(functools.partial(hook, name))
        for name, module in model.named_modules()
        if not list(module.children()) and [*module.parameters(), *module.buffers()]
    ]
    training = model.training
    try:
        with torch.inference_mode():
            call(model.eval(), inputs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found


@dataclass(frozen=True)
class _Planned:
    """A layer, the grid that it is measured on, and the key that layers with the same table share."""

    layer: _Layer
    calls: int
    outs: Ints
    ins: Ints
    elements: float
    key: str


def _planned(layer: _Layer, calls: int, model: nn.Module, sizes: SpaceSizes) -> _Planned:
    module = model.get_submodule(layer.module)
    out, into = sizes.of(layer.module)
    weighted = is_weighted(module)
    dense_in, dense_out = _channels(module, layer.input_shape), _channels(module, layer.output_shape)
    outs, ins = _grid(out, sizes.space, dense_out), _grid(into, sizes.space, dense_in)
    elements = math.prod(layer.output_shape) / dense_out if weighted else 0.0
    shapes = [[n, list(t.shape), str(t.dtype)] for n, t in module.state_dict().items()]
    facts = [type(module).__qualname__, module.extra_repr(), shapes, layer.input_shape, str(layer.dtype)]
    key = json.dumps([*facts, outs.tolist(), ins.tolist(), elements])
    return _Planned(layer, calls, outs, ins, elements, key)


def is_weighted(module: nn.Module) -> bool:
    """Whether a layer multiplies with weights (convolution, linear), and does not just pass channels on."""
    return isinstance(module, CONVOLUTION) or is_linear(module)


def _channels(module: nn.Module, shape: Sequence[int]) -> int:
    return int(shape[_channel_dim(module, len(shape))])


def _channel_dim(module: nn.Module, dims: int) -> int:
    """The dimension of the channels: last for linear layers and layer norms, second for those of images."""
    images = (CONVOLUTION, BATCH_OR_INSTANCE_NORM, nn.GroupNorm, nn.PReLU)
    return 1 if isinstance(module, images) and dims > 1 else dims - 1


def _grid(axis: AxisSize | None, space: PruningSpace, dense: int) -> Ints:
    """Sizes at which a dimension is measured: reachable ones, denser where kernels change their pace."""
    if axis is None:
        return np.array([dense], dtype=np.int64)
    top = round(axis.constant + float(axis.slope @ space.widths))
    lowest = round(axis.constant + float(axis.slope @ space.minimums))
    step = math.gcd(*(round(s * n) for s, n in zip(axis.slope, space.steps, strict=True) if s > 0))
    # A depthwise layer of two channels takes other code than that of one.
    wanted = {lowest, lowest + step, lowest + 3 * step, top}
    for block, most in zip(_BLOCKS, _BOTH_SIDES, strict=True):
        wanted |= {size + more for size in range(block, min(top, most) + 1, block) for more in (0, 1)}
    if top > _BOTH_SIDES[-1]:
        coarse = _BLOCKS[-1]
        spread = {coarse * round(x / coarse) for x in np.linspace(_BOTH_SIDES[-1], top, _POINTS)[1:-1]}
        wanted |= {size + more for size in spread for more in (0, 1)}
        wanted -= {24, 25, 48, 49}
    # A rounding multiple leaves only its multiples within reach; a grid point is the next one above.
    reachable = {math.ceil(size / step) * step for size in wanted if lowest <= size <= top}
    return np.array(sorted({s for s in reachable if lowest <= s < top} | {lowest, top}), dtype=np.int64)


# Measuring


def _measure_all(
    space: PruningSpace,
    model: nn.Module,
    inputs: Inputs,
    planned: Sequence[_Planned],
    where: Mapping[str, object],
    progress: Progress | None,
) -> LatencyTable:
    distinct = {p.key: p for p in planned}
    unknowns = PARTS + len(image_sizes(p.elements for p in planned))
    whole, sizes = WholeModels(space, model, inputs, unknowns), SpaceSizes(space)
    shortest = {key: np.full((len(p.outs), len(p.ins)), np.inf) for key, p in distinct.items()}
    done, total = 0, _MOMENTS * len(distinct) + 1
    for _ in range(_MOMENTS):
        whole.time()
        for key, plan in distinct.items():
            shortest[key] = np.minimum(shortest[key], _layer_times(plan, model, sizes, device_of(inputs)))
            done += 1
            if progress is not None:
                progress("latency table", done, total, {})
    tables = tuple(_layer_table(plan, model, shortest[key]) for key, plan in distinct.items())
    numbers = {key: number for number, key in enumerate(distinct)}
    uses = tuple(LayerUse(p.layer.module, numbers[p.key], p.calls) for p in planned)
    raw = LatencyTable(space.fingerprint, samples(inputs), where, tables, uses)
    found = calibrated(raw, space, whole.widths, whole.milliseconds)
    if progress is not None:
        progress("latency table", total, total, {})
    return found


def _layer_times(plan: _Planned, model: nn.Module, sizes: SpaceSizes, device: torch.device) -> Floats:
    """Shortest milliseconds of a few runs at every grid point: another process can only make a run longer."""
    module = model.get_submodule(plan.layer.module)
    values = np.zeros((len(plan.outs), len(plan.ins)))
    for i, out in enumerate(plan.outs.tolist()):
        calls = {}
        for j, into in enumerate(plan.ins.tolist()):
            if out > 0 and into > 0:
                twin = replica(module, plan.layer.module, sizes, out, into)
                calls[str(j)] = timed(twin, _input(plan.layer, module, twin, out, plan.outs[-1], device))
        for column, seconds in in_turns(calls, _REPEATS, _ROW_SECONDS, 2, quiet_clock(device), 1).items():
            values[i, int(column)] = 1e3 * min(seconds)
    return values


def _layer_table(plan: _Planned, model: nn.Module, values: Floats) -> LayerTable:
    module = model.get_submodule(plan.layer.module)
    kind = f"{type(module).__name__}({module.extra_repr()}) on {'x'.join(map(str, plan.layer.input_shape))}"
    return LayerTable(kind, plan.outs, plan.ins, rising(values, plan.outs, plan.ins), plan.elements)


def replica(module: nn.Module, name: str, sizes: SpaceSizes, out: int, into: int) -> nn.Module:
    """The layer ``name`` with only ``out`` slots of its out axis and ``into`` of its in axis left.

    What nothing cuts keeps its size.
    """
    axes = sizes.layers.get(name)
    memo: dict[int, Any] = {}
    cut: dict[int, int] = {}
    if axes is not None:
        cut = {axes.into: into, axes.out: out}
    for tensor_name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        new = tensor.detach()
        for c in sizes.space.cuts:
            if c.tensor == f"{name}.{tensor_name}":
                new = new.narrow(c.dim, 0, cut.get(c.axis, out))
        new = new.clone(memory_format=torch.contiguous_format)
        memo[id(tensor)] = nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new
    twin = copy.deepcopy(module, memo)
    for rule in sizes.space.attribute_rules:
        if rule.module == name:
            rule.assign(twin, rule.attribute, rule.factor * _size(rule.axis, cut, sizes))
    return twin.eval()


def _size(axis: int, cut: Mapping[int, int], sizes: SpaceSizes) -> int:
    """Size of an axis; that of a grouped convolution's inputs is its weight's times the number of groups."""
    if axis in cut:
        return cut[axis]
    mine, widths = sizes.axes[axis], sizes.space.widths
    for other, size in cut.items():
        if other >= 0 and _parallel(mine, sizes.axes[other]):
            return round(size * float(mine.slope @ widths) / float(sizes.axes[other].slope @ widths))
    return round(mine.constant + float(mine.slope @ widths))


def _parallel(a: AxisSize, b: AxisSize) -> bool:
    return bool(((a.slope > 0) == (b.slope > 0)).all())


def _input(
    layer: _Layer, module: nn.Module, twin: nn.Module, out: int, dense_out: int, device: torch.device
) -> Tensor:
    """An input of the dense shape, with as many channels as the replica takes."""
    shape = list(layer.input_shape)
    if not layer.dtype.is_floating_point:
        return torch.zeros(shape, dtype=layer.dtype, device=device)
    dim = _channel_dim(module, len(shape))
    if is_linear(module):
        shape[dim] = features(twin)[0]
    elif isinstance(module, CONVOLUTION):
        assert isinstance(twin, CONVOLUTION)
        shape[dim] = twin.in_channels
    else:
        shape[dim] = round(shape[dim] * out / dense_out)
    return torch.randn(shape, device=device).to(layer.dtype)
