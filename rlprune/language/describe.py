"""What a causal language model costs, in words: its groups, its costs with their denominators, its speeds."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config.names import COST_METRICS
from ..pruning.space import PruningSpace
from .families import Family, UnsupportedModel, blocks_of

Row = tuple[str, float, float, str]
"""One line of `comparison`: name, figure of the dense model, of the pruned one, number format."""

COST_NOTES = {
    "macs": "one sequence of {length:,} tokens",
    "params": "all of the model, tied ones once",
    "block_params": "those of the {blocks} blocks only",
    "kv_cache": "bytes for a token of context, in bfloat16",
}
"""What each cost counts: a share of it means nothing without."""


def group_lines(space: PruningSpace) -> list[str]:
    """The groups as a table with one line for each set of blocks whose groups are alike.

    Groups are alike when they differ in the number of their block only: same kind, width, unit, minimum,
    step and costs of a unit. A 30-block model of equal blocks takes two lines.
    """
    metrics = [m for m in ("params", "macs", "kv_cache") if m in space.costs]
    units = {metric: space.unit_costs(space.widths, metric) for metric in metrics}
    alike: dict[tuple[Any, ...], list[int]] = {}
    for index, g in enumerate(space.groups):
        name = re.sub(rf"(?<![^.]){g.block}(?![^.])", "*", g.name, count=1) if g.block >= 0 else g.name
        costs = tuple(round(float(units[metric][index])) for metric in metrics)
        alike.setdefault((name, g.kind, g.width, g.unit, g.minimum, g.step, *costs), []).append(index)
    total = space.dense_cost("params")
    wide = max([len(str(key[0])) for key in alike] + [len("group")])
    blocks = {key: ranges(space.groups[i].block for i in found) for key, found in alike.items()}
    broad = max([len(text) for text in blocks.values()] + [len("blocks")])
    head = (
        f"{'group':<{wide}} {'kind':<10} {'blocks':<{broad}} {'width':>6} {'unit':>6} {'min':>5} {'step':>5}"
    )
    lines = [head + "".join(f" {metric + '/unit':>14}" for metric in metrics) + f" {'of params':>10}"]
    for key, found in alike.items():
        (name, kind, width, unit, minimum, step), costs = key[:6], key[6:]
        # One unit's parameters times the width: the part of the model that these groups rule together.
        share = len(found) * width * costs[0] / total
        sizes = f"{width:>6,} {unit:>6,} {minimum:>5} {step:>5}" + "".join(f" {c:>14,}" for c in costs)
        lines.append(f"{name:<{wide}} {kind:<10} {blocks[key]:<{broad}} {sizes} {share:>10.1%}")
    return lines


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in a row as text: ``0-3,7``; "-" for those below 0 (a group of no block)."""
    rows: list[list[int]] = []
    for number in sorted(n for n in numbers if n >= 0):
        if rows and number == rows[-1][1] + 1:
            rows[-1][1] = number
        else:
            rows.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in rows) or "-"


def protected_lines(protected: Mapping[str, str]) -> list[str]:
    """One line for the parts that are alike in all blocks, with how many there are."""
    counts: dict[tuple[str, str], int] = {}
    for name, reason in protected.items():
        key = (re.sub(r"(?<![^.])\d+(?![^.])", "*", name), reason)
        counts[key] = counts.get(key, 0) + 1
    return [
        f"protected: {name}{f' ({n} times)' if n > 1 else ''}: {why}" for (name, why), n in counts.items()
    ]


def cost_lines(space: PruningSpace, model: nn.Module) -> list[str]:
    """Dense costs, what each of them counts, and the feasible budgets."""
    length = space.input_shape[-1] if space.input_shape else 0
    blocks = max((group.block for group in space.groups), default=-1) + 1
    owner: Any = model
    text = owner.config.get_text_config() if hasattr(owner, "config") else None
    blocks = getattr(text, "num_hidden_layers", blocks)
    facts = {"length": length, "blocks": blocks}
    lines = []
    for metric in (m for m in space.costs if m != "latency"):  # its line says where it was measured
        low, dense = space.feasible(metric)
        note = (COST_NOTES.get(metric) or COST_METRICS[metric].summary).format(**facts)
        budgets = f"feasible budgets {low / dense:.4f} to 1 ({low:,.0f} to {dense:,.0f})"
        lines.append(f"{metric}: dense {dense:,.0f} ({note}); {budgets}")
    lines.append(_shares(space, model))
    lines += other_parts(model)
    context = context_length(getattr(model, "config", None))
    if context and "kv_cache" in space.costs:
        per_token = space.dense_cost("kv_cache")
        lines.append(
            f"kv cache at the context length of {context:,} tokens: {_bytes(per_token * context)} a sequence"
        )
    return lines


def other_parts(model: nn.Module) -> list[str]:
    """What of a model stands apart from its language part, in one line; nothing for a plain language model."""
    try:
        root = blocks_of(model)[0].path.rpartition(".")[0].rpartition(".")[0]
    except (UnsupportedModel, AttributeError):
        return []
    parent = root.rpartition(".")[0]
    if not parent:
        return []
    inside = {id(p) for p in model.get_submodule(root).parameters()}
    beside = {
        name: sum(p.numel() for p in part.parameters() if id(p) not in inside)
        for name, part in model.get_submodule(parent).named_children()
        if f"{parent}.{name}" != root
    }
    named = ", ".join(f"{parent}.{name} ({count:,} params)" for name, count in beside.items() if count)
    return [f"outside the language part, kept as they are and not used by texts: {named}"] if named else []


