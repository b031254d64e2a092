"""Prove that cutting is exact: cut models of random widths against the masked dense model, in float64."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import GraphError, first_line
from ..pruning.cost_terms import layer_ratios
from ..pruning.plan import Plan
from ..pruning.space import PruningSpace
from ..pruning.surgery import masked_in_place, prune
from ..utils.arrays import Ints
from ..utils.modes import refresh
from ..utils.pytrees import Inputs, batch_size, call, tensors, to_double
from .counting import flop_counter, layer_macs, without_fused_kernels, wrong_layer
from .process import Limits

# float64 sums in another order differ by this much, relative to the largest output.
_EXACT = 1e-8
_SMALL = (
    1e-4  # outputs below it are compared as if they were as large: they may be differences of larger numbers
)

# Comparisons of one search after which a set of groups that is wrong is left out whole. A number, not a time: the space
# of a model must not depend on how busy the machine is.
_PATIENCE = 100


class Proof:
    """Cuts a copy of the model, whose weights it changes, and compares; see DESIGN, contract 2.

    Args:
        twin: the copy; it becomes a float64 model with lively norm layers.
        inputs: example inputs; outputs are compared on all of them, costs on the first.
    """

    def __init__(self, twin: nn.Module, inputs: Sequence[Inputs], limits: Limits) -> None:
        self._twin = _scrambled(twin)
        self._inputs = [to_double(example) for example in inputs]
        self._limits = limits
        self._compared = 0
        self._rng = np.random.default_rng(0)
        try:
            with _doubles(), torch.no_grad():
                call(self._twin, self._inputs[0])
        except Exception as error:
            what = f"{type(twin).__name__} does not run in float64, in which cuts are proved"
            raise GraphError(f"{what}: {first_line(error)}") from error

    def wrong(self, space: PruningSpace) -> dict[int, str]:
        """Groups of which a cut is not exact: {index: reason}; those that are not ``exact`` only have to run.

        Tried are the smallest widths, the last unit gone, random widths of which some are whole, and either half of the
        groups alone.
        """
        # Attention last: those groups that fail, fail together.
        exact = [i for i, group in enumerate(space.groups) if group.exact]
        exact.sort(key=lambda i: space.groups[i].kind == "attention")
        rest = [i for i, group in enumerate(space.groups) if not group.exact]
        found: dict[int, str] = {}
        self._compared = 0
        for groups in (exact, rest):
            for make in (_least, _last, _random, _even, _odd) if groups else ():
                plan = make(space, groups, self._rng)
                if self._search(space, plan, groups, found):
                    break
        return found

    def still_wrong(self, space: PruningSpace, wrong: Mapping[int, str]) -> set[str]:
        """Why groups that were wrong are so in another space of the same groups; empty where one of them is mended.

        Each is cut alone, and of groups that repeat only the first is tried.
        """
        first = {_pattern(space.groups[i].name): i for i in sorted(wrong, reverse=True)}
        reasons = set()
        for index in first.values():
            reason = self._difference(space, _least(space, [index], self._rng), [index])
            if reason is None:
                return set()
            reasons.add(reason)
        return reasons

    def _search(self, space: PruningSpace, plan: Plan, groups: Sequence[int], found: dict[int, str]) -> bool:
        """Find the wrong ones in a plan by halves; True where there was one.

        Blocks repeat: where the first and the last of groups of one kind are wrong in the same way, all of them count
        as wrong. After many comparisons a whole that is wrong is not searched any further, so that the search ends.
        """
        reason = self._difference(space, _restricted(space, plan, groups), groups)
        if reason is None:
            return False
        if len(groups) == 1:
            found[groups[0]] = reason
            return True
        alike = len({_pattern(space.groups[i].name) for i in groups}) == 1
        if self._compared > _PATIENCE or (alike and self._all_alike(space, plan, groups, reason)):
            found |= dict.fromkeys(groups, reason)
            return True
        middle = len(groups) // 2
        seen = [self._search(space, plan, half, found) for half in (groups[:middle], groups[middle:])]
        if not any(seen):
            self._together(space, plan, groups, found)
        return True

    def _all_alike(self, space: PruningSpace, plan: Plan, groups: Sequence[int], reason: str) -> bool:
        """Whether the first and the last of several groups are wrong alone, for one reason."""
        if len(groups) < 4:
            return False
        ends = [self._difference(space, _restricted(space, plan, [i]), [i]) for i in (groups[0], groups[-1])]
        return all(end is not None and _pattern(end) == _pattern(reason) for end in ends)

    def _together(
        self, space: PruningSpace, plan: Plan, groups: Sequence[int], found: dict[int, str]
    ) -> None:
        """Each half is exact and both are not: leave out what breaks the rest, one by one."""
        fine: list[int] = []
        for index in groups:
            several = [*fine, index]
            reason = self._difference(space, _restricted(space, plan, several), several)
            if reason is None:
                fine.append(index)
            else:
                found[index] = f"together with other groups: {reason}"

    def _difference(self, space: PruningSpace, plan: Plan, groups: Sequence[int]) -> str | None:
        """Why a cut is not the masked dense model, or None when it is."""
        self._limits.check()
        self._compared += 1
        values = all(space.groups[i].exact for i in groups)
        for number, inputs in enumerate(self._inputs):
            try:
                refresh(self._twin)
                slim = prune(self._twin, plan)
                with flop_counter() as counter:
                    got = self._outputs(slim, inputs, space)
            except GraphError:
                raise
            except Exception as error:
                return f"the cut model fails: {first_line(error)}"
            refresh(self._twin)
            with masked_in_place(self._twin, plan), flop_counter() as dense_counter:
                wanted = self._outputs(self._twin, inputs, space)
            reason = _unlike(got, wanted, values)
            if reason is None and number == 0:
                batch = batch_size(inputs)
                counts = (_Count(counter, slim, batch), _Count(dense_counter, self._twin, batch))
                reason = _uncounted(*counts, space, plan)
            if reason is not None:
                return reason
        return None

    def _outputs(self, model: nn.Module, inputs: Inputs, space: PruningSpace) -> _Outputs:
        inside: list[Tensor] = []
        modules = dict(model.named_modules())
        handles = [
            modules[name].register_forward_hook(lambda m, i, output: inside.extend(tensors(output)))
            for name, reason in space.protected.items()
            if name in modules and " channels: " not in reason
        ]
        try:
            # Equal draws for both models, numbers of one format, and nothing drawn from the caller's state.
            with torch.random.fork_rng(devices=[]), _doubles(), torch.no_grad(), without_fused_kernels():
                torch.manual_seed(0)
                returned = call(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        found = isinstance(returned, list) and all(isinstance(item, dict) for item in returned)
        return _Outputs(list(tensors(returned)), inside, found)


@dataclass(frozen=True)
class _Outputs:
    """What a model returns, what its protected layers give, and whether it returns what a detector found."""

    returned: list[Tensor]
    inside: list[Tensor]
    detections: bool


def _scrambled(twin: nn.Module) -> nn.Module:
    """The copy in float64 with lively norm layers: zero biases, gains or weights would hide a wrong cut."""
    generator = torch.Generator().manual_seed(0)
    twin = twin.double().requires_grad_(False)
    with torch.no_grad():
        for name, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
            if not tensor.is_floating_point() or tensor.numel() < 2:
                continue
            vector = tensor.numel() == max(tensor.shape)
            if not vector and not bool((tensor == tensor.flatten()[0]).all()):
                continue  # weights that are drawn already
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
            centred = name.endswith(("bias", "running_mean"))
            tensor.copy_(0.2 * (noise - 0.5) if centred or not vector else 0.5 + noise)
    return twin


def _pattern(words: str) -> str:
    """A layer's name or a reason without its numbers: the same for all blocks that repeat."""
    return re.sub(r"\d+", "N", words)


