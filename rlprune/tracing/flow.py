"""Follow channels through a forward pass: which of them have to be cut together, and what consumes them.

Every operation that a forward pass comes down to (aten's, below autograd) is run a second time, on the labels of its
arguments. What moves elements moves labels; what works element by element joins the labels that meet; a matrix product
or a convolution consumes the labels along the dimension that it sums over and passes on those of its weight's rows.
What is none of these protects the channels that it reads, by name, and the rest of the model is followed further. So
slices, shuffles, padding, concatenation, gates and attention need no rules of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import RlpruneError
from ..pruning.cost_terms import OUTSIDE, layer_of
from ..pruning.heads import HeadAttention
from ..utils.arrays import Ints
from ..utils.torch_internals import TorchDispatchMode, tree_leaves
from .channel_sets import CONSTANT, ChannelSets
from .graph import Product
from .labels import Labels, Origin, first_along, narrowed, settled, vector
from .process import Limits

Operation = Callable[..., Any]


class Use:
    """How a dimension of a parameter was used: its roles ("in": summed over, "out": gives a channel, "pass")."""

    def __init__(self, labels: Ints) -> None:
        self.labels = labels
        self.roles: list[str] = []


class Interruptible(TorchDispatchMode):
    """Looks at the limits before every operation inside of the ``with`` block."""

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self.limits = limits

    def __torch_dispatch__(
        self,
        operation: Operation,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.limits.check()
        out = operation(*args, **(kwargs or {}))
        self.after(operation, args, kwargs or {}, out)
        return out

    def after(self, operation: Operation, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """What is done when an operation has run: here nothing."""


class ChannelFlow(Interruptible):
    """Follows the channels of one model through the operations inside of the ``with`` block.

    Attributes:
        sets: all labels.
        uses: {(parameter or buffer, dimension): Use}.
        order: parameters in the order of their first use.
        fixed: (labels, reason) of channels that have to stay.
        crossed: (labels, reason) of channels that a norm or softmax runs over: no cut of them is exact.
        products: what costs multiply-accumulates.
        inputs, outputs: for each weight, the labels (C,) of the channels that its layer reads and gives.
        entered, left: for each module, the labels (C,) of its first input and of its output, where these have one
            dimension of channels.
        sizes: (module, size, labels) for each dimension whose channels vary, as operations gave it its size.
        splits: (module, sizes, labels of each piece) of each operation that splits by a list of sizes.
        read: (module, attribute) of sizes that an operation is known to have taken.
        grids: labels that vary along several dimensions after a move.
        pads: for each module that puts constant channels around others, the labels of those before and after.
        heads: labels that a batched matrix product joined.
    """

    def __init__(
        self,
        model: nn.Module,
        sets: ChannelSets,
        limits: Limits,
        rules: Mapping[str, Callable[[Step], None]],
        flexible: frozenset[str],
        batch: int,
    ) -> None:
        super().__init__(limits)
        self.sets, self.batch = sets, batch
        self.rules, self.flexible = rules, flexible
        self.counts = True
        self.uses: dict[Origin, Use] = {}
        self.order: dict[str, int] = {}
        self.fixed: list[tuple[Ints, str]] = []
        self.crossed: list[tuple[Ints, str]] = []
        self.products: list[Product] = []
        self.inputs: dict[str, Ints] = {}
        self.outputs: dict[str, Ints] = {}
        self.entered: dict[str, Ints] = {}
        self.left: dict[str, Ints] = {}
        self._passed: list[tuple[dict[str, Ints], str, list[Labels]]] = []
        self.sizes: list[tuple[str, int, Ints]] = []
        self.splits: list[tuple[str, tuple[int, ...], list[Ints]]] = []
        self.heads: list[Ints] = []
        self.grids: list[Tensor] = []
        self.read: set[tuple[str, str]] = set()
        self.pads: dict[str, tuple[Ints, Ints]] = {}
        self.stack: list[tuple[str, nn.Module]] = [("", model)]
        self._labels: Any = WeakTensorKeyDictionary()
        self._names: Any = WeakTensorKeyDictionary()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self._names[tensor] = name
            found = []
            for dim, size in enumerate(tensor.shape):
                if size > 1:
                    self.uses[name, dim] = Use(sets.new(size))
                    of = vector(self.uses[name, dim].labels, dim, tensor.shape)
                    found.append(Labels(of, frozenset({dim}), (name, dim)))
            self._labels[tensor] = found

    def after(self, operation: Operation, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Do to the labels what an operation did to its arguments."""
        Step(self, operation, args, kwargs, out).follow()

    # Labels of tensors

    def storage(self, tensor: Tensor) -> Tensor | None:
        """The labels of a constant that can be written into, place by place; None for all else."""
        found = self._labels.get(tensor, ())
        if len(found) != 1 or found[0].varies or not found[0].constant:
            return None
        of: Tensor = found[0].of
        whole = all(stride or size <= 1 for stride, size in zip(of.stride(), of.shape, strict=True))
        return of if whole else None

    def seen(self, tensor: Tensor) -> None:
        """Note the first use of a parameter."""
        if tensor in self._names:
            self.order.setdefault(self._names[tensor], len(self.order))

    def known(self, tensor: Tensor) -> bool:
        return tensor in self._labels

    def of(self, tensor: Tensor) -> list[Labels]:
        """The labels of a tensor; none for inputs and constants, which carry no labelled channel."""
        return [settled(self.sets, found.of, found.origin) for found in self._labels.get(tensor, ())]

    def put(self, tensor: Tensor, found: Sequence[Labels]) -> None:
        """Give a tensor its labels. What has shrunk to a single channel is not followed further."""
        kept = []
        for labels in found:
            if labels.varies or labels.constant:
                kept.append(labels)
            else:
                self.fix(labels, f"a single channel is taken out in {self.place()}")
        if kept:
            self._labels[tensor] = kept

    def fix(self, labels: Labels, reason: str) -> None:
        self.fixed.append((labels.unique(), reason))

    def cross(self, labels: Labels, reason: str) -> None:
        self.crossed.append((labels.unique(), reason))

    def join(self, one: Labels, other: Labels) -> Labels:
        """Join two labels of one shape element by element; a CONSTANT takes the other's."""
        a, b = torch.broadcast_tensors(narrowed(one.of), narrowed(other.of))
        self.sets.join(a.numpy(), b.numpy())
        merged = torch.where(a == CONSTANT, b, a).expand(one.of.shape)
        return settled(self.sets, merged, one.origin if one.origin == other.origin else None)

    # Words and notes

    def place(self) -> str:
        """The module that runs now, for messages."""
        name, module = self.stack[-1]
        return f"{name!r} ({type(module).__name__})" if name else type(module).__name__

    def used(self, labels: Labels, role: str) -> None:
        """Note how a parameter's dimension is used."""
        if labels.origin is not None:
            roles = self.uses[labels.origin].roles
            if role not in roles:
                roles.append(role)

    def multiply(self, origin: Origin | None, coefficient: float, dims: Sequence[Ints]) -> None:
        """Note the multiply-accumulates of one sample, by the layer of a weight or by the module that runs."""
        if self.counts:
            layer = layer_of(origin[0]) if origin is not None else self.stack[-1][0] or OUTSIDE
            self.products.append(Product(layer, coefficient, tuple(dims)))

    def note_channels(self, where: dict[str, Ints], name: str, value: object) -> None:
        """Remember a module's input or output; `settle_channels` says which channels these are."""
        if isinstance(value, Tensor) and name not in where:
            self._passed.append((where, name, list(self._labels.get(value, ()))))

    def settle_channels(self) -> None:
        """Fill ``entered`` and ``left``; not inside of the ``with`` block, which would follow it as well."""
        for where, name, labels in self._passed:
            found = [settled(self.sets, each.of) for each in labels]
            if len(found) == 1 and len(found[0].varies) == 1:
                where.setdefault(name, found[0].along(min(found[0].varies)))
        self._passed.clear()

    def even_grids(self) -> None:
        """Where a view spreads channels over several dimensions, the same places go from every row: it still fits."""
        for of in self.grids:
            labels = settled(self.sets, of)
            if len(labels.varies) > 1:
                outer = sorted(labels.varies)[:-1]
                first = settled(self.sets, first_along(of, outer).expand(of.shape))
                self.join(labels, first)

    def note_sizes(self, tensor: Tensor, found: Sequence[Labels]) -> None:
        """Remember the sizes that an operation gave to dimensions of channels: attributes may hold them."""
        names = [name for name, _ in self.stack[::-1]]  # the module that runs, and those around it
        for labels in found:
            for dim in labels.varies:
                row = labels.along(dim)
                self.sizes += [(name, int(tensor.shape[dim]), row) for name in dict.fromkeys(names)]


