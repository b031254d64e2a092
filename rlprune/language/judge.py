"""How a causal language model is judged: perplexity, and divergence to the dense model token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ..config.names import SCORE_KINDS
from ..errors import ConfigError, DataError
from ..utils.memory import return_freed_memory
from ..utils.modes import evaluating
from ..workloads.base import Quality, Workload
from ..workloads.judge import Judge, Judgement
from ..workloads.outcomes import token_outcomes
from ..workloads.score_kinds import registered, scored, takes_dense
from .logits import ChunkedLogs
from .text import IGNORED

# Tokens of one forward pass: enough for a matrix product at full speed, few enough for the memory.
FORWARD_TOKENS = {"cpu": 512, "cuda": 8192}
# Of the dense model's largest answers at a token these are a judgement's outputs.
OUTPUT_TOKENS = 16


class Sequences(Protocol):
    """Token sequences of one split, all of one length."""

    @property
    def length(self) -> int:
        """Tokens in a sequence."""
        ...

    @property
    def rows(self) -> int:
        """Sequences in a batch."""
        ...

    def __len__(self) -> int: ...
    def window(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Token ids and targets (-100: not scored), each (stop - start, L) int64 on the model's device."""
        ...


@dataclass(frozen=True)
class StoredSequences:
    """The sequences of any workload's split, read once.

    Shorter sequences are filled up at their ends: a causal model's answers before the filling do not depend on it.
    """

    ids: Tensor
    targets: Tensor
    device: torch.device

    @classmethod
    def read(cls, workload: Workload, split: str, limit: int | None = None) -> StoredSequences:
        """Read (input ids (B, L), targets (B, L)) batches; DataError where these are no token ids."""
        parts = []
        for ids, targets in workload.batches(split, limit):
            if not all(
                isinstance(t, Tensor) and t.ndim == 2 and not t.is_floating_point() for t in (ids, targets)
            ):
                raise DataError(
                    f"workload {workload.name!r}: a batch of a language model is (input ids, targets), both whole "
                    "numbers of shape (sequences, tokens); targets are the ids again, -100 where none is scored"
                )
            parts.append((ids.cpu(), targets.cpu()))
        if not parts:
            raise DataError(f"workload {workload.name!r}: the split {split!r} is empty")
        longest = max(ids.shape[1] for ids, _ in parts)
        sides = [
            torch.cat([_filled(part[i], longest, fill) for part in parts])
            for i, fill in ((0, 0), (1, IGNORED))
        ]
        return cls(sides[0], sides[1], workload.device)

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def rows(self) -> int:
        tokens = FORWARD_TOKENS.get(self.device.type, FORWARD_TOKENS["cpu"])
        return max(1, tokens // self.length)

    def __len__(self) -> int:
        return len(self.ids)

    def window(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self.ids[start:stop].to(self.device), self.targets[start:stop].to(self.device)


def check_kind(kind: str) -> None:
    """ConfigError for kinds of score that have no meaning for a text."""
    if kind not in ("kl", "loss") and not registered(kind, "language"):
        raise ConfigError(f"score.kind: {kind!r} is for classifiers; allowed for a language model: kl, loss")


def _filled(tokens: Tensor, length: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, length - tokens.shape[1]), value=fill)


def token_quality(
    workload: Workload, model: nn.Module, split: str, limit: int | None, logs: ChunkedLogs
) -> Quality:
    """Mean loss and perplexity over all scored tokens of the first ``limit`` sequences.

    ``count`` is the number of scored tokens. With a stride this is the sliding window of
    transformers' perplexity guide (every token scored once, with the context that its window gives).
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    parts: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad(), evaluating(model):
        for ids, targets in workload.batches(split, limit):
            of_batch: list[tuple[Tensor, Tensor]] = []
            for start, stop, values in logs(model, ids):
                wanted = targets[:, 1:].flatten()[start:stop]
                nll, kept = _nll(values, wanted)
                del values  # before the next ones are made
                total += nll.double().sum().cpu()
                count += int(kept.sum())
                of_batch.append((nll.cpu(), kept.cpu()))
            nll, kept = (torch.cat(each).view(len(ids), -1) for each in zip(*of_batch, strict=True))
            parts.append((nll, kept))
    if count == 0:
        raise DataError(f"workload {workload.name!r}: the split {split!r} is empty")
    loss = float(total) / count
    return Quality(loss, perplexity(loss), count, token_outcomes(parts) if split == "test" else None)


class DenseAnswers:
    """The dense model's ``top_k`` largest log-probabilities at every position of the validation sequences."""

    def __init__(self, model: nn.Module, sequences: Sequences, logs: ChunkedLogs, top_k: int) -> None:
        self._model, self._sequences, self._logs, self._top_k = model, sequences, logs, top_k
        self._parts: list[tuple[Tensor, Tensor]] = []  # one a sequence: (L - 1, k) float32 and int32
        self._known = 0

    def __call__(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities and their token ids, ((stop - start) * (L - 1), k), of consecutive sequences."""
        self.make(start, stop)
        values, indices = zip(*self._parts[start:stop], strict=True)
        return torch.cat(values), torch.cat(indices).long()

    def make(self, start: int, stop: int) -> None:
        """Run the dense model on what it has not read yet of consecutive sequences."""
        if stop > self._known:
            self._extend(stop)

    def _extend(self, stop: int) -> None:
        rows = self._sequences.rows
        with torch.no_grad(), evaluating(self._model):
            for start in range(self._known, stop, rows):
                ids, _ = self._sequences.window(start, min(start + rows, stop))
                tops = []
                for _, _, logs in self._logs(self._model, ids):
                    tops.append(logs.topk(min(self._top_k, logs.shape[-1]), dim=-1))
                    del logs  # before the next ones are made
                values = torch.cat([t.values for t in tops]).chunk(len(ids))
                indices = torch.cat([t.indices.int() for t in tops]).chunk(len(ids))
                self._parts += [(v.clone(), i.clone()) for v, i in zip(values, indices, strict=True)]
        self._known = stop
        return_freed_memory()  # candidates come on top of what is left


class LanguageJudge(Judge):
    """Scores sequences by -KL(dense || candidate) a token, or by -loss; the loss comes from the same pass.

    The divergence is taken over the dense model's top-k tokens and one bucket that holds the rest, which
    bounds the full divergence from below (data processing inequality) and equals it for k = vocabulary. With it come
    the outputs (tokens, OUTPUT_TOKENS + 1): log-probabilities of the first of those tokens and of all others together.

    Args:
        sequences: the first ``count`` of them are the validation samples.
        answers: of the dense model; None scores by the loss.
    """

    def __init__(
        self, sequences: Sequences, count: int, answers: DenseAnswers | None, logs: ChunkedLogs
    ) -> None:
        self._sequences, self._count, self._answers, self._logs = sequences, count, answers, logs

    def __call__(self, model: nn.Module, start: int = 0, stop: int | None = None) -> Judgement:
        rows, last = self._sequences.rows, self._count if stop is None else min(stop, self._count)
        scores, losses, outputs, count = [], [], [], 0
        with torch.no_grad(), evaluating(model):
            for first in range(start, last, rows):
                until = min(first + rows, last)
                ids, targets = self._sequences.window(first, until)
                wanted = targets[:, 1:]
                score, nll, answers = self._batch(model, ids, wanted.flatten(), first, until)
                outputs += answers
                kept = (wanted != IGNORED).to(score.device)  # the head may be on another device
                scores.append(_mean_of_kept(score.double().view(len(ids), -1), kept).cpu())
                losses.append(nll.double().view(len(ids), -1).sum(dim=1).cpu())
                count += int(kept.sum())
        if not count:
            raise DataError("the split 'validation' is empty: it has no token to score")
        loss = float(torch.cat(losses).sum()) / count
        return Judgement(
            torch.cat(scores), loss, perplexity(loss), count, torch.cat(outputs) if outputs else None
        )

    def ask_dense(self, start: int, stop: int | None) -> None:
        if self._answers is not None:
            self._answers.make(start, self._count if stop is None else min(stop, self._count))

    def merge(self, parts: Sequence[Judgement]) -> Judgement:
        """One judgement of consecutive parts; the perplexity is that of the joint loss."""
        joint = super().merge(parts)
        return replace(joint, metric=perplexity(joint.loss))

    def _batch(
        self, model: nn.Module, ids: Tensor, wanted: Tensor, first: int, until: int
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Scores and losses of every position of a batch, (B * (L - 1),) each, and the outputs of the scored ones."""
        dense = None if self._answers is None else self._answers(first, until)
        scores, losses, outputs = [], [], []
        for start, stop, logs in self._logs(model, ids):
            nll, kept = _nll(logs, wanted[start:stop])
            losses.append(nll)
            if dense is None:
                scores.append(-nll)
            else:
                shares, tokens = dense[0][start:stop], dense[1][start:stop]
                scores.append(-bucket_divergence(shares, tokens, logs))
                outputs.append(bucketed(tokens[:, :OUTPUT_TOKENS], logs)[kept].cpu())
            del logs  # before the next ones are made
        return torch.cat(scores), torch.cat(losses), outputs


class RegisteredLanguageJudge(LanguageJudge):
    """Scores sequences by a registered function of the log-probabilities (`rlprune.score_kind`)."""

    def __init__(
        self, sequences: Sequences, count: int, logs: ChunkedLogs, kind: str, dense: nn.Module
    ) -> None:
        super().__init__(sequences, count, None, logs)
        self._kind, self._dense = kind, dense
        self._compares = takes_dense(SCORE_KINDS.source(kind))

    def _batch(
        self, model: nn.Module, ids: Tensor, wanted: Tensor, first: int, until: int
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        ours = self._whole(model, ids)
        given: tuple[Tensor, ...] = (ours, wanted.view(len(ids), -1))
        if self._compares:
            with evaluating(self._dense):
                given = (*given, self._whole(self._dense, ids))
        scores = scored(self._kind, *given)
        nll, _ = _nll(ours.flatten(0, 1), wanted)
        return scores.repeat_interleave(ids.shape[1] - 1), nll, []

    def _whole(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Log-probabilities (B, L - 1, V) of every next token."""
        return torch.cat([logs.clone() for _, _, logs in self._logs(model, ids)]).view(
            len(ids), ids.shape[1] - 1, -1
        )


def _mean_of_kept(values: Tensor, kept: Tensor) -> Tensor:
    """Mean over the scored positions of each sequence, (B, L) -> (B,); 0 where none is."""
    if bool(kept.all()):
        return values.mean(dim=1)
    return (values * kept).sum(dim=1) / kept.sum(dim=1).clamp_min(1)


def bucket_divergence(dense: Tensor, tokens: Tensor, logs: Tensor) -> Tensor:
    """KL over k tokens and one bucket for the rest, (n,) float64, at n positions.

    ``dense`` (n, k) log-probabilities of the dense model at its top tokens ``tokens`` (n, k); ``logs``
    (n, V) log-probabilities of the candidate.
    """
    ours, dense = logs.gather(1, tokens).double(), dense.double()
    shares = dense.exp()
    inside = (shares * (dense - ours)).sum(dim=-1)
    if tokens.shape[-1] == logs.shape[-1]:
        return inside
    # What is left apart from the top tokens; below 1e-7 it is rounding.
    rest = (1 - shares.sum(dim=-1)).clamp_min(1e-7)
    mine = (1 - ours.exp().sum(dim=-1)).clamp_min(1e-7)
    return inside + rest * (rest.log() - mine.log())


def bucketed(tokens: Tensor, logs: Tensor) -> Tensor:
    """Log-probabilities (n, k + 1), float32, of ``tokens`` (n, k) and of all others together, from ``logs`` (n, V)."""
    ours = logs.gather(1, tokens).float()
    rest = (1 - ours.double().exp().sum(dim=-1, keepdim=True)).clamp_min(1e-7)
    return torch.cat([ours, rest.log().float()], dim=1)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 or math.isnan(loss) else math.inf


def _nll(logs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each target, 0 where it is left out, and which ones are not."""
    targets = targets.to(logs.device)
    kept = targets != IGNORED
    nll = -logs.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    return nll.where(kept, 0.0), kept
