"""How much memory preparing and searching take, from formulas over the model's shapes: nothing is run.

What is added up is what is in memory at the same time, in bytes. ``docs/memory.md`` compares it with measured peaks and
says where every term comes from. Symbols: H hidden size, V vocabulary, B blocks, e bytes of a weight; a group's
consumer (output or down projection) reads I inputs and gives O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from ..config.config import AUTO, Config
from ..pruning.space import PruningSpace
from .calibration.cache import default_importance
from .calibration.grams import Consumer, unit_consumers
from .describe import embeddings
from .judge import FORWARD_TOKENS
from .logits import rows_at_once
from .text import DRAWN

FLOAT, DOUBLE = 4, 8
# Kept for every token and block by a backward pass that no parameter takes part in: (multiples of H, of neurons).
_SAVED = (14, 5)
# The same of a forward pass, of which one block's exist at a time.
_PASSING = (8, 3)
# Square matrices in float64 that an elimination has at its peak, and a factorisation.
_ELIMINATION, _FACTORISATION = 4, 3
# Tables of (tokens, V) in float32 in addition to the logits of a backward pass, and in addition to those of a score.
_LOSS_TABLES, _SCORE_TABLES = 4, 2
_SPREAD = {"weights", "factors", "candidate", "output moments", "gradients", "backward pass"}
_WITHOUT_GRADIENTS = ("l1", "l2", "bn_scale", "random", "wanda_sp", "flap", "obs")
# On a CPU: tokenizer, text and what Python keeps of reading them; and the products that oneDNN compiles.
_PROCESS, _KERNELS = 120_000_000, 90_000_000


@dataclass(frozen=True)
class Footprint:
    """Bytes of what is in memory at the peaks of preparing and of searching, by name.

    They lie on the device of the model, all devices of a device map together; on a CPU they come on top of what Python
    and its libraries take after the imports.
    """

    prepare: dict[str, float]
    search: dict[str, float]
    spilled: float = 0.0
    """Bytes on disk (``recovery.spill``)."""
    lower: tuple[dict[str, float], ...] = ()
    """Further peaks of preparing, which take less in all; on one of several devices they may take more."""

    @property
    def prepare_peak(self) -> float:
        return sum(self.prepare.values())

    @property
    def search_peak(self) -> float:
        return sum(self.search.values())

    def fullest(self, devices: int) -> tuple[float, float]:
        """Bytes of the fullest of equal devices at the peaks of preparing and of searching.

        Weights, factors and what a backward pass keeps of each block lie where the block lies (`model.device_map`:
        balanced); one device solves, and one makes the logits.
        """

        def most(parts: dict[str, float]) -> float:
            return sum(value / devices if name in _SPREAD else value for name, value in parts.items())

        return max(map(most, (self.prepare, *self.lower))), most(self.search)

    def lines(self) -> list[str]:
        """One line for each peak, and one for the disk."""
        found = [
            f"memory, {name}: {size(sum(parts.values()))} at the peak ({_parts(parts)})"
            for name, parts in (("prepare", self.prepare), ("search", self.search))
        ]
        if self.spilled:
            found.append(f"disk, recovery.spill: {size(self.spilled)}")
        return found


def _parts(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {size(value)}" for name, value in parts.items() if value >= 5e5)


def size(count: float) -> str:
    """A number of bytes in words, in powers of ten."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def footprint(
    model: nn.Module, space: PruningSpace, config: Config, *, device: str = "cpu", element: int | None = None
) -> Footprint:
    """Predicted peaks of `rlprune train` on a causal language model; it may be on ``meta``.

    Args:
        config: ``data`` (lengths and numbers of sequences), ``prune.importance``, ``recovery``, ``score``, ``budget``.
        device: type of the device that computes.
        element: bytes of a weight; None for what ``model.dtype`` says.
    """
    shapes = _Shapes(model, space, config, device, element)
    spilled = shapes.factors if config.recovery.spill is not None else 0.0
    prepare, *lower = sorted(_prepare(shapes), key=lambda parts: -sum(parts.values()))
    return Footprint(prepare, _search(shapes), spilled, tuple(lower))


