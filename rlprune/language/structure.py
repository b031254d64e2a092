"""Adapters for model types that none is written for: parts are found by shape and role, and proved before use.

What is looked for in every block is a softmax attention (layers from the residual stream to heads, one layer back)
and a feed-forward part (one or two layers to neurons, one layer back). Names decide nothing. A guess is accepted only
if the cut model computes what the masked dense one computes, in float64, and generates the same tokens with and
without its cache. A part whose guess fails stays as it is, and says why.

Shapes: H hidden size, D head size, K key-value heads, R query heads to each of them, F neurons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn

from ..errors import GraphError, described
from ..pruning.space import PruningSpace
from . import families
from .families import Family, UnsupportedModel
from .linear import features, is_linear
from .proof import difference, random_plan, same_with_cache, twin_of
from .space import exact_space

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Found = TypeVar("Found")
_TOKENS = 12
_SEEDS = 2
_HEAD_MARKS = ("head_dim", "head_size", "attention_head_size", "num_heads", "n_heads", "num_attention_heads")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "num_query_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_NEURONS = (
    "intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "decoder_ffn_dim",
    "n_inner",
    "d_ff",
    "mlp_hidden_size",
)
_NOT_TEXT = ("vision", "visual", "image", "audio", "speech", "encoder")


def settle(model: nn.Module) -> None:
    """Make sure that the model's type has an entry in ``families.FAMILIES``: one that is there, or a proved guess.

    Raises:
        GraphError: no part of the model could be found, or none passed the proof; the module is named.
    """
    owner: Any = model  # torch takes a model's config for a module
    kind = getattr(owner.config, "model_type", "")
    if kind in families.FAMILIES or not hasattr(model, "get_output_embeddings"):
        return
    try:
        families.refuse_kind(model)
        _refuse_headless(model)
        guess = find(model)
        families.remember(kind, guess)
        families.remember(kind, _proved(_twin(model), kind, guess))
    except BaseException as error:
        if kind in families.FAMILIES:
            families.unregister(kind)
        if isinstance(error, UnsupportedModel):
            raise GraphError(str(error)) from None
        if isinstance(error, GraphError) or not isinstance(error, Exception):
            raise
        raise GraphError(  # a model's own code, of any kind
            f"{type(model).__name__}: its parts could not be told apart ({described(error)})"
        ) from error


def _refuse_headless(model: nn.Module) -> None:
    """A body, a classifier or an encoder: what is found in it could not be proved by generating."""
    generates = getattr(model, "can_generate", None)
    if generates is not None and not generates():
        raise UnsupportedModel(
            f"{type(model).__name__}: is no causal language model, which alone can be pruned "
            "(load one with AutoModelForCausalLM)"
        )


def _twin(model: nn.Module) -> nn.Module:
    try:
        return twin_of(model, matrices=True)
    except Exception as error:  # of an unknown kind of config, any kind of failure
        raise GraphError(
            f"{type(model).__name__}: no narrow model of its kind could be made to prove cuts on ({described(error)})"
        ) from error


# Guesses


@dataclass(frozen=True)
class _Guess:
    """The parts of one block: paths relative to it, names relative to the part; "" where there is none."""

    attention: str = ""
    rows: tuple[str, ...] = ()
    out: str = ""
    per_head: tuple[str, ...] = ()
    blocked: bool = False
    strange: str = ""  # why the attention's heads cannot be told apart by shape
    ffn: str | None = None
    up: tuple[str, ...] = ()
    down: str = ""
    fused_up: bool = False
    neurons: int = 0
    share: float = 0.0  # of the part's parameters that are in these layers
    crossed: str = ""  # why the neurons cannot be told apart


def find(model: nn.Module) -> Family:
    """The parts that most blocks agree on, unproved.

    Raises:
        UnsupportedModel: no list of blocks, or no block with a part of a known shape.
    """
    owner: Any = model
    text = owner.config.get_text_config()
    what = type(model).__name__
    path, layers = _blocks(model, text)
    guesses = [_guess(block, text) for block in layers]
    clear = [g for g in guesses if g.out and not g.strange] or [g for g in guesses if g.out]
    attention = _most((g.attention, g.rows, g.out, g.per_head, g.blocked) for g in clear)
    ffn = _most((g.ffn, g.up, g.down, g.fused_up) for g in guesses if g.down)
    if attention is None and ffn is None:
        raise UnsupportedModel(
            f"{what}: no softmax attention and no feed-forward part of a known shape in {path + '.0'!r} "
            f"({type(layers[0]).__name__})"
        )
    kept = {
        "attention": clear[0].strange if clear else "",
        "ffn": next((g.crossed for g in guesses if g.crossed and g.down), ""),
    }
    where, rows, out, per_head, blocked = attention or ("", (), "", (), False)
    inner, up, down, fused_up = ffn or ("", (), "", False)
    qkv, gates = (rows[:1], rows[1:]) if len(rows) < 3 else (rows[:3], rows[3:])
    neurons = next((g.neurons for g in guesses if g.down), 0)
    return Family(
        blocks=path, attention=where, qkv=qkv, blocked=blocked, out=out, ffn=inner or "", up=up, fused_up=fused_up,
        down=down, sizes=_sizes(text, neurons), gates=gates, per_query_head=per_head, optional=True, listed=True,
        kept=tuple((part, reason) for part, reason in kept.items() if reason),
    )  # fmt: skip


def _blocks(model: nn.Module, text: PreTrainedConfig) -> tuple[str, nn.ModuleList]:
    """The list of the language part's blocks."""
    depth = int(getattr(text, "num_hidden_layers", 0) or 0)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and all(any(is_linear(m) for m in block.modules()) for block in module)
    ]
    if not lists:
        raise UnsupportedModel(f"{type(model).__name__}: has no list of {depth} blocks with linear layers")
    found = [
        (name, module)
        for name, module in lists
        if not any(mark in part for part in name.split(".")[:-1] for mark in _NOT_TEXT)
    ] or lists  # some language models call their own blocks an encoder
    name, layers = max(found, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    return name, layers


def _guess(block: nn.Module, text: PreTrainedConfig) -> _Guess:
    heads = _value(text, _HEADS) or 0
    found = _Guess()
    for path, module in _parts(block):
        linears = {n: m for n, m in module.named_children() if is_linear(m)}
        if len(linears) < 2:
            continue
        if _has_heads(module):
            other = _attention(found, path, module, linears, heads)
            found = other if other.out and (not found.out or (found.strange and not other.strange)) else found
            continue
        found = max(
            found, _feed_forward(found, path, module, linears), key=lambda g: (not g.crossed, g.share)
        )
    return found


def _parts(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of a block that may be a part: those inside first, the block itself last."""
    for path, module in block.named_modules():
        if path and not is_linear(module) and "encoder_attn" not in path and "cross" not in path.lower():
            yield path, module
    yield "", block


def _has_heads(module: nn.Module) -> bool:
    marked = any(isinstance(module.__dict__.get(name), int) for name in _HEAD_MARKS)
    return marked or "Attention" in type(module).__name__


def _attention(
    found: _Guess, path: str, module: nn.Module, linears: Mapping[str, nn.Module], heads: int
) -> _Guess:
    """Softmax attention: the last layer to H is the way back, all others read the stream and have rows by heads."""
    hidden = Counter(features(m)[0] for m in linears.values()).most_common(1)[0][0]
    back = [n for n, m in linears.items() if features(m)[1] == hidden]
    if not path or not back:
        return found
    out = back[-1]
    width = features(linears[out])[0]
    rows = {n: features(m)[1] for n, m in linears.items() if n != out}
    size = _head_size(module) or width // max(1, heads)
    queries = width // size
    strange = ""
    odd = [n for n in rows if features(linears[n])[0] != hidden]
    known = {id(m.weight) for m in linears.values()}
    nested = [n for n, p in module.named_parameters() if p.ndim > 1 and id(p) not in known]
    if width % size or not queries:
        strange = f"{path!r}: its output layer's {width} columns are no whole heads of {size}"
    elif odd or nested:
        strange = f"{path!r}: {(odd + nested)[0]!r} is no layer from the residual stream to heads"
    elif len(rows) == 2 or not rows:
        strange = f"{path!r}: {len(rows)} layers lead to its heads; known: one fused, or three and gates"
    order = list(rows)
    if len(rows) >= 3:
        least = min(rows.values())
        keys = [
            n
            for n in rows
            if rows[n] % size == 0 and rows[n] == min(r for r in rows.values() if r % size == 0)
        ]
        if least < size and not keys:
            strange = strange or f"{path!r}: no layer has rows for whole heads of {size}"
        query = next((n for n in rows if n not in keys[-2:]), None)
        chosen = [query, *keys[-2:]] if query and len(keys) >= 2 else list(rows)[:3]
        order = [n for n in rows if n in chosen] + [n for n in rows if n not in chosen]
        order = chosen + order[3:] if query else order
    per_head = tuple(
        n
        for n, p in module.named_parameters(recurse=False)
        if p.ndim == 1 and p.numel() == queries and queries > 1
    )
    return replace(found, attention=path, rows=tuple(order), out=out, per_head=per_head, strange=strange)


def _head_size(module: nn.Module) -> int:
    for name in ("head_dim", "head_size", "attention_head_size"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return 0


def _feed_forward(found: _Guess, path: str, module: nn.Module, linears: Mapping[str, nn.Module]) -> _Guess:
    """One or two layers from the stream to F neurons and one back; fused: one layer to 2 F."""
    for down in reversed(list(linears)):
        neurons, hidden = features(linears[down])
        up = [n for n, m in linears.items() if n != down and features(m) == (hidden, neurons)]
        fused = [n for n, m in linears.items() if n != down and features(m) == (hidden, 2 * neurons)]
        if len(up) not in (1, 2) and len(fused) != 1:
            continue
        chosen = up or fused
        known = {id(p) for n in (*chosen, down) for p in linears[n].parameters()}
        crossing = [
            n for n, p in module.named_parameters() if id(p) not in known and neurons in p.shape and path
        ]
        crossed = f"{crossing[0].rpartition('.')[0] or crossing[0]!r} crosses all neurons" if crossing else ""
        inside = sum(p.numel() for p in module.parameters() if id(p) in known)
        share = inside / sum(p.numel() for p in module.parameters())
        return replace(
            found,
            ffn=path,
            up=tuple(chosen),
            down=down,
            fused_up=not up,
            neurons=neurons,
            share=share,
            crossed=crossed,
        )
    return found


def _most(items: Iterator[Found]) -> Found | None:
    counted = Counter(items).most_common(1)
    return counted[0][0] if counted else None


def _value(config: PreTrainedConfig, names: Sequence[str]) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _sizes(text: PreTrainedConfig, neurons: int) -> tuple[str, str | None, str]:
    heads = next((n for n in _HEADS if hasattr(text, n)), _HEADS[0])
    kv = next((n for n in _KV_HEADS if getattr(text, n, None) is not None), None)
    named = [n for n in _NEURONS if getattr(text, n, None) == neurons] or [
        n for n in _NEURONS if hasattr(text, n)
    ]
    return heads, kv, (named or _NEURONS)[0]


# Proofs


def _proved(twin: nn.Module, kind: str, guess: Family) -> Family:
    """The guess with what passed the proof, part by part; GraphError where nothing did."""
    what = type(twin).__name__
    reasons: dict[str, str] = {}
    for part in ("attention", "ffn"):
        if not (guess.out if part == "attention" else guess.down):
            continue
        passed = None
        for variant in _variants(guess, part):
            families.remember(kind, variant)
            reason = _why_not(twin, part)
            if reason is None:
                passed = variant
                break
            reasons.setdefault(part, reason)
        guess = (
            passed
            if passed is not None
            else _keeping(guess, part, reasons.get(part) or dict(guess.kept)[part])
        )
        families.remember(kind, guess)
    spaces = exact_space(twin, _TOKENS, True, {})
    if not spaces.groups:
        told = "; ".join(f"{where!r}: {why}" for where, why in list(spaces.protected.items())[:2])
        raise GraphError(f"{what}: nothing of it can be cut exactly ({told})")
    reason = same_with_cache(
        twin, [random_plan(spaces, np.random.default_rng(seed)) for seed in range(_SEEDS)]
    )
    if reason is not None:
        raise GraphError(f"{what}: {reason}; not supported")
    return guess


def _keeping(guess: Family, part: str, reason: str) -> Family:
    return replace(guess, kept=(*((p, r) for p, r in guess.kept if p != part), (part, reason)))


def _variants(guess: Family, part: str) -> Iterator[Family]:
    """What a part of this shape may be, likeliest first."""
    if part in dict(guess.kept):
        return
    readings = [guess]
    if part == "attention":
        if len(guess.qkv) == 1:
            readings.append(replace(guess, blocked=True))
        fields = ("num_attention_heads", "num_key_value_heads")
        readings += [replace(r, config_heads=fields) for r in tuple(readings)]
    for reading in readings:
        if part == "attention":
            yield from (replace(reading, returns=n) for n in (2, 0, 3))
        else:
            yield reading
    for reading in readings:
        yield replace(reading, undroppable=(*reading.undroppable, part))


def _why_not(twin: nn.Module, part: str) -> str | None:
    """Why cutting one kind of part is not exact; None where it is."""
    try:
        ignored = {
            name: "not now"
            for block in families.blocks_of(twin)
            for name in ((block.ffn,) if part == "attention" else (block.attention,))
            if name
        }
        space = exact_space(twin, _TOKENS, True, ignored)
        if not space.groups:
            return next((b.whole for b in families.blocks_of(twin) if b.whole), "it has nothing to cut")
        ids = torch.arange(2, 2 + _TOKENS)[None]
        for plan in _plans(space):
            reason = difference(twin, ids, plan)
            if reason is not None:
                return f"cutting it is not exact: {reason}"
    except UnsupportedModel as error:
        return str(error)
    except Exception as error:  # a wrong guess fails anywhere in a model's own code
        return f"a cut one cannot run: {described(error)}"
    return None


def _plans(space: PruningSpace) -> Iterator[Any]:
    for seed in range(_SEEDS):
        yield random_plan(space, np.random.default_rng(seed))
    if all(group.minimum == 0 for group in space.groups):
        yield replace(
            random_plan(space, np.random.default_rng(0)),
            widths=np.zeros_like(space.widths),
            kept=tuple(np.zeros(0, dtype=np.int64) for _ in space.groups),
        )
