"""From joined channels to groups, axes, cuts and cost formulas: everything a :class:`PruningSpace` holds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from ..pruning.cost import Term
from ..pruning.cost_terms import cost_terms, formulas
from ..pruning.space import AttributeRule, Axis, Cut, Group, Member, PruningSpace, axis_sizes, rounded
from ..utils.torch_internals import CONVOLUTION
from .graph import MIXERS, ChannelGraph, Side
from .layers import ChannelPad


@dataclass(frozen=True)
class Call:
    """What the forward pass showed of a layer: its place in the order and the MACs of one weight element."""

    order: int
    reuse: float


class Layout:
    """Builds one space; ``fixed`` maps channel classes that must stay to the reason why."""

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        calls: Mapping[nn.Module, Call],
        total_macs: float,
        fixed: Mapping[int, str],
    ) -> None:
        self.model = model
        self.calls = calls
        self.total_macs = total_macs
        self.sides = sorted(graph.sides, key=self._order)
        self.count = graph.count
        self.fixed = dict(graph.fixed) | dict(fixed)
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
        terms = self._terms(cuts)
        widths = [len(units) for units in self.class_groups]
        return PruningSpace(
            groups=tuple(rounded(self._group(units), round_to, minimum) for units in self.class_groups),
            protected=self._protected(),
            fingerprint=fingerprint,
            cuts=tuple(cuts),
            attribute_rules=tuple(rules),
            costs=formulas(terms, axis_sizes(self.axes, widths), len(widths)),
            terms=terms,
            axes=tuple(self.axes),
            unused=unused,
            input_shape=input_shape,
        )

    # Which channels may be cut, and together with which

    def _order(self, side: Side) -> tuple[int, str, str]:
        call = self.calls.get(side.module) if isinstance(side.module, nn.Module) else None
        return (call.order if call else len(self.calls), side.name, side.role)

    def _fix_ends(self) -> None:
        made, used = np.zeros(self.count, dtype=bool), np.zeros(self.count, dtype=bool)
        for side in self.sides:
            if side.role == "out" and isinstance(side.module, MIXERS):
                made[side.classes] = True
            if side.role == "in" and isinstance(side.module, MIXERS):
                used[side.classes] = True
        for number in np.nonzero(~made)[0]:
            self.fixed.setdefault(int(number), "input of the model")
        for number in np.nonzero(~used)[0]:
            self.fixed.setdefault(int(number), "output of the model")

    def _fix_shared_tensors(self) -> None:
        """One parameter held by two layers cannot follow two different cuts."""
        owners = Counter(id(p) for m in self.model.modules() for p in m.parameters(recurse=False))
        for side in self.sides:
            held = [] if isinstance(side.module, nn.Parameter) else side.module.parameters(recurse=False)
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
        gathered: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
        for number, counter in touched.items():
            if number not in self.fixed:
                gathered[tuple(sorted(counter.items()))].append(number)
        groups = [sorted(numbers, key=first.__getitem__) for numbers in gathered.values()]
        for numbers in [g for g in groups if len(g) == 1]:
            self.fixed[numbers[0]] = "a single unit, nothing to choose from"
        return sorted((g for g in groups if len(g) > 1), key=lambda g: self._first_producer(g[0]))

    def _members(self, number: int) -> list[tuple[int, int]]:
        return [
            (index, int((side.classes == number).sum()))
            for index, side in enumerate(self.sides)
            if (side.classes == number).any()
        ]

    def _first_producer(self, number: int) -> tuple[int, int]:
        for index, side in enumerate(self.sides):
            if side.role == "out" and isinstance(side.module, MIXERS):
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
        producers = [s for s in producers if isinstance(s.module, MIXERS)]
        root_index = self._first_producer(numbers[0])[0]
        root = self.sides[root_index].module
        assert isinstance(root, nn.Module)
        roles = {self.sides[i].role for i, _ in members}
        layers = [self.sides[i].module for i, _ in members]
        grouped = any(isinstance(layer, CONVOLUTION) and layer.groups > 1 for layer in layers)
        if len({s.name for s in producers}) > 1:
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
        )

    def _roots_in_order(self) -> list[Side]:
        return [s for s in self.sides if s.role in ("out", "depthwise") and isinstance(s.module, MIXERS)]

    def _name(self, numbers: Sequence[int], root: str) -> str:
        """The root's name; a root whose channels fall into several groups numbers them."""
        twins = [g for g in self.class_groups if self.sides[self._first_producer(g[0])[0]].name == root]
        return root if len(twins) == 1 else f"{root}#{1 + twins.index(list(numbers))}"

    def _protected(self) -> dict[str, str]:
        reasons: dict[str, str] = {}
        for side in self.sides:
            if side.role != "out" or not isinstance(side.module, MIXERS):
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
        cuts: list[Cut] = []
        rules: list[AttributeRule] = []
        for side in self.sides:
            for tensor, dim, classes, consumer in _tensor_dims(side):
                axis = self._axis(classes)
                if axis is not None:
                    cuts.append(Cut(tensor, dim, axis, consumer))
            for attribute, classes in _attributes(side):
                axis = self._axis(classes)
                if axis is not None:
                    rules.append(AttributeRule(side.name, attribute, axis, 1))
        return cuts, rules

    def _terms(self, cuts: Sequence[Cut]) -> tuple[Term, ...]:
        modules = dict(self.model.named_modules())
        reuse = {f"{n}.weight": self.calls[m].reuse for n, m in modules.items() if m in self.calls}
        return cost_terms(self.model, cuts, reuse, self.total_macs)


