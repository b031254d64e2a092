"""From joined channels to groups, axes, cuts and cost formulas: everything a :class:`PruningSpace` holds."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import nn

from ..pruning.attributes import set_size
from ..pruning.cost import Term
from ..pruning.cost_terms import OUTSIDE, formulas, parameter_terms
from ..pruning.heads import set_heads
from ..pruning.space import AttributeRule, Axis, Cut, Group, Member, PruningSpace, axis_sizes, rounded
from ..utils.torch_internals import CONVOLUTION
from .graph import ChannelGraph, Side, Size


class Layout:
    """Builds one space; ``fixed`` maps channel classes that must stay to the reason why."""

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        total_macs: float,
        fixed: Mapping[int, str],
        sizes: Sequence[Size],
        inexact: bool = False,
    ) -> None:
        self.model = model
        self.graph = graph
        self.total_macs = total_macs
        self.sizes = sizes
        self.sides = sorted(graph.sides, key=lambda side: (side.order, side.name, side.role))
        self.count = graph.count
        self.fixed = dict(graph.fixed) | ({} if inexact else dict(graph.crossed)) | dict(fixed)
        self._fix_ends()
        self._fix_shared_tensors()
        self.class_groups = self._classes()
        self.unit_of = self._numbered()
        self.axes: list[Axis] = []
        self._axis_numbers: dict[bytes, int] = {}

    def space(
        self,
        fingerprint: str,
        unused: tuple[str, ...],
        round_to: int,
        minimum: int,
        input_shape: tuple[int, ...] | None,
    ) -> PruningSpace:
        cuts, rules = self._cuts()
        groups = [rounded(self._group(units), round_to, minimum) for units in self.class_groups]
        terms = self._terms(cuts)
        widths = [len(units) for units in self.class_groups]
        return PruningSpace(
            groups=tuple(groups),
            protected=self._protected(),
            fingerprint=fingerprint,
            cuts=tuple(cuts),
            attribute_rules=tuple(rules),
            costs=formulas(terms, axis_sizes(self.axes, widths), len(widths)),
            terms=terms,
            axes=tuple(self.axes),
            unused=unused,
            input_shape=input_shape,
            inexact={
                group.name: self.graph.crossed[units[0]]
                for group, units in zip(groups, self.class_groups, strict=True)
                if not group.exact
            },
        )

    # Which channels may be cut, and together with which

    def _fix_ends(self) -> None:
        made, used = np.zeros(self.count, dtype=bool), np.zeros(self.count, dtype=bool)
        for side in self.sides:
            if side.role == "out" and side.mixes:
                made[side.classes] = True
            if side.role == "in" and side.mixes:
                used[side.classes] = True
        for number in np.nonzero(~made)[0]:
            self.fixed.setdefault(int(number), "input of the model")
        for number in np.nonzero(~used)[0]:
            self.fixed.setdefault(int(number), "output of the model")

    def _fix_shared_tensors(self) -> None:
        """One parameter held by two layers cannot follow two different cuts."""
        owners = Counter(id(p) for m in self.model.modules() for p in m.parameters(recurse=False))
        for side in self.sides:
            held = [] if side.module is None else list(side.module.parameters(recurse=False))
            if any(owners[id(p)] > 1 for p in held):
                for number in side.classes.tolist():
                    self.fixed.setdefault(number, f"{side.name!r} shares a parameter with another layer")

    def _classes(self) -> list[list[int]]:
        """Prunable classes, gathered into groups: the same layers, the same number of slots in each."""
        touched: dict[int, Counter[int]] = defaultdict(Counter)
        first: dict[int, tuple[int, int]] = {}
        for index, side in enumerate(self.sides):
            for position, number in enumerate(side.classes.tolist()):
                touched[number][index] += 1
                first.setdefault(number, (index, position))
        for place, classes in enumerate(self._arrays(), len(self.sides)):
            for number in classes.tolist():
                if number in touched:
                    touched[number][place] += 1
        gathered: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
        for number, counter in touched.items():
            if number not in self.fixed:
                gathered[tuple(sorted(counter.items()))].append(number)
        groups = [sorted(numbers, key=first.__getitem__) for numbers in gathered.values()]
        for numbers in [g for g in groups if len(g) == 1]:
            self.fixed[numbers[0]] = "a single unit, nothing to choose from"
        return sorted((g for g in groups if len(g) > 1), key=lambda g: self._first_producer(g[0]))

    def _arrays(self) -> Iterator[np.ndarray]:
        """Whatever else has to lose as much with one unit as with another: tensors, and what is computed."""
        for side in self.sides:
            for entry in side.tensors:
                if entry.classes is not side.classes:
                    yield entry.classes
        for product in self.graph.products:
            yield from product.dims

    def _members(self, number: int) -> list[tuple[int, int]]:
        return [
            (index, int((side.classes == number).sum()))
            for index, side in enumerate(self.sides)
            if (side.classes == number).any()
        ]

    def _first_producer(self, number: int) -> tuple[int, int]:
        for index, side in enumerate(self.sides):
            if side.role == "out" and side.mixes:
                where = np.nonzero(side.classes == number)[0]
                if len(where):
                    return index, int(where[0])
        raise AssertionError("a prunable class has a producer")

    def _numbered(self) -> np.ndarray:
        units = np.full(self.count, -1, dtype=np.int64)
        units[[n for group in self.class_groups for n in group]] = np.arange(sum(map(len, self.class_groups)))
        return units

    # What a person and the rules see of a group

    def _group(self, numbers: Sequence[int]) -> Group:
        members = self._members(numbers[0])
        producers = [self.sides[i] for i, _ in members if self.sides[i].role == "out"]
        producers = [s for s in producers if s.mixes]
        root_index = self._first_producer(numbers[0])[0]
        root = self.sides[root_index].module
        roles = {self.sides[i].role for i, _ in members}
        layers = [self.sides[i].module for i, _ in members]
        grouped = any(isinstance(layer, CONVOLUTION) and layer.groups > 1 for layer in layers)
        if set(numbers) <= self.graph.heads:
            kind = "attention"
        elif len({s.name for s in producers}) > 1:
            kind = "residual"
        elif "depthwise" in roles:
            kind = "depthwise"
        elif grouped:
            kind = "grouped"
        else:
            kind = "conv" if isinstance(root, CONVOLUTION) else "linear"
        position = [s.name for s in self._roots_in_order()].index(self.sides[root_index].name)
        return Group(
            name=self._name(numbers, self.sides[root_index].name),
            kind=kind,
            width=len(numbers),
            unit=dict(members)[root_index],
            minimum=1,
            step=1,
            members=tuple(Member(self.sides[i].name, self.sides[i].role, n) for i, n in members),
            depth=position / max(1, len(self._roots_in_order()) - 1),
            kernel=int(root.kernel_size[0]) if isinstance(root, CONVOLUTION) else 1,
            stride=int(root.stride[0]) if isinstance(root, CONVOLUTION) else 1,
            exact=numbers[0] not in self.graph.crossed,
        )

    def _roots_in_order(self) -> list[Side]:
        return [s for s in self.sides if s.role in ("out", "depthwise") and s.mixes]

    def _name(self, numbers: Sequence[int], root: str) -> str:
        """The root's name; a root whose channels fall into several groups numbers them."""
        twins = [g for g in self.class_groups if self.sides[self._first_producer(g[0])[0]].name == root]
        return root if len(twins) == 1 else f"{root}#{1 + twins.index(list(numbers))}"

    def _protected(self) -> dict[str, str]:
        reasons: dict[str, str] = {}
        for side in self.sides:
            if side.role != "out" or not side.mixes:
                continue
            found = [self.fixed[n] for n in side.classes.tolist() if n in self.fixed]
            if len(found) == len(side.classes):
                reasons[side.name] = found[0]
            elif found:
                reasons[side.name] = f"{len(found)} of {len(side.classes)} channels: {found[0]}"
        return reasons

    # Tensors

    def _axis(self, classes: np.ndarray) -> int | None:
        """Number of the axis with these channels, or None when nothing on it can be cut."""
        slots = self.unit_of[classes]
        if (slots < 0).all():
            return None
        key = slots.tobytes()
        if key not in self._axis_numbers:
            self._axis_numbers[key] = len(self.axes)
            self.axes.append(Axis(slots))
        return self._axis_numbers[key]

    def _cuts(self) -> tuple[list[Cut], list[AttributeRule]]:
        cuts: dict[tuple[str, int], Cut] = {}
        rules: list[AttributeRule] = []
        for side in self.sides:
            for entry in side.tensors:
                axis = self._axis(entry.classes)
                if axis is not None:
                    cuts[entry.tensor, entry.dim] = Cut(entry.tensor, entry.dim, axis, entry.consumer)
        modules = dict(self.model.named_modules())
        for size in self.sizes:
            axis = self._axis(size.classes)
            if axis is not None:
                heads = size.path == "num_heads" and isinstance(modules[size.module], nn.MultiheadAttention)
                assign = set_heads if heads else set_size
                rules.append(AttributeRule(size.module, size.path, axis, 1, assign))
        return list(cuts.values()), rules

    def _terms(self, cuts: Sequence[Cut]) -> tuple[Term, ...]:
        terms = list(parameter_terms(self.model, cuts).values())
        known = 0.0
        for product in self.graph.products:
            axes = [self._axis(classes) for classes in product.dims]
            kept = tuple(axis for axis in axes if axis is not None)
            rest = math.prod(len(d) for d, axis in zip(product.dims, axes, strict=True) if axis is None)
            if len(kept) > 2:  # the proof protects what does not follow
                rest, kept = rest * math.prod(len(self.axes[axis].slots) for axis in kept), ()
            terms.append(Term(product.layer, "macs", product.coefficient * rest, kept))
            known += product.coefficient * math.prod(map(len, product.dims))
        # What the counter finds apart from the operations that were followed does not depend on the widths.
        return (*terms, Term(OUTSIDE, "macs", self.total_macs - known, ()))