class _Shapes:
    """What the formulas read of a model and of the settings."""

    def __init__(
        self, model: nn.Module, space: PruningSpace, config: Config, device: str, element: int | None
    ) -> None:
        self.model, self.space, self.config, self.device = model, space, config, device
        self.element = element or (2 if config.model.dtype == "bfloat16" else FLOAT)
        self.params = space.dense_cost("params")
        self.sizes = [_inputs_outputs(model, c) for c in unit_consumers(space)]
        owner: Any = model
        self.hidden = self.sizes[0][1] if self.sizes else int(owner.config.get_text_config().hidden_size)
        table = embeddings(model).get("output")
        self.vocabulary = int(table.shape[0]) if table is not None else self.hidden
        self.blocks = max(len({group.block for group in space.groups if group.block >= 0}), 1)
        self.neurons = max((i for i, _ in self.sizes), default=0)
        self.length = config.data.sequence_length
        cut = {c.tensor for c in space.cuts}
        self.uncut = float(sum(p.numel() for n, p in model.named_parameters() if n not in cut))

    @property
    def importance(self) -> str:
        """The importance by name, also where the settings leave it open."""
        named = self.config.prune.importance
        return default_importance(self.space).name if named == AUTO else named

    def passing(self, tokens: int, element: int) -> float:
        """Activations of one block at a time over some tokens."""
        return tokens * element * (_PASSING[0] * self.hidden + _PASSING[1] * self.neurons)

    @property
    def batch(self) -> int:
        """Tokens of one forward pass."""
        most = FORWARD_TOKENS.get(self.device, FORWARD_TOKENS["cpu"])
        return max(1, most // self.length) * self.length

    @property
    def factors(self) -> float:
        """Bytes of the closed form: two triangles share a buffer of I (I + 1)."""
        if "reconstruct" not in self.config.recovery.steps:
            return 0.0
        inputs = [i for i, _ in self.sizes]
        return FLOAT * float(sum(-(-inputs.count(i) // 2) * i * (i + 1) for i in set(inputs)))

    @property
    def waiting(self) -> float:
        """What of the factors is in memory while they are made, and spilled: triangles that have no second one yet."""
        inputs = [i for i, _ in self.sizes]
        return FLOAT * float(sum((inputs.count(i) % 2) * i * (i + 1) for i in set(inputs)))

    @property
    def process(self) -> float:
        return _PROCESS if self.device == "cpu" else 0.0


def _inputs_outputs(model: nn.Module, consumer: Consumer) -> tuple[int, int]:
    inputs, outputs = consumer.matrix(model).shape
    return int(inputs), int(outputs)


def _prepare(shapes: _Shapes) -> list[dict[str, float]]:
    """The peaks of preparing: the walk from block to block when it has come to the last of them, and the backward pass
    of `obs_fisher` or of an importance by gradients."""
    config = shapes.config
    weights = {"weights": shapes.params * shapes.element, "process": shapes.process}
    spill = config.recovery.spill is not None
    kept = shapes.waiting if spill else shapes.factors
    moments = FLOAT * float(sum(o * o for _, o in shapes.sizes))
    peaks = [weights | {"factors": kept} | _walk(shapes)]
    importance = shapes.importance
    if importance == "obs_fisher":
        peaks[0] |= {"output moments": moments}
        peaks.append(weights | {"output moments": moments} | _backward(shapes))
    elif importance not in _WITHOUT_GRADIENTS:
        gradients = shapes.params * shapes.element
        peaks.append(weights | {"gradients": gradients} | _backward(shapes))
    return peaks


def _walk(shapes: _Shapes) -> dict[str, float]:
    """Apart from weights and factors: the streams of all calibration tokens, one block's Gram matrices, what is made
    of the widest of them, and the activations of a batch."""
    importance, steps = shapes.importance, shapes.config.recovery.steps
    if not shapes.sizes or ("reconstruct" not in steps and importance not in ("obs", "obs_fisher")):
        return {"activations": shapes.passing(shapes.batch, shapes.element)}
    sequences = shapes.config.recovery.samples or shapes.config.data.calibration or DRAWN
    stream = sequences * shapes.length * shapes.hidden * shapes.element
    each = len(shapes.sizes) // shapes.blocks or 1
    per_block: Sequence[float] = [
        sum(FLOAT * float(i * i) for i, _ in shapes.sizes[at : at + each])
        for at in range(0, len(shapes.sizes), each)
    ]
    wide, out = max(shapes.sizes)
    squares = _ELIMINATION if importance in ("obs", "obs_fisher") else _FACTORISATION
    work = DOUBLE * float(squares * wide * wide + 2 * wide * out)
    return {
        "streams": float(stream),
        "one block's Gram matrices": max(per_block),
        "solving": max(work, shapes.passing(shapes.batch, shapes.element)),
    }


def _backward(shapes: _Shapes) -> dict[str, float]:
    """One sequence: what every block keeps, and the tables of its logits."""
    batch = 1 if shapes.importance == "obs_fisher" else shapes.batch // shapes.length
    tokens = batch * shapes.length
    per_token = _SAVED[0] * shapes.hidden + _SAVED[1] * shapes.neurons
    tables = tokens * shapes.vocabulary * (shapes.element + _LOSS_TABLES * FLOAT)
    kept = tokens * per_token * shapes.blocks * shapes.element
    return {"backward pass": float(kept), "tables of the loss": float(tables)}


def _search(shapes: _Shapes) -> dict[str, float]:
    """Weights, factors, the dense model's answers, one candidate and what judging it takes."""
    config, space = shapes.config, shapes.space
    uniform = space.project(np.ones(len(space.groups)), config.budget.target, _metric(config, space))
    params = space.cost(uniform, "params")
    score = 2 if scores_in_bfloat16(config, shapes.element) else FLOAT
    # What no plan cuts is the dense model's own, or one copy in the format of the scores.
    candidate = (params - (shapes.uncut if score == shapes.element else 0.0)) * score
    chunk = rows_at_once(shapes.vocabulary)
    tables = chunk * shapes.vocabulary * (score + _SCORE_TABLES * FLOAT)
    # oneDNN reads weights in bfloat16 in an order of its own.
    repacked = shapes.vocabulary * shapes.hidden * score if shapes.device == "cpu" and score == 2 else 0
    sequences = config.score.samples or config.data.validation or DRAWN
    answers = sequences * (shapes.length - 1) * min(config.score.top_k, shapes.vocabulary) * 2 * FLOAT
    judging = tables + repacked + shapes.passing(shapes.batch, score)
    return {
        "weights": shapes.params * shapes.element,
        "process": shapes.process + (_KERNELS if shapes.device == "cpu" else 0.0),
        "factors": 0.0 if config.recovery.spill is not None else shapes.factors,
        "candidate": float(candidate),
        "judging": float(judging),
        "dense answers": float(answers if config.score.kind == "kl" else 0),
    }


def _metric(config: Config, space: PruningSpace) -> str:
    """A metric that needs no table of times: a share of them cannot be told from shapes."""
    return config.budget.metric if config.budget.metric in space.costs else "params"


def scores_in_bfloat16(config: Config, element: int) -> bool:
    """Whether candidates are taken to be scored in bfloat16: `auto` measures which format is faster, mostly this."""
    return element == 2 or config.score.dtype != "float32"