def _tensor_dims(side: Side) -> list[tuple[str, int, np.ndarray, bool]]:
    """(tensor, dimension, channel classes along it, is it the input side of a layer's weights)."""
    module, name, classes = side.module, side.name, side.classes
    if isinstance(module, nn.Parameter):
        return [(name, side.dim, classes, False)]
    if side.role in ("norm", "activation"):
        tensors = [
            n for n, t in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        ]
        return [
            (f"{name}.{n}", 0, classes, False)
            for n in tensors
            if getattr(module, n).ndim == 1 and len(getattr(module, n)) == len(classes)
        ]
    if not isinstance(module, MIXERS):
        return []
    transposed = isinstance(module, CONVOLUTION) and module.transposed
    groups = module.groups if isinstance(module, CONVOLUTION) else 1
    if side.role == "in":
        # The weight of a grouped convolution holds the input channels of one group only.
        return [
            (f"{name}.weight", 0, classes, True)
            if transposed
            else (f"{name}.weight", 1, classes[: len(classes) // groups], True)
        ]
    dims = [
        (f"{name}.weight", 1, classes[: len(classes) // groups], False)
        if transposed and side.role == "out"
        else (f"{name}.weight", 0, classes, False)
    ]
    if module.bias is not None:
        dims.append((f"{name}.bias", 0, classes, False))
    return dims


def _attributes(side: Side) -> list[tuple[str, np.ndarray]]:
    """Integer attributes of a layer that count the channels of this side."""
    module, classes = side.module, side.classes
    if isinstance(module, CONVOLUTION):
        names = {"in": ["in_channels"], "out": ["out_channels"]}
        return [(n, classes) for n in names.get(side.role, ["in_channels", "out_channels", "groups"])]
    if isinstance(module, nn.Linear):
        return [("in_features" if side.role == "in" else "out_features", classes)]
    if isinstance(module, ChannelPad) and side.role == "pad-out":
        return [
            ("before", classes[: module.before]),
            ("after", classes[len(classes) - module.after :]),
        ]
    if side.role == "norm" and isinstance(getattr(module, "num_features", None), int):
        return [("num_features", classes)]
    if side.role == "activation" and isinstance(module, nn.PReLU) and module.num_parameters > 1:
        return [("num_parameters", classes)]
    return []
