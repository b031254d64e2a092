"""The pruning space of a transformers causal language model, read from its family's adapter instead of a trace.

A dependency tracer follows tensors, not meaning: it couples grouped-query heads by position (DESIGN: traps).
Head counts and names are known exactly, so the groups are written down from them, in time linear in the depth,
on any device (``meta`` too), and proved against the masked dense model.
"""

from __future__ import annotations

import fnmatch
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..errors import BudgetError, GraphError, near_miss
from ..pruning.cost import CostFormula, FormulaBuilder, Term
from ..pruning.cost_terms import layer_of
from ..pruning.space import (
    AttributeRule,
    Axis,
    Cut,
    DropRule,
    Group,
    MaskRule,
    Member,
    PruningSpace,
    axis_sizes,
    rounded,
)
from ..tracing.trace import TraceOptions
from ..utils.arrays import Ints
from . import families
from .dropped import drop
from .expert_groups import EXPERTS, add_experts, add_products
from .families import Block
from .linear import feature_names, features, is_conv1d, is_dropped, is_linear, set_attribute
from .proof import prove
from .runtimes import restriction
from .sizes import hidden_dims, hidden_size

_MULTIPLES = (32, 16, 8, 4, 2)
_STEPS = 8
_CACHE_BYTES = 2 * 2  # keys and values, two bytes each (bfloat16)


def is_language_model(model: nn.Module) -> bool:
    """Whether this is a transformers model that reads token ids."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not hasattr(model, "config"):
        return False
    return isinstance(model, transformers.PreTrainedModel) and model.main_input_name == "input_ids"


def language_space(
    model: nn.Module, example_inputs: object, fingerprint: str, options: TraceOptions
) -> PruningSpace:
    """The space of a causal LM: a group for each attention and each feed-forward part, in block order.

    A unit is a neuron, or a key-value head with its query heads and their output columns. With ``drop`` a
    group's minimum is 0: the part is then removed whole. With ``hidden`` the residual width is a group too,
    the last one; no exact cut exists there because norms cross it.

    Args:
        example_inputs: token ids (B, L), or a dict with ``input_ids``; costs are those of one sequence of L.

    Raises:
        GraphError: no adapter knows the model, or the proof fails; the module is named.
        ConfigError: the runtime of ``options`` does not read the model.
    """
    length = sequence_length(example_inputs)
    try:
        blocks = families.blocks_of(model)
    except families.UnsupportedModel as error:
        raise GraphError(str(error)) from None
    if options.hidden and any(block.experts is not None for block in blocks):
        raise GraphError(
            f"prune.hidden: {type(model).__name__} is a mixture of experts, whose hidden size is not cut; leave it out"
        )
    if options.hidden and families.family_of(model).listed:
        raise GraphError(
            f"prune.hidden: not for {type(model).__name__}, whose parts were found by structure; set it to false"
        )
    ignored = _ignored(model, blocks, options.ignore)
    limits = restriction(model, options)
    layout = _LanguageLayout(model, blocks, length, options.drop, options.hidden, {**limits.stays, **ignored})
    if options.multiple is not None:
        _check_rounding(layout.groups, options.multiple)
    space = limits.applied(layout.space(fingerprint, options.multiple, options.minimum), options.runtime)
    if not space.groups:
        reasons = [f"{name!r}: {why}" for name, why in space.protected.items()]
        raise GraphError(f"no part of {type(model).__name__} can be pruned; " + "; ".join(reasons[:3]))
    if options.verify:
        prove(
            model,
            space,
            lambda twin, tokens, own: exact_space(twin, tokens, options.drop, ignored if own else {}),
        )
    return space


def _check_rounding(groups: Sequence[Group], round_to: int) -> None:
    """A multiple above a layer's width would keep the layer whole without a word."""
    for group in groups:
        if group.kind not in ("attention", EXPERTS) and round_to > group.width:
            units = "neurons" if group.kind == "ffn" else "channels"
            raise BudgetError(
                f"prune.round_to: {round_to} is larger than the {group.width} {units} of {group.name!r}; lower "
                "it, or name the layer in prune.ignore"
            )