def tensors_in(values: object) -> Iterator[Tensor]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            yield leaf


class Step:
    """One operation: what it does to the labels of its arguments."""

    def __init__(
        self,
        flow: ChannelFlow,
        operation: Operation,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        out: Any,
    ) -> None:
        self.flow, self.operation = flow, operation
        self.args, self.kwargs, self.out = args, kwargs, out
        # "aten.add_.Tensor" -> "add"
        self.full = str(operation)
        self.name = self.full.split(".")[1].rstrip("_")
        self.given = list(tensors_in((args, dict(kwargs))))

    def follow(self) -> None:
        for tensor in self.given:
            self.flow.seen(tensor)
        if self.name in self.flow.flexible:
            self.flexible()
        elif any(self.flow.known(t) for t in self.given):
            rule = self.flow.rules.get(self.name)
            pointwise = torch.Tag.pointwise in getattr(self.operation, "tags", ())
            try:
                (rule or (Step.pointwise if pointwise else Step.unknown))(self)
            except RlpruneError:
                raise
            except Exception:  # a use of the operation that its rule has not met
                self.unknown()

    # Kinds of operations

    def flexible(self) -> None:
        """What is made of one value takes the size of what it meets."""
        for tensor in tensors_in(self.out):
            if tensor.ndim:
                zeros = torch.full(tensor.shape, CONSTANT, dtype=torch.int64)
                self.flow.put(tensor, [Labels(zeros, frozenset())])

    def unknown(self) -> None:
        for tensor in self.given:
            for labels in self.flow.of(tensor):
                self.flow.fix(labels, f"{self.full} in {self.flow.place()} cannot be followed")

    def pointwise(self) -> None:
        """Elements that meet belong together."""
        out = next(tensors_in(self.out), None)
        if out is not None and out.ndim:
            self.give(out, self.merged([self.operand(t, out.shape) for t in self.given if t.ndim]))

    def give(self, out: Tensor, found: Sequence[Labels]) -> None:
        """The labels of a result, written into those of the whole where a constant was changed in place."""
        held = self.flow.storage(out)
        if held is not None and len(found) == 1 and any(out is t for t in self.given):
            held.copy_(found[0].of)
        self.flow.put(out, found)

    def operand(self, tensor: Tensor, shape: Sequence[int]) -> Operand:
        """A tensor's labels, broadcast to a shape from the right."""
        shift = len(shape) - tensor.ndim
        return Operand(
            [moved_right(labels, shift, shape) for labels in self.flow.of(tensor)],
            (1,) * shift + tuple(tensor.shape),
        )

    def merged(self, operands: Sequence[Operand]) -> list[Labels]:
        """The labels of operands that meet element by element, all in one shape."""
        result: list[Labels] = []
        places: list[set[int]] = []
        constant = None
        named = [(i, labels) for i, operand in enumerate(operands) for labels in operand.labels]
        # What an activation brings comes first: a weight's dimension joins it.
        for place, labels in sorted(named, key=lambda item: item[1].origin is not None):
            if labels.constant:
                constant = labels
                continue
            match = next((i for i, r in enumerate(result) if r.varies & labels.varies), None)
            if match is None:
                result.append(labels)
                places.append({place})
                continue
            if labels.origin != result[match].origin:
                self.flow.used(labels, "pass")
                self.flow.used(result[match], "pass")
            result[match] = self.flow.join(result[match], labels)
            places[match].add(place)
        kept = [
            labels
            for labels, where in zip(result, places, strict=True)
            if self._free(labels, where, operands)
        ]
        return kept if kept or constant is None else [constant]

    def _free(self, labels: Labels, where: set[int], operands: Sequence[Operand]) -> bool:
        """Whether nothing of a fixed size meets the labels; protects them where something does."""
        for place, operand in enumerate(operands):
            if place in where or not any(operand.size[d] > 1 for d in labels.varies):
                continue
            if not any(found.constant for found in operand.labels):
                self.flow.fix(labels, f"{self.full} in {self.flow.place()} meets something of a fixed size")
                return False
        return True

    def moved(self) -> None:
        """Elements move, and their labels move with them."""
        source, outs = self.args[0], list(tensors_in(self.out))
        held = self.flow.storage(source)
        moves: list[list[Labels]] = [[] for _ in outs]
        for labels in self.flow.of(source):
            for i, result in enumerate(tensors_in(self.rerun(labels.of if held is None else held))):
                if result.shape == outs[i].shape:
                    # The labels of constants keep their storage: what is written into a view shows in the whole.
                    moves[i].append(
                        settled(self.flow.sets, result, labels.origin)
                        if held is None
                        else Labels(result, frozenset())
                    )
        for out, found in zip(outs, moves, strict=True):
            self.flow.put(out, found)
            self.flow.note_sizes(out, found)
            for labels in found:
                if len(labels.varies) > 1:
                    self.flow.grids.append(labels.of)

    def rerun(self, labels: Tensor) -> Any:
        """The operation on labels in the place of its first argument."""
        if self.name in ("view", "_unsafe_view"):
            return labels.reshape(self.out.shape)
        return self.operation(labels, *self.args[1:], **self.kwargs)

    def only(self, labels: Labels, dim: int) -> Labels:
        """The labels joined along all other dimensions, so that they vary along one."""
        others = labels.varies - {dim}
        if not others:
            return labels
        first = first_along(labels.of, others).expand(labels.of.shape)
        return self.flow.join(labels, settled(self.flow.sets, first))

    def along(self, labels: Labels, dims: Sequence[int], verb: str) -> Labels:
        """What the labels become where an operation runs over some dimensions.

        Along them they are joined: who goes, goes for all of them. Where that would leave one set alone, the operation
        runs over the channels themselves, and no cut is exact.
        """
        over = frozenset(d % labels.of.ndim for d in dims)
        if not labels.varies & over:
            return labels
        first = first_along(labels.of, over)
        rest = settled(self.flow.sets, first)
        if not rest.varies:
            # The mean over heads is a look at the weights that hardly anybody takes; the proof sees who does.
            if not isinstance(self.flow.stack[-1][1], HeadAttention):
                self.flow.cross(labels, f"{self.flow.place()} {verb} its channels")
            return labels
        return self.flow.join(labels, Labels(first.expand(labels.of.shape), rest.varies, labels.origin))


@dataclass(frozen=True)
class Operand:
    """Labels in the shape of a result, and the sizes that the operand itself has there (1 where it is broadcast)."""

    labels: list[Labels]
    size: tuple[int, ...]


def moved_right(labels: Labels, shift: int, shape: Sequence[int]) -> Labels:
    """Labels broadcast to a shape with ``shift`` dimensions more on the left."""
    return Labels(labels.of.expand(*shape), frozenset(d + shift for d in labels.varies), labels.origin)