def family_line(family: Family) -> str:
    """What is cut in the blocks of a family, in one line."""
    kept = dict(family.kept)
    heads = "stays" if "attention" in kept else "whole" if family.whole else "by key-value heads"
    neurons = "stays" if "ffn" in kept else "by neurons"
    ffn = family.ffn or ", ".join((*family.up, family.down))
    return f"{family.blocks}: {family.attention or 'no attention'} {heads}, {ffn} {neurons}"


def _shares(space: PruningSpace, model: nn.Module) -> str:
    """Where the parameters are: embeddings cannot be pruned, so they bound every budget of params."""
    total = space.dense_cost("params")
    inside = space.dense_cost("block_params") if "block_params" in space.costs else 0.0
    tensors = embeddings(model)
    tied = len({id(t) for t in tensors.values()}) < len(tensors)
    count = sum(t.numel() for t in {id(t): t for t in tensors.values()}.values())
    rest = total - inside - count
    kind = "one for input and output" if tied else " and ".join(tensors)
    return (
        f"of the params: embeddings {count:,} ({count / total:.1%}, {kind}), blocks {inside:,.0f} "
        f"({inside / total:.1%}), other {rest:,.0f} ({rest / total:.1%})"
    )


def embeddings(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the input and output embeddings: {"input": ..., "output": ...}; one tensor when tied."""
    found: dict[str, Tensor] = {}
    for side in ("input", "output"):
        module = getattr(model, f"get_{side}_embeddings", lambda: None)()
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            found[side] = weight
    if bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False)) and len(found) == 2:
        found["output"] = found["input"]  # models on the meta device are not tied yet
    return found


def context_length(config: object) -> int | None:
    """Tokens that a model was made for, where its config (an object or its fields) says so."""
    owner: Any = config
    if not isinstance(config, Mapping) and hasattr(config, "get_text_config"):
        owner = owner.get_text_config()
    for field in ("max_position_embeddings", "n_positions", "seq_length", "n_ctx"):
        value = owner.get(field) if isinstance(owner, Mapping) else getattr(owner, field, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,.0f} bytes"


def decoding_speed(
    models: Mapping[str, nn.Module],
    prompt: Tensor,
    tokens: int = 8,
    rounds: int = 9,
    seconds: float = 10.0,
) -> dict[str, float]:
    """Median tokens per second of greedy decoding with a cache, one sequence.

    Every model reads the prompt once; then the models decode ``tokens`` tokens in turns, their caches
    growing alike, the first turn uncounted.

    Args:
        models: name -> transformers causal LM.
        prompt: token ids, shape (1, L); with all that is decoded it must fit the models' context.
        rounds: turns that count, at most; at least three are taken, then ``seconds`` may end it.
    """
    states = {name: _Decoder(model, prompt) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    deadline = time.perf_counter() + seconds
    for turn in range(rounds + 1):
        if turn > 3 and time.perf_counter() > deadline:
            break
        for name in list(states) if turn % 2 == 0 else list(states)[::-1]:
            took = states[name].decode(tokens)
            if turn:
                times[name].append(took)
    return {name: tokens / statistics.median(taken) for name, taken in times.items()}


def decoding_plan(length: int, context: int | None) -> tuple[int, int, int]:
    """Prompt length, tokens a turn and turns that fit a context of ``context`` tokens."""
    room = context or 2048
    prompt = max(1, min(length, 64, room // 2))
    tokens = max(1, min(8, (room - prompt) // 5))
    return prompt, tokens, max(1, min(9, (room - prompt) // tokens - 1))


class _Decoder:
    """A model with the cache of what it has read so far."""

    def __init__(self, model: nn.Module, prompt: Tensor) -> None:
        self._model = model
        with torch.inference_mode():
            output = model(prompt, use_cache=True)
        # Since transformers 5.24 the argument and the field are called `cache`.
        self._name = "cache" if "cache" in output else "past_key_values"
        self._cache = output[self._name]
        self._next = output.logits[:, -1:].argmax(-1)

    def decode(self, tokens: int) -> float:
        """Decode some tokens; the seconds it took."""
        start = time.perf_counter()
        with torch.inference_mode():
            for _ in range(tokens):
                output = self._model(self._next, use_cache=True, **{self._name: self._cache})
                self._cache, self._next = output[self._name], output.logits[:, -1:].argmax(-1)
        if self._next.is_cuda:  # kernels are queued; the clock has to wait for them
            torch.cuda.synchronize(self._next.device)
        return time.perf_counter() - start


def comparison(rows: Sequence[Row], before: str = "dense") -> list[str]:
    """A table of figures of two models with their ratio; ``before`` heads those of the first."""
    wide = max(len(name) for name, *_ in rows)
    lines = [f"{'':<{wide}} {before:>18} {'pruned':>18} {'pruned/' + before:>13}"]
    for name, dense, pruned, form in rows:
        ratio = f"{pruned / dense:>13.4f}" if dense else f"{'-':>13}"
        lines.append(f"{name:<{wide}} {dense:>18{form}} {pruned:>18{form}} {ratio}")
    return lines
