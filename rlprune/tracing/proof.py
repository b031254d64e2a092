"""Prove that cutting is exact: cut models of random widths beside the masked dense model, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import first_line
from ..pruning.plan import Plan
from ..pruning.space import PruningSpace
from ..pruning.surgery import masked_in_place, prune
from ..utils.arrays import Ints
from ..utils.modes import refresh
from ..utils.pytrees import Inputs, batch_size, call, tensors, to_double
from .counting import flop_counter
from .process import Limits

# float64 sums in another order differ by this much, relative to the largest output.
_EXACT = 1e-8


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
        self._rng = np.random.default_rng(0)

    def wrong(self, space: PruningSpace) -> dict[int, str]:
        """Groups whose random cut is not exact: {index: reason}. Groups that are not ``exact`` only have to run."""
        exact = [i for i, group in enumerate(space.groups) if group.exact]
        exact.sort(key=lambda i: space.groups[i].kind == "attention")  # those that fail, fail together
        found: dict[int, str] = {}
        self._search(space, exact, found)
        self._search(space, [i for i, group in enumerate(space.groups) if not group.exact], found)
        return found

    def difference(self, space: PruningSpace, groups: Sequence[int]) -> str | None:
        """Why a cut of some groups is not the masked dense model, or None when it is."""
        self._limits.check()
        refresh(self._twin)
        plan = _random_plan(space, groups, self._rng)
        values = all(space.groups[i].exact for i in groups)
        slim = prune(self._twin, plan)
        for number, inputs in enumerate(self._inputs):
            try:
                with flop_counter() as counter, torch.no_grad():
                    got = list(_outputs(call(slim, inputs)))
                macs = counter.get_total_flops() / 2 / batch_size(inputs)
            except Exception as error:
                return f"the cut model fails: {first_line(error)}"
            refresh(self._twin)
            with masked_in_place(self._twin, plan), torch.no_grad():
                wanted = list(_outputs(call(self._twin, inputs)))
            reason = _unequal(got, wanted, values)
            if reason is None and number == 0:
                reason = _uncounted(slim, macs, space, plan)
            if reason is not None:
                return reason
        return None

    def _search(self, space: PruningSpace, groups: Sequence[int], found: dict[int, str]) -> bool:
        """Find the wrong ones by halves; True where there was one."""
        if not groups:
            return False
        reason = self.difference(space, groups)
        if reason is None:
            return False
        if len(groups) == 1:
            found[groups[0]] = reason
            return True
        middle = len(groups) // 2
        seen = [self._search(space, half, found) for half in (groups[:middle], groups[middle:])]
        if not any(seen):
            self._together(space, groups, found)
        return True

    def _together(self, space: PruningSpace, groups: Sequence[int], found: dict[int, str]) -> None:
        """Each half is exact and both are not: leave out what breaks the rest, one by one."""
        fine: list[int] = []
        for index in groups:
            reason = self.difference(space, [*fine, index])
            if reason is None:
                fine.append(index)
            else:
                found[index] = f"together with other groups: {reason}"


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


def _random_plan(space: PruningSpace, groups: Sequence[int], rng: np.random.Generator) -> Plan:
    widths = space.widths.copy()
    kept: list[Ints] = [np.arange(w) for w in widths]
    for index in groups:
        widths[index] = rng.integers(1, widths[index])
        kept[index] = np.sort(rng.permutation(len(kept[index]))[: widths[index]])
    return Plan(space, widths, tuple(kept))


def _unequal(got: Sequence[Tensor], wanted: Sequence[Tensor], values: bool) -> str | None:
    if len(got) != len(wanted):
        return "the cut model returns another number of outputs"
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape:
            return "part of the model's output"
        if values and not torch.allclose(
            a, b, rtol=0.0, atol=_EXACT * max(1.0, float(b.abs().max()) if b.numel() else 0.0), equal_nan=True
        ):
            return "the cut model differs from the masked dense model"
    return None


def _uncounted(slim: nn.Module, macs: float, space: PruningSpace, plan: Plan) -> str | None:
    params = sum(p.numel() for p in slim.parameters())
    for metric, value in (("macs", macs), ("params", params)):
        if not math.isclose(value, space.cost(plan.widths, metric), rel_tol=1e-12):
            return f"its {metric} do not follow the formula"
    return None


def _outputs(value: object) -> Iterator[Tensor]:
    yield from (t for t in tensors(value) if t.is_floating_point())