def fitting_multiple(width: int) -> int:
    """The multiple of neurons (or hidden channels) that is kept where none is asked for: 32, or less in small layers.

    Blocks of 32 numbers are what the formats q8_0 and q4_0 of llama.cpp and 4-bit kernels share a scale over. A
    multiple has to divide the width, so that the dense model is one too, and to leave at least 8 steps.
    """
    return next((n for n in _MULTIPLES if width % n == 0 and width // n >= _STEPS), 1)


def exact_space(model: nn.Module, length: int, drop: bool, ignored: dict[str, str]) -> PruningSpace:
    """The space whose cuts are exact, for sequences of ``length`` tokens; ``ignored`` has {part: reason}."""
    blocks = families.blocks_of(model)
    return _LanguageLayout(model, blocks, length, drop, False, ignored).space("", 1, 1)


def sequence_length(example_inputs: object) -> int:
    """Tokens in the example input; GraphError where it holds no token ids."""
    ids: Any = example_inputs
    if isinstance(ids, dict) or hasattr(ids, "keys"):
        ids = ids.get("input_ids")
    elif isinstance(ids, (tuple, list)) and ids:
        ids = ids[0]
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
        raise GraphError(
            "example_inputs: a language model needs token ids, an integer tensor of shape (1, L)"
        )
    return int(ids.shape[1])


def _ignored(model: nn.Module, blocks: Sequence[Block], patterns: Sequence[str]) -> dict[str, str]:
    """{part: reason} of the parts that a pattern names, by the part, a layer of it, or a block around it."""
    if isinstance(patterns, str):
        raise GraphError(f"ignore: {patterns!r} is one string; give a list of layer names or patterns")
    names = [name for name, _ in model.named_modules() if name]
    ignored: dict[str, str] = {}
    for pattern in patterns:
        hits = {n for n in names if fnmatch.fnmatchcase(n, pattern) or n.startswith(pattern + ".")}
        hits |= {"hidden"} & {pattern}
        if not hits:
            raise GraphError(f"ignore: no layer matches {pattern!r}{near_miss(pattern, names)}")
        reason = f"ignored by {pattern!r}"
        for block in blocks:
            ignored |= dict.fromkeys({block.attention} & hits, reason)
            ignored |= dict.fromkeys({block.ffn} & hits, reason)
            if hits & {*block.qkv, block.out}:
                ignored[block.attention] = reason
            if hits & {*block.up, block.down}:
                ignored[block.ffn] = reason
            if block.experts is not None:
                own = {block.experts.router, block.experts.module}
                ignored |= dict.fromkeys(own if block.experts.owner in hits else own & hits, reason)
                if block.experts.owner in hits:
                    ignored[block.ffn] = reason
        if "hidden" in hits or hits & {n for n, m in model.named_modules() if isinstance(m, nn.Embedding)}:
            ignored["hidden"] = reason
    return ignored


def _size_rule(module: str, attribute: str, axis: int, factor: int) -> AttributeRule:
    return AttributeRule(module, attribute, axis, factor, set_attribute)


class _LanguageLayout:
    """Builds one space: numbers the units, then writes down axes, cuts, attributes, drops and costs."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        length: int,
        drop: bool,
        hidden: bool,
        ignored: dict[str, str],
    ) -> None:
        self.model, self.blocks, self.length, self.drop = model, blocks, length, drop
        self.family = families.family_of(model)
        self.kept = dict(self.family.kept)
        self.modules = dict(model.named_modules())
        self.canonical = {id(p): n for n, p in model.named_parameters()}
        self.protected: dict[str, str] = {}
        self.groups: list[Group] = []
        self.axes: list[Axis] = []
        self.cuts: list[Cut] = []
        self.rules: list[AttributeRule] = []
        self.drops: list[DropRule] = []
        self.masks: list[MaskRule] = []
        self.terms: list[Term] = []
        self.heads: dict[int, int] = {}  # block -> axis of its key-value heads (or of its whole attention)
        self._units = 0
        for block in blocks:
            self._attention(block, ignored)
            self._ffn(block, ignored)
            add_experts(self, block, ignored)
            if self.family.listed:
                self._others(block)
        if not hidden:
            self.protected["hidden"] = "the residual width stays (prune.hidden makes it a group)"
        elif "hidden" in ignored:
            self.protected["hidden"] = ignored["hidden"]
        else:
            self._hidden()
        self.protected["lm_head"] = "output of the model"

    def space(self, fingerprint: str, round_to: int | None, minimum: int) -> PruningSpace:
        costs = self._costs()
        return PruningSpace(
            groups=tuple(rounded(g, round_to or fitting_multiple(g.width), minimum) for g in self.groups),
            protected=self.protected,
            fingerprint=fingerprint,
            axes=tuple(self.axes),
            cuts=tuple(self.cuts),
            attribute_rules=tuple(self.rules),
            costs=costs,
            terms=tuple(self.terms),
            input_shape=(1, self.length),
            drops=tuple(self.drops),
            masks=tuple(self.masks),
            wing="language",
        )

    # Groups

    def _attention(self, block: Block, ignored: dict[str, str]) -> None:
        if not block.attention:
            return
        dropped = is_dropped(self.modules[block.out])
        none = "already dropped" if dropped else "its layers have not the shapes that heads give"
        reason = ignored.get(block.attention, "" if block.kv_heads else none)
        reason = reason or self.kept.get("attention", "")
        if block.whole and "attention" in self.family.undroppable:
            reason = reason or block.whole
        if block.whole and not self.drop:
            reason = reason or f"{block.whole}: it can only be dropped whole (prune.drop)"
        elif block.kv_heads == 1 and not self.drop:
            reason = reason or "a single key-value head"
        if reason:
            self.protected[block.attention] = reason
            return
        units = 1 if block.whole else block.kv_heads
        r, d = block.query_heads // units, block.head_dim
        kv = block.kv_heads // units
        rows_of = {n: features(self.modules[n])[1] // units for n in block.heads_rows}
        members = (*(Member(n, "out", rows) for n, rows in rows_of.items()), Member(block.out, "in", r * d))
        start = self._group(block.attention, "attention", units, r * d, members, block.index, 0)
        heads = np.arange(start, start + units)
        queries, keys = np.repeat(heads, r * d), np.repeat(heads, kv * d)
        if len(block.qkv) == 3:
            rows = [np.repeat(heads, rows_of[n]) for n in block.qkv]
        elif self.family.blocked:
            rows = [np.concatenate([queries, keys, keys])]
        else:
            rows = [np.repeat(heads, (r + 2 * kv) * d)]
        for name, slots in zip(block.qkv, rows, strict=True):
            self._cut_linear(name, "out", self._axis(slots))
        for name in block.gates:
            self._cut_linear(name, "out", self._axis(np.repeat(heads, rows_of[name])))
        self._cut_linear(block.out, "in", self._axis(queries))
        self.heads[block.index] = axis = self._axis(heads)
        for name in self.family.per_query_head:
            self.cuts.append(Cut(f"{block.attention}.{name}", 0, self._axis(np.repeat(heads, r)), False))
        for attribute, worth in families.head_attributes(self.model, block).items():
            self.rules.append(_size_rule(block.attention, attribute, axis, worth))
        if "attention" not in self.family.undroppable:
            self.drops.append(DropRule(block.attention, axis, partial(drop, kind="attention")))

    def _ffn(self, block: Block, ignored: dict[str, str]) -> None:
        if not block.ffn:
            return
        reason = ignored.get(block.ffn, "" if block.neurons else "already dropped")
        reason = reason or self.kept.get("ffn", "")
        if block.neurons == 1 and not self.drop:
            reason = reason or "a single unit, nothing to choose from"
        if reason:
            self.protected[block.ffn] = reason
            return
        halves = [features(self.modules[n])[1] // block.neurons for n in block.up]
        members = tuple(Member(n, "out", h) for n, h in zip(block.up, halves, strict=True))
        members += (Member(block.down, "in", 1),)
        start = self._group(block.ffn, "ffn", block.neurons, 1, members, block.index, 1)
        neurons = np.arange(start, start + block.neurons)
        axis = self._axis(neurons)
        for name, half in zip(block.up, halves, strict=True):
            self._cut_linear(name, "out", axis if half == 1 else self._axis(np.tile(neurons, half)))
        self._cut_linear(block.down, "in", axis)
        for attribute, worth in families.neuron_attributes(self.model, block).items():
            self.rules.append(_size_rule(block.ffn, attribute, axis, worth))
        if "ffn" not in self.family.undroppable:
            self.drops.append(DropRule(block.ffn, axis, partial(drop, kind="ffn")))

    def _others(self, block: Block) -> None:
        """Say of each further part of a block, the mixer of a hybrid model above all, that it stays."""
        inside = {block.attention, block.ffn, *block.up, block.down}
        for name, module in self.modules[block.path].named_children():
            path = f"{block.path}.{name}"
            matrices = any(p.ndim > 1 for p in module.parameters())
            if matrices and path not in inside and not block.ffn.startswith(f"{path}."):
                self.protected[path] = (
                    f"{type(module).__name__} is neither softmax attention nor a feed-forward part"
                )

    def _hidden(self) -> None:
        tensors, attributes = hidden_dims(self.model)
        size = hidden_size(self.model)
        roles: dict[tuple[str, str], None] = {}
        for tensor, _, consumer in tensors:
            owner = tensor.rsplit(".", 1)[0]
            kind = "norm" if not is_linear(self.modules[owner]) else "in" if consumer else "out"
            kind = "out" if isinstance(self.modules[owner], nn.Embedding) else kind
            roles[owner, kind] = None
        members = tuple(Member(n, role, 1) for n, role in roles)
        start = self._group("hidden", "hidden", size, 1, members, -1, 0)
        axis = self._axis(np.arange(start, start + size))
        self.cuts += [Cut(tensor, dim, axis, consumer) for tensor, dim, consumer in tensors]
        self.rules += [_size_rule(module, attribute, axis, 1) for module, attribute in attributes]

    def _group(
        self,
        name: str,
        kind: str,
        width: int,
        unit: int,
        members: tuple[Member, ...],
        block: int,
        second: int,
    ) -> int:
        """Append a group and return the number of its first unit."""
        lowest = 0 if self.drop and kind not in ("hidden", *self.family.undroppable) else 1
        depth = self.depth_of(block, second)
        return self.add_group(
            Group(name, kind, width, unit, lowest, 1, members, depth, 1, 1, block, kind != "hidden")
        )

    def depth_of(self, block: int, second: int) -> float:
        """Relative position of a block's first or second part in the model."""
        return 0.0 if block < 0 else (2 * block + second) / max(1, 2 * len(self.blocks) - 1)

    def add_group(self, group: Group) -> int:
        """Append a group and return the number of its first unit."""
        self.groups.append(group)
        self._units += group.units
        return self._units - group.units

    # Tensors

    def _axis(self, slots: Ints) -> int:
        self.axes.append(Axis(np.asarray(slots, dtype=np.int64)))
        return len(self.axes) - 1

    def _cut_linear(self, name: str, side: str, axis: int) -> None:
        layer = self.modules[name]
        inputs, outputs = feature_names(layer)
        flipped = is_conv1d(layer)
        if side == "in":
            self.cuts.append(Cut(f"{name}.weight", 0 if flipped else 1, axis, True))
            self.rules.append(_size_rule(name, inputs, axis, 1))
            return
        self.cuts.append(Cut(f"{name}.weight", 1 if flipped else 0, axis, False))
        if getattr(layer, "bias", None) is not None:
            self.cuts.append(Cut(f"{name}.bias", 0, axis, False))
        self.rules.append(_size_rule(name, outputs, axis, 1))

    # Costs

    def _costs(self) -> dict[str, CostFormula]:
        """The formula of each metric; what each layer adds to MACs and parameters goes into ``terms``."""
        sizes = axis_sizes(self.axes, [g.width for g in self.groups], [g.lanes for g in self.groups])
        by_tensor: dict[str, list[Cut]] = defaultdict(list)
        for cut in self.cuts:
            by_tensor[cut.tensor].append(cut)
        builders = {
            n: FormulaBuilder(len(self.groups)) for n in ("macs", "params", "block_params", "kv_cache")
        }
        stem = self.family.blocks + "."
        terms = {}
        for name, parameter in self.model.named_parameters():
            cut_dims = {c.dim: c.axis for c in by_tensor.get(name, [])}
            rest = math.prod(n for d, n in enumerate(parameter.shape) if d not in cut_dims)
            terms[name] = rest, [sizes[a] for a in cut_dims.values()]
            builders["params"].add(rest, *terms[name][1])
            self.terms.append(Term(layer_of(name), "params", rest, tuple(cut_dims.values())))
            if name.startswith(stem):
                builders["block_params"].add(rest, *terms[name][1])
        for path, module in self._token_modules():
            if is_linear(module):
                weight = self.canonical[id(module.weight)]
                rest, axes = terms[weight]
                builders["macs"].add(self.length * rest, *axes)
                numbers = {c.dim: c.axis for c in by_tensor.get(weight, [])}
                self.terms.append(Term(path, "macs", self.length * rest, tuple(numbers.values())))
        for block in self.blocks:
            if block.experts is not None:
                add_products(self, block.experts, builders["macs"], sizes)
            if not block.attention:
                continue
            # Queries times keys and scores times values, whole squares: masked entries are computed too.
            units = 1 if block.whole else max(1, block.kv_heads)
            scores = 2.0 * self.length**2 * block.head_dim * block.query_heads / units
            cached = float(_CACHE_BYTES * block.head_dim * self._cached_heads(block)) / units
            where = [sizes[self.heads[block.index]]] if block.index in self.heads else []
            times = 1 if where else units
            builders["macs"].add(scores * times, *where)
            heads = (self.heads[block.index],) if where else ()
            self.terms.append(Term(block.attention, "macs", scores * times, heads))
            builders["kv_cache"].add(cached * times, *where)
        return {name: builder.build() for name, builder in builders.items()}

    def _token_modules(self) -> list[tuple[str, nn.Module]]:
        """The modules that every token of a text goes through: those of a picture tower are not."""
        owner: Any = self.model  # torch takes a model's config for a module
        if owner.config.get_text_config() is owner.config:
            return list(self.modules.items())
        root = f"{self.family.blocks.rpartition('.')[0]}."
        head = owner.get_output_embeddings()
        return [(n, m) for n, m in self.modules.items() if n.startswith(root) or m is head]

    def _cached_heads(self, block: Block) -> int:
        """Heads that the cache really holds: some families store a key once for each query head."""
        field = self.family.cached_by_query
        repeated = bool(field) and getattr(self.model.config, field)
        return block.query_heads if repeated else block.kv_heads
