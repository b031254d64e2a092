"""Find the groups of a model by its dependency graph, and prove on the spot that cutting them is exact."""

from __future__ import annotations

import fnmatch
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config.config import AUTO, PruneConfig
from ..config.names import RUNTIMES
from ..errors import BudgetError, ConfigError, GraphError, RlpruneError, described, first_line, near_miss
from ..pruning.space import PruningSpace, fingerprint
from ..utils.modes import refresh
from ..utils.pytrees import batch_size, call, map_tensors, to_device
from ..utils.torch_internals import copied
from .collecting import collected
from .counting import flop_counter
from .flow import Interruptible
from .following import followed, unused_modules
from .graph import ChannelGraph, ExampleInputs
from .guesses import Guesses
from .layout import Layout
from .process import Limits, in_child, in_place
from .proof import Proof
from .untraceable import untraceable

# Seconds of a forward pass from which on a trace, which takes dozens of them, gets a process that can be killed.
_LONG_PASS = 0.2


class BranchWarning(UserWarning):
    """What the model runs depends on the data: only branches that the example inputs take can be proved."""


class UnusedModuleWarning(UserWarning):
    """Parts of the model take no part in its forward pass in eval mode, so they cannot follow a cut."""


@dataclass(frozen=True)
class TraceOptions:
    """What may be cut and how far a trace may go; the fields are the arguments of `rlprune.trace`."""

    ignore: Sequence[str] = ()
    round_to: int | str = AUTO
    minimum: int = 1
    verify: bool = True
    max_seconds: float = 120.0
    max_memory_gb: float = 8.0
    drop: bool = False
    hidden: bool = False
    inexact: bool = False
    runtime: str = "any"

    def __post_init__(self) -> None:
        if isinstance(self.round_to, str) and self.round_to != AUTO:
            raise BudgetError(
                f"prune.round_to: {self.round_to!r} is no whole number of 1 and more; allowed: one, or {AUTO}"
            )
        if not RUNTIMES.knows(self.runtime):
            hint = near_miss(self.runtime, RUNTIMES)
            raise ConfigError(f"prune.runtime: {self.runtime!r} is not one of {', '.join(RUNTIMES)}{hint}")

    @property
    def multiple(self) -> int | None:
        """The multiple that was asked for; None: the kind of model says it."""
        return self.round_to if isinstance(self.round_to, int) else None

    @classmethod
    def of(cls, settings: PruneConfig) -> TraceOptions:
        """What section ``prune`` says: every command finds, or refuses, the same groups."""
        return cls(
            ignore=settings.ignore,
            round_to=settings.round_to,
            minimum=settings.minimum,
            drop=settings.drop,
            hidden=settings.hidden,
            inexact=settings.inexact,
            runtime=settings.runtime,
        )


def trace_channels(model: nn.Module, example_inputs: ExampleInputs, options: TraceOptions) -> PruningSpace:
    """Find the channels of ``model`` that can be pruned, by its dependency graph; see `rlprune.trace`."""
    reason = untraceable(model)
    if reason:
        raise GraphError(reason)
    limits = Limits(f"tracing {type(model).__name__}", options.max_seconds, options.max_memory_gb)
    inputs = to_device(example_inputs, torch.device("cpu"))
    try:
        twin = copied(model).eval().cpu()
    except Exception as error:
        raise GraphError(f"{type(model).__name__} cannot be copied: {described(error)}") from error
    started = time.monotonic()
    try:
        with Interruptible(limits):
            total = count_macs(twin, inputs)
    except RlpruneError:
        raise
    except Exception as error:
        what = f"the forward pass of {type(model).__name__} failed on the example input"
        raise GraphError(f"{what}: {first_line(error)}") from error
    tracer = _Tracer(twin, inputs, total, fingerprint(model), options, limits)
    # What is over in a moment needs no process of its own; it is stopped between its operations.
    return in_child(limits, tracer) if time.monotonic() - started > _LONG_PASS else in_place(tracer)