def _plan(space: PruningSpace, widths: Ints, rng: np.random.Generator) -> Plan:
    """Random units of these widths."""
    kept = tuple(
        np.sort(rng.permutation(group.width)[:width])
        for group, width in zip(space.groups, widths, strict=True)
    )
    return Plan(space, widths, kept)


def _restricted(space: PruningSpace, plan: Plan, groups: Sequence[int]) -> Plan:
    """The plan for some groups, the others whole."""
    kept = [np.arange(width) for width in space.widths]
    for index in groups:
        kept[index] = plan.kept[index]
    return Plan(space, np.array([len(units) for units in kept], dtype=np.int64), tuple(kept))


def _least(space: PruningSpace, groups: Sequence[int], rng: np.random.Generator) -> Plan:
    widths = space.widths.copy()
    widths[list(groups)] = 1
    return _plan(space, widths, rng)


def _random(space: PruningSpace, groups: Sequence[int], rng: np.random.Generator) -> Plan:
    widths = space.widths.copy()
    chosen = list(groups)
    widths[chosen] = rng.integers(1, widths[chosen] + (len(chosen) > 1))
    return _plan(space, widths, rng)


def _even(space: PruningSpace, groups: Sequence[int], rng: np.random.Generator) -> Plan:
    return _random(space, groups[::2], rng)


