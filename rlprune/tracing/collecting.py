"""From labels to numbered classes, gathered by the layers that hold them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import nn

from ..utils.arrays import Ints
from ..utils.torch_internals import CONVOLUTION
from .flow import ChannelFlow
from .graph import MIXERS, ChannelGraph, Product, Side, TensorDim, is_depthwise
from .sizes import found_sizes, unnamed_splits

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def collected(model: nn.Module, flow: ChannelFlow) -> ChannelGraph:
    """The flow in numbered classes, gathered by layers."""
    roots = flow.sets.roots()
    _, numbers = np.unique(roots, return_inverse=True)
    collector = _Collector(model, flow, numbers)
    return collector.graph()


class _Collector:
    """Gathers the used dimensions of parameters by the layers that hold them."""

    def __init__(self, model: nn.Module, flow: ChannelFlow, numbers: Ints) -> None:
        self.model, self.flow, self.numbers = model, flow, numbers
        self.sides: list[Side] = []
        self.left = {origin: use for origin, use in flow.uses.items() if use.roles}
        self.fixed: dict[int, str] = {}

    def graph(self) -> ChannelGraph:
        for name, module in self.model.named_modules():
            if isinstance(module, MIXERS):
                self._mixer(name, module)
            else:
                self._own(name, module)
        for (tensor, _), use in self.left.items():
            if {"in", "out"} <= set(use.roles):
                self._fix([(use.labels, f"{tensor!r} is used in both directions")])
        flow = self.flow
        self._fix([*flow.fixed, *unnamed_splits(self.model, flow, self.of)])
        crossed: dict[int, str] = {}
        for labels, reason in flow.crossed:
            for number in self.of(labels).tolist():
                crossed.setdefault(number, reason)

        def stays(classes: Ints) -> bool:
            return all(number in self.fixed or number in crossed for number in classes.tolist())

        return ChannelGraph(
            sides=tuple(self.sides),
            fixed=self.fixed,
            crossed=crossed,
            heads=frozenset(int(n) for labels in flow.heads for n in self.of(labels)),
            count=int(self.numbers.max()) + 1,
            products=tuple(
                Product(p.layer, p.coefficient, tuple(self.of(d) for d in p.dims)) for p in flow.products
            ),
            sizes=found_sizes(self.model, flow, self.of, stays),
        )

    def of(self, labels: Ints) -> Ints:
        """Numbers of the classes of labels."""
        found: Ints = self.numbers[labels]
        return found

    def _fix(self, reasons: Iterable[tuple[Ints, str]]) -> None:
        for labels, reason in reasons:
            for number in self.of(labels).tolist():
                self.fixed.setdefault(number, reason)

    def _dims(self, name: str, dim: int) -> tuple[TensorDim, ...]:
        use = self.left.get((name, dim))
        if use is None:
            return ()
        return (TensorDim(name, dim, self.of(use.labels), "in" in use.roles),)

    def _order(self, *names: str) -> int:
        return min((self.flow.order[n] for n in names if n in self.flow.order), default=len(self.flow.order))

    def _mixer(self, name: str, module: nn.Module) -> None:
        assert isinstance(module, MIXERS)
        weight, bias = f"{name}.weight".lstrip("."), f"{name}.bias".lstrip(".")
        order = self._order(weight)
        transposed = isinstance(module, CONVOLUTION) and module.transposed
        outs, ins = (1, 0) if transposed else (0, 1)
        biases = self._dims(bias, 0)
        if is_depthwise(module):
            own = self._dims(weight, 0) + self._dims(weight, 1)
            if own:
                self._add(module, name, "depthwise", own[0].classes, True, order, own + biases)
            return
        taken, given = self._dims(weight, ins), self._dims(weight, outs)
        read = self.flow.inputs.get(weight)
        if taken:
            classes = taken[0].classes if read is None else self.of(read)
            self._add(module, name, "in", classes, True, order, taken)
        if given:
            gives = self.flow.outputs.get(weight)
            classes = given[0].classes if gives is None else self.of(gives)
            self._add(module, name, "out", classes, True, order, given + biases)

    def _own(self, name: str, module: nn.Module) -> None:
        """A layer that channels pass through, or one with weights of its own kind."""
        held = [
            *(n for n, _ in module.named_parameters(recurse=False)),
            *(n for n, _ in module.named_buffers(recurse=False)),
        ]
        dims = [
            (entry, set(self.left[entry.tensor, entry.dim].roles))
            for n in held
            for d in range(getattr(module, n).ndim)
            for entry in self._dims(f"{name}.{n}".lstrip("."), d)
        ]
        passing = tuple(entry for entry, roles in dims if not roles & {"in", "out"})
        vectors = tuple(e for e in passing if self._vector(e.tensor))
        if vectors and not isinstance(module, nn.RNNBase | nn.MultiheadAttention):
            role = "activation" if isinstance(module, nn.PReLU) else "norm"
            order = self._order(*(e.tensor for e in vectors))
            first = vectors[0]
            same = tuple(e for e in vectors if np.array_equal(e.classes, first.classes))
            self._add(module, name, role, first.classes, False, order, same)
            passing = tuple(e for e in passing if e not in same)
        for entry in passing:
            self._add(
                None, entry.tensor, "parameter", entry.classes, False, self._order(entry.tensor), (entry,)
            )
        for entry, roles in dims:
            for role in ("in", "out"):
                if role in roles:
                    self._add(
                        None, name or entry.tensor, role, self._units(module, entry), True,
                        self._order(entry.tensor), (entry,),
                    )  # fmt: skip

    def _vector(self, tensor: str) -> bool:
        return (tensor, 1) not in self.flow.uses and (tensor, 0) in self.flow.uses

    def _units(self, module: nn.Module, entry: TensorDim) -> Ints:
        """The channels behind the rows of several gates, or of queries, keys and values."""
        gates = 1
        if isinstance(module, nn.RNNBase) and "weight_hr" not in entry.tensor:
            gates = _GATES.get(module.mode.partition("_")[0], 1)
        elif isinstance(module, nn.MultiheadAttention) and entry.tensor.endswith("in_proj_weight"):
            gates = 3
        return entry.classes if entry.dim else entry.classes[: len(entry.classes) // gates]

    def _add(
        self,
        module: nn.Module | None,
        name: str,
        role: str,
        classes: Ints,
        mixes: bool,
        order: int,
        dims: tuple[TensorDim, ...],
    ) -> None:
        self.sides.append(Side(module, name, role, classes, mixes, order, dims))
