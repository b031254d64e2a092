"""The logits of what a search scores, on what it scores, kept until a model of them has taken them in."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..pruning.history import History

# Logits of a plan that are kept, at most: a search holds those of all its plans, and predicts them for every proposal.
MOST_LOGITS = 2**16
# Plans whose logits wait to be taken in, at most: more than a search has scored between two fits.
MOST_PLANS = 64


class LogitCache:
    """Rows (n, C) of the outputs (N, C) on the scored images or tokens, evenly spread where N is too many.

    Args:
        dense: outputs (N, C) of the dense model as it is, which scores of kind `kl` are measured from.
        judged: a plan (history of widths) -> its outputs (N, C), for plans that were scored before.
    """

    def __init__(self, dense: Tensor, judged: Callable[[History], Tensor]) -> None:
        self._step = max(1, -(-dense.numel() // MOST_LOGITS))
        self._judged = judged
        self._kept: dict[History, Tensor] = {}
        self.dense = self._part(dense)

    def keep(self, history: History, outputs: Tensor) -> None:
        """Keep those of a plan that has just been scored."""
        self.keep_rows(history, self._part(outputs))

    def keep_rows(self, history: History, rows: Tensor) -> None:
        """Keep what `take` of another process's cache has handed over."""
        self._kept[history] = rows
        if len(self._kept) > MOST_PLANS:  # those of searches that take nothing
            del self._kept[next(iter(self._kept))]

    def take(self, history: History) -> Tensor:
        """Hand over those of a scored plan; what is not kept (any more) is computed again and is the same."""
        kept = self._kept.pop(history, None)
        return self._part(self._judged(history)) if kept is None else kept

    def _part(self, outputs: Tensor) -> Tensor:
        return outputs[:: self._step].clone()