def _odd(space: PruningSpace, groups: Sequence[int], rng: np.random.Generator) -> Plan:
    """One half without the first units of its groups."""
    return _without(space, groups[1::2], 0)


def _last(space: PruningSpace, groups: Sequence[int], rng: np.random.Generator) -> Plan:
    """Without the last unit: what wraps around, or is counted from the end, shows there."""
    return _without(space, groups, -1)


def _without(space: PruningSpace, groups: Sequence[int], unit: int) -> Plan:
    kept = [np.arange(width) for width in space.widths]
    for index in groups:
        kept[index] = np.delete(kept[index], unit)
    return Plan(space, np.array([len(units) for units in kept], dtype=np.int64), tuple(kept))


@contextlib.contextmanager
def _doubles() -> Iterator[None]:
    """What a model makes in its forward pass is in float64 as well."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _unlike(got: _Outputs, wanted: _Outputs, values: bool) -> str | None:
    """Why outputs are not equal. Of a detector its heads are compared: which of two equal boxes it keeps is chance, and
    where it finds nothing there is nothing else."""
    if not wanted.detections and any(tensor.numel() for tensor in wanted.returned):
        return _unequal(got.returned, wanted.returned, values)
    # What comes after a choice among boxes has a row for each of them.
    maps = [[t for t in outputs.inside if t.ndim > 2] or outputs.inside for outputs in (got, wanted)]
    if not maps[1]:
        return "there is no output to compare"
    return _unequal(maps[0], maps[1], values)


def _unequal(got: Sequence[Tensor], wanted: Sequence[Tensor], values: bool) -> str | None:
    if len(got) != len(wanted):
        return "the cut model returns another number of outputs"
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape:
            return "part of the model's output"
        if values and not _close(a, b):
            return "the cut model differs from the masked dense model"
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    if not b.is_floating_point():
        return torch.equal(a, b)
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite):
        return False
    a, b = a[finite], b[finite]
    largest = float(b.abs().max()) if b.numel() else 0.0
    return bool(torch.allclose(a, b, rtol=0.0, atol=_EXACT * max(_SMALL, largest)))


@dataclass(frozen=True)
class _Count:
    """What was counted in a forward pass of a model."""

    counter: FlopCounterMode
    model: nn.Module
    batch: int

    @property
    def macs(self) -> float:
        return float(self.counter.get_total_flops() / 2 / self.batch)

    @property
    def params(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def layers(self) -> dict[str, float]:
        return layer_macs(self.counter, self.model, self.batch)


def _uncounted(slim: _Count, masked: _Count, space: PruningSpace, plan: Plan) -> str | None:
    """Why costs are not what the formula says, or None when they are."""
    if slim.params != space.cost(plan.widths, "params"):
        return "its params do not follow the formula"
    if math.isclose(slim.macs, space.cost(plan.widths, "macs"), rel_tol=1e-12):
        return None
    if not math.isclose(masked.macs, space.dense_cost("macs"), rel_tol=1e-12):
        # How much there is to do depends on what the model finds, so each layer is held to its share of it.
        ratios = layer_ratios(space, plan.widths, "macs")
        if wrong_layer(slim.layers(), masked.layers(), ratios) is None:
            return None
    return "its macs do not follow the formula"
