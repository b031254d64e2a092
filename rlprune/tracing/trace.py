"""Find the groups of a model by its dependency graph, and prove on the spot that cutting them is exact."""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config.config import PruneConfig
from ..errors import GraphError, first_line, near_miss
from ..pruning.plan import Plan
from ..pruning.space import PruningSpace, fingerprint
from ..pruning.surgery import masked, prune
from ..utils.arrays import Ints
from ..utils.torch_internals import CONVOLUTION
from .counting import flop_counter
from .graph import (
    MIXERS,
    ChannelGraph,
    ExampleInputs,
    channel_graph,
    run,
    tensors,
    trainable_copy,
    unused_modules,
)
from .layout import Call, Layout

# float64 sums in another order differ by this much, relative to the largest output.
_EXACT = 1e-8


class UnusedModuleWarning(UserWarning):
    """Parts of the model take no part in its forward pass in eval mode, so they cannot follow a cut."""


@dataclass(frozen=True)
class TraceOptions:
    """What may be cut and how far a trace may go; the fields are the arguments of `rlprune.trace`."""

    ignore: Sequence[str] = ()
    round_to: int = 1
    minimum: int = 1
    verify: bool = True
    max_seconds: float = 120.0
    max_memory_gb: float = 8.0
    drop: bool = False
    hidden: bool = False

    @classmethod
    def of(cls, settings: PruneConfig) -> TraceOptions:
        """What section ``prune`` says: every command finds, or refuses, the same groups."""
        return cls(
            ignore=settings.ignore,
            round_to=settings.round_to,
            minimum=settings.minimum,
            drop=settings.drop,
            hidden=settings.hidden,
        )


def trace_channels(model: nn.Module, example_inputs: ExampleInputs, options: TraceOptions) -> PruningSpace:
    """Find the channels of ``model`` that can be pruned, by its dependency graph; see `rlprune.trace`."""
    twin = trainable_copy(model)
    calls, total_macs = _measure(twin, example_inputs)
    graph = channel_graph(
        twin, example_inputs, max_seconds=options.max_seconds, max_memory_gb=options.max_memory_gb
    )
    fixed = _ignored(graph, twin, options.ignore)
    unused = unused_modules(twin, calls, example_inputs)
    if unused:
        warnings.warn(
            f"{', '.join(unused)}: not used by the forward pass in eval mode; left as it is and not cut with "
            "the layers before it (set it to None before training the pruned model)",
            UnusedModuleWarning,
            stacklevel=4,
        )
    mark = fingerprint(model)
    shape = tuple(example_inputs.shape) if isinstance(example_inputs, Tensor) else None
    while True:
        layout = Layout(twin, graph, calls, total_macs, fixed)
        space = layout.space(mark, unused, options.round_to, options.minimum, shape)
        if not space.groups:
            reasons = [f"{name!r}: {why}" for name, why in space.protected.items()]
            raise GraphError(f"no layer of {type(model).__name__} can be pruned; " + "; ".join(reasons[:3]))
        if not options.verify:
            return space
        wrong = _inexact_groups(_scrambled(twin), example_inputs, space)
        if not wrong:
            return space
        for index, reason in wrong.items():
            fixed |= dict.fromkeys(layout.class_groups[index], reason)


def count_macs(model: nn.Module, example_inputs: ExampleInputs) -> float:
    """Multiply-accumulates of one sample: half of what torch's FLOP counter finds."""
    with flop_counter() as counter:
        run(model, example_inputs)
    return counter.get_total_flops() / 2 / _batch_size(example_inputs)


def _batch_size(example_inputs: ExampleInputs) -> int:
    for tensor in tensors(example_inputs):
        if tensor.ndim:
            return int(tensor.shape[0])
    raise GraphError("example_inputs: holds no tensor with a batch dimension")