@dataclass(frozen=True)
class _Tracer:
    """One trace of a copy of a model, whose weights it changes."""

    twin: nn.Module
    example_inputs: ExampleInputs
    macs: float
    fingerprint: str
    options: TraceOptions
    limits: Limits

    def __call__(self) -> PruningSpace:
        inputs = [self.example_inputs, *_other_branches(self.twin, self.example_inputs, self.limits)]
        refresh(self.twin)
        flow = followed(self.twin, inputs, batch_size(self.example_inputs), self.limits)
        unused = unused_modules(self.twin, flow)
        if unused:
            warnings.warn(
                f"{', '.join(unused)}: not used by the forward pass in eval mode; left as it is and not cut with "
                "the layers before it (set it to None before training the pruned model)",
                UnusedModuleWarning,
                stacklevel=6,
            )
        graph = collected(self.twin, flow)
        fixed = _ignored(graph, self.twin, self.options.ignore)
        proof = Proof(self.twin, inputs, self.limits) if self.options.verify else None
        guesses = Guesses(graph.sizes, proof is not None)
        while True:
            layout = Layout(self.twin, graph, self.macs, fixed, guesses.sizes(), self.options.inexact)
            space = self._space(layout, unused)
            wrong = {} if proof is None else proof.wrong(space)
            if proof is None or not wrong:
                return space
            classes = {n for index in wrong for n in layout.class_groups[index]}
            reasons = set(wrong.values())
            # Which attributes follow the groups is tried on few of them; the groups themselves stay the same.
            while changed := guesses.change(classes, reasons):
                layout = Layout(self.twin, graph, self.macs, fixed, guesses.sizes(), self.options.inexact)
                reasons = proof.still_wrong(self._space(layout, unused), wrong)
                if not reasons:
                    break
            if not changed:
                for index, reason in wrong.items():
                    fixed |= dict.fromkeys(layout.class_groups[index], reason)

    def _space(self, layout: Layout, unused: tuple[str, ...]) -> PruningSpace:
        inputs, options = self.example_inputs, self.options
        shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else None
        # No layer of an image model is slower or larger for a width that is no multiple (mkldnn and cuDNN pad), and
        # budgets are met more closely.
        space = layout.space(self.fingerprint, unused, options.multiple or 1, options.minimum, shape)
        if not space.groups:
            reasons = [f"{name!r}: {why}" for name, why in space.protected.items()]
            kind = type(self.twin).__name__
            raise GraphError(f"no layer of {kind} can be pruned; " + "; ".join(reasons[:3]))
        return space


def count_macs(model: nn.Module, example_inputs: ExampleInputs) -> float:
    """Multiply-accumulates of one sample: half of what torch's FLOP counter finds."""
    with flop_counter() as counter:
        call(model, example_inputs)
    return counter.get_total_flops() / 2 / batch_size(example_inputs)


def _other_branches(model: nn.Module, example_inputs: ExampleInputs, limits: Limits) -> list[ExampleInputs]:
    """Variants of the example input on which other modules run: a branch that depends on the data."""
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        drawn = torch.randn(tensor.shape, generator=generator).to(tensor)
        return drawn if tensor.is_floating_point() else tensor

    def opposite(tensor: Tensor) -> Tensor:
        return -tensor if tensor.is_floating_point() else tensor

    seen = [_called(model, example_inputs, limits)]
    found = []
    for change in (opposite, noise):
        other = map_tensors(change, example_inputs)
        try:
            modules = _called(model, other, limits)
        except GraphError:
            raise
        except Exception:  # not every model takes every number
            continue
        if modules not in seen:
            seen.append(modules)
            found.append(other)
    if found:
        everywhere = seen[0].intersection(*seen)
        some = sorted(seen[0].union(*seen) - everywhere)
        warnings.warn(
            f"{', '.join(some)}: run for some inputs only; the branches that were seen are cut and proved, "
            "others are not",
            BranchWarning,
            stacklevel=5,
        )
    return found


def _called(model: nn.Module, inputs: ExampleInputs, limits: Limits) -> set[str]:
    """Names of the modules that a forward pass runs."""
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda m, i, name=name: called.add(name))
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad(), Interruptible(limits):
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return called


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
