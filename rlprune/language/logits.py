"""Next-token log-probabilities of a causal LM, a few at a time: never a full (tokens, vocabulary) tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tuning.loss import CHUNK_TOKENS, TokenModel

_ELEMENTS = 1 << 21  # logits that exist at once, where the vocabulary is large
_LEAST = 16


def next_token_loss(outputs: object, targets: Tensor) -> Tensor:
    """Mean cross-entropy of every token but a sequence's first, given those before it (-100: left out).

    The same number as transformers' own ``model(input_ids, labels=targets).loss``; ``outputs`` is a
    transformers output, a tuple that begins with the logits, or the logits (B, L, V).
    """
    logits = logits_of(outputs)
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)


def logits_of(outputs: object) -> Tensor:
    """The logits (B, L, V) in what a causal language model returns: an output of transformers, a tuple, or them."""
    logits: Any = getattr(outputs, "logits", outputs)
    found: Tensor = logits if isinstance(logits, Tensor) else logits[0]
    return found


def rows_at_once(vocabulary: int) -> int:
    """Tokens whose logits exist at the same time."""
    return max(_LEAST, min(CHUNK_TOKENS, _ELEMENTS // vocabulary))


def _vocabulary(model: nn.Module, otherwise: int) -> int:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "vocab_size", otherwise))


class ChunkedLogs:
    """Runs a causal LM's trunk once and its output layer chunk by chunk.

    Whether a model can be split that way is found out once for each class. One that cannot is run whole,
    on a few sequences at a time.
    """

    def __init__(self) -> None:
        self._splits: dict[type, bool] = {}

    def __call__(self, model: nn.Module, ids: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Log-probabilities (n, V) float32 of the token after each position but the last of (B, L) ids.

        Yields (from, to, values) over the B * (L - 1) positions in row order; needs ``torch.no_grad``.
        """
        parts = TokenModel(model, self._splits.get(type(model)))
        split = self._splits[type(model)] = parts.splits(ids)
        rows, at = (len(ids) if split else max(1, CHUNK_TOKENS // ids.shape[1])), 0
        for row in range(0, len(ids), rows):
            hidden = parts.hidden(ids[row : row + rows])[:, :-1].flatten(0, 1)
            vocabulary = _vocabulary(model, hidden.shape[-1])
            for chunk in hidden.split(rows_at_once(vocabulary)):
                yield at, at + len(chunk), F.log_softmax(parts.head(chunk), dim=-1, dtype=torch.float32)
                at += len(chunk)