def _measure(model: nn.Module, example_inputs: ExampleInputs) -> tuple[dict[nn.Module, Call], float]:
    """One forward pass: the order of the layers, the MACs per weight element, the total MACs."""
    batch = _batch_size(example_inputs)
    order: dict[nn.Module, int] = {}
    reuse: dict[nn.Module, float] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        order.setdefault(module, len(order))
        if not isinstance(module, MIXERS):
            return
        if isinstance(module, CONVOLUTION):
            seen = inputs[0] if module.transposed else output
            each: float = math.prod(seen.shape[2:])
        else:
            each = output.numel() / output.shape[-1] / batch
        reuse[module] = reuse.get(module, 0.0) + each

    handles = [m.register_forward_hook(note) for m in model.modules()]
    try:
        total = count_macs(model, example_inputs)
    except GraphError:
        raise
    except Exception as error:
        what = f"the forward pass of {type(model).__name__} failed on the example input"
        raise GraphError(f"{what}: {first_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    return {m: Call(place, reuse.get(m, 0.0)) for m, place in order.items()}, total


def _ignored(graph: ChannelGraph, model: nn.Module, patterns: Sequence[str]) -> dict[int, str]:
    if isinstance(patterns, str):
        raise GraphError(f"ignore: {patterns!r} is one string; give a list of layer names or patterns")
    names = [name for name, _ in model.named_modules() if name]
    fixed: dict[int, str] = {}
    for pattern in patterns:
        hits = {n for n in names if fnmatch.fnmatchcase(n, pattern) or n.startswith(pattern + ".")}
        if not hits:
            raise GraphError(f"ignore: no layer matches {pattern!r}{near_miss(pattern, names)}")
        for side in graph.sides:
            if side.name in hits and side.role != "in":
                fixed |= {int(n): f"ignored by {pattern!r}" for n in side.classes}
    return fixed


def _scrambled(twin: nn.Module) -> nn.Module:
    """The copy in float64 with lively norm layers: zero biases or gains would hide a wrong cut."""
    generator = torch.Generator().manual_seed(0)
    twin = twin.double()
    with torch.no_grad():
        for name, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
            if (
                not tensor.is_floating_point()
                or tensor.numel() != max([*tensor.shape, 1])
                or tensor.numel() < 2
            ):
                continue
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
            centred = name.endswith(("bias", "running_mean"))
            tensor.copy_(0.2 * (noise - 0.5) if centred else 0.5 + noise)
    return twin


def _inexact_groups(twin: nn.Module, example_inputs: ExampleInputs, space: PruningSpace) -> dict[int, str]:
    """Groups whose random cut differs from the masked dense model: {index: reason}."""
    inputs = _double(example_inputs)
    rng = np.random.default_rng(0)
    everything = range(len(space.groups))
    if _difference(twin, inputs, space, _random_plan(space, everything, rng)) is None:
        return {}
    wrong: dict[int, str] = {}
    for index in everything:
        reason = _difference(twin, inputs, space, _random_plan(space, [index], rng))
        if reason is not None:
            wrong[index] = reason
    if not wrong:
        raise GraphError(
            f"cutting {space.groups[0].name!r} and other groups together is not exact, each alone is; not supported"
        )
    return wrong


def _random_plan(space: PruningSpace, groups: Sequence[int] | range, rng: np.random.Generator) -> Plan:
    widths = space.widths.copy()
    kept: list[Ints] = [np.arange(w) for w in widths]
    for index in groups:
        widths[index] = rng.integers(1, widths[index])
        kept[index] = np.sort(rng.permutation(len(kept[index]))[: widths[index]])
    return Plan(space, widths, tuple(kept))


def _difference(twin: nn.Module, inputs: ExampleInputs, space: PruningSpace, plan: Plan) -> str | None:
    """Why the cut model is not the masked dense one, or None when it is."""
    slim = prune(twin, plan)
    try:
        macs = count_macs(slim, inputs)
        with torch.no_grad():
            got = list(_outputs(run(slim, inputs)))
            wanted = list(_outputs(run(masked(twin, plan), inputs)))
    except Exception as error:
        return f"the cut model fails: {first_line(error)}"
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape:
            return "part of the model's output"
        if not torch.allclose(a, b, rtol=0.0, atol=_EXACT * max(1.0, float(b.abs().max()))):
            return "the cut model differs from the masked dense model"
    params = sum(p.numel() for p in slim.parameters())
    for metric, value in (("macs", macs), ("params", params)):
        if not math.isclose(value, space.cost(plan.widths, metric), rel_tol=1e-12):
            return f"its {metric} do not follow the formula"
    return None


def _outputs(value: object) -> Iterator[Tensor]:
    if hasattr(value, "to_tuple"):
        value = value.to_tuple()
    yield from (t for t in tensors(value) if t.is_floating_point())


def _double(value: object) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {k: _double(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_double(v) for v in value)
    return value
