"""Causal language models as a workload: token sequences, perplexity, and a judge that reads logits in chunks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArtifactError, ConfigError, DataError
from ..files import read_json, write_json_atomic
from ..pruning.reconstruct import evaluating
from .base import SPLITS, Batch, Quality, Workload, check_split
from .data import cache_folder
from .judge import Judge, Judgement
from .logits import ChunkedLogs, next_token_loss
from .text import IGNORED, TextData

# Tokens of one forward pass: enough for a matrix product at full speed, few enough for the memory.
_FORWARD_TOKENS = {"cpu": 512, "cuda": 8192}
# Of the dense model's largest answers at a token these are a judgement's outputs.
OUTPUT_TOKENS = 16
# What a config says of where it came from, not of the architecture.
_ELSEWHERE = ("_name_or_path", "transformers_version", "quantization_config")
_FASTER = 1.3  # how much faster bfloat16 has to be to be taken


class LanguageWorkload(Workload):
    """A transformers causal LM, its tokenizer and a text.

    Batches are (input_ids (B, L), targets (B, L)) of int64 on the device; targets are the ids themselves,
    -100 where a token is context only; ``limit`` counts sequences. The metric is the perplexity, lower
    is better.

    Args:
        model: dense model, put into eval mode and moved to ``device``.
        tokenizer: what made the text's ids, saved beside the pruned model; None where there is none.
        data: the tokenised splits.
        batch_size: most sequences in a batch; long sequences come in smaller ones.
        base: how to rebuild the architecture; by default from the model's own config.
    """

    metric_name = "perplexity"
    language = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        data: TextData,
        *,
        name: str = "",
        batch_size: int = 256,
        device: torch.device | str = "cpu",
        base: dict[str, Any] | None = None,
    ) -> None:
        place = torch.device(device)
        self.model = model.to(place).eval()
        self.tokenizer = tokenizer
        self.data = data
        self.name = name or data.name
        self.base = base or base_of_model(model, self.name)
        self.logs = ChunkedLogs()
        self._place = place
        self._batch_size = batch_size
        self._dense_answers: dict[int, DenseAnswers] = {}
        self.example_inputs = data.splits["calibration"].window(0, 1)[0].to(place)

    @property
    def device(self) -> torch.device:
        return self._place

    @property
    def stride(self) -> int:
        """Tokens between the starts of two test sequences; the length where they do not overlap."""
        test = self.data.splits["test"]
        return test.length - test.overlap

    def length(self, split: str) -> int:
        """Tokens in a sequence of a split."""
        check_split(split)
        return self.data.splits[split].length

    def size(self, split: str) -> int:
        """Number of sequences of a split."""
        check_split(split)
        return len(self.data.splits[split])

    def protocol(self) -> dict[str, Any]:
        """What a perplexity of this workload means: text, length, stride, sequences and scored tokens."""
        splits = {}
        for split in SPLITS:
            part = self.data.splits[split]
            splits[split] = {
                "text": part.source,
                "length": part.length,
                "stride": part.length - part.overlap,
                "sequences": len(part),
                "tokens": part.scored,
            }
        return {"metric": "perplexity", "seed": self.data.seed, "splits": splits}

    def batches(self, split: str, limit: int | None = None) -> Iterator[Batch]:
        """Token ids (B, L) and targets (B, L), in the split's order."""
        part = self.data.splits[split]
        for start, stop in part.cuts(self.rows(split), limit):
            ids, targets = part.window(start, stop)
            yield ids.to(self._place), targets.to(self._place)

    def rows(self, split: str) -> int:
        """Sequences of a split in one batch."""
        tokens = _FORWARD_TOKENS.get(self._place.type, _FORWARD_TOKENS["cpu"])
        return max(1, min(self._batch_size, tokens // self.length(split)))

    def train_batches(self, generator: torch.Generator, batch_size: int | None = None) -> Iterator[Batch]:
        """One shuffled epoch; the last incomplete batch is left out unless it is the only one."""
        part = self.data.splits["train"]
        size = batch_size or self.rows("train")
        order = torch.randperm(len(part), generator=generator).tolist()
        for step in range(self.train_steps(size)):
            windows = [part.window(i, i + 1)[0] for i in order[step * size : (step + 1) * size]]
            ids = torch.cat(windows).to(self._place)
            yield ids, ids

    def train_steps(self, batch_size: int | None = None) -> int:
        """Number of batches of one epoch of ``train_batches``."""
        return max(1, self.size("train") // (batch_size or self.rows("train")))

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Mean next-token cross-entropy in nats; ``outputs`` is a transformers output or logits (B, L, V)."""
        return next_token_loss(outputs, targets)

    def metric(self, outputs: Any, targets: Tensor) -> Tensor:
        """Perplexity of the batch times its sequences; use ``evaluate`` for the perplexity of a split."""
        return self.loss(outputs, targets).exp() * len(targets)

    def evaluate(self, model: nn.Module, split: str, limit: int | None = None) -> Quality:
        """Mean loss and perplexity over all scored tokens of the first ``limit`` sequences.

        ``count`` is the number of scored tokens. With a stride this is the sliding window of
        transformers' perplexity guide (every token scored once, with the context that its window gives).
        """
        total, count = torch.zeros((), dtype=torch.float64), 0
        with torch.no_grad(), evaluating(model):
            for ids, targets in self.batches(split, limit):
                for start, stop, logs in self.logs(model, ids):
                    wanted = targets[:, 1:].flatten()[start:stop]
                    nll, kept = _nll(logs, wanted)
                    total += nll.double().sum().cpu()
                    count += int(kept.sum())
        if count == 0:
            raise DataError(f"workload {self.name!r}: the split {split!r} is empty")
        loss = float(total) / count
        return Quality(loss, perplexity(loss), count)

    def judge(self, kind: str = "kl", limit: int | None = None, *, top_k: int = 256) -> Judge:
        """The judge of candidates; ``accuracy`` has no meaning for a text and is a ConfigError."""
        if kind not in ("kl", "loss"):
            raise ConfigError(
                f"score.kind: {kind!r} is for classifiers; allowed for a language model: kl, loss"
            )
        count = self.size("validation") if limit is None else min(limit, self.size("validation"))
        answers = None
        if kind == "kl":
            answers = self._dense_answers.setdefault(top_k, DenseAnswers(self, top_k))
        return LanguageJudge(self, answers, count)


class DenseAnswers:
    """The dense model's ``top_k`` largest log-probabilities at every scored position of the validation split."""

    def __init__(self, workload: LanguageWorkload, top_k: int) -> None:
        self._workload, self._top_k = workload, top_k
        self._parts: list[tuple[Tensor, Tensor]] = []  # one a sequence: (L - 1, k) float32 and int32
        self._known = 0

    def __call__(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities and their token ids, ((stop - start) * (L - 1), k), of consecutive sequences."""
        if stop > self._known:
            self._extend(stop)
        values, indices = zip(*self._parts[start:stop], strict=True)
        return torch.cat(values), torch.cat(indices).long()

    def _extend(self, stop: int) -> None:
        workload = self._workload
        part, rows = workload.data.splits["validation"], workload.rows("validation")
        with torch.no_grad(), evaluating(workload.model):
            for start in range(self._known, stop, rows):
                ids = part.window(start, min(start + rows, stop))[0].to(workload.device)
                tops = []
                for _, _, logs in workload.logs(workload.model, ids):
                    tops.append(logs.topk(min(self._top_k, logs.shape[-1]), dim=-1))
                values = torch.cat([t.values for t in tops]).chunk(len(ids))
                indices = torch.cat([t.indices.int() for t in tops]).chunk(len(ids))
                self._parts += [(v.clone(), i.clone()) for v, i in zip(values, indices, strict=True)]
        self._known = stop


class LanguageJudge(Judge):
    """Scores sequences by -KL(dense || candidate) a token, or by -loss; the loss comes from the same pass.

    The divergence is taken over the dense model's top-k tokens and one bucket that holds the rest, which
    bounds the full divergence from below (data processing inequality) and equals it for k = vocabulary. With it come
    the outputs (tokens, OUTPUT_TOKENS + 1): log-probabilities of the first of those tokens and of all others together.
    """

    def __init__(self, workload: LanguageWorkload, answers: DenseAnswers | None, count: int) -> None:
        self._workload, self._answers, self._count = workload, answers, count

    def __call__(self, model: nn.Module, start: int = 0, stop: int | None = None) -> Judgement:
        workload, rows = self._workload, self._workload.rows("validation")
        part = workload.data.splits["validation"]
        last = self._count if stop is None else min(stop, self._count)
        scores, losses, outputs = [], [], []
        with torch.no_grad(), evaluating(model):
            for first in range(start, last, rows):
                until = min(first + rows, last)
                ids = part.window(first, until)[0].to(workload.device)
                score, nll, answers = self._batch(model, ids, first, until)
                outputs += answers
                scores.append(score.double().view(len(ids), -1).mean(dim=1).cpu())
                losses.append(nll.double().view(len(ids), -1).sum(dim=1).cpu())
        if not losses:
            raise DataError(f"workload {workload.name!r}: the split 'validation' is empty")
        count = (last - start) * (part.length - 1)
        loss = float(torch.cat(losses).sum()) / count
        return Judgement(
            torch.cat(scores), loss, perplexity(loss), count, torch.cat(outputs) if outputs else None
        )

    def merge(self, parts: Sequence[Judgement]) -> Judgement:
        """One judgement of consecutive parts; the perplexity is that of the joint loss."""
        joint = super().merge(parts)
        return replace(joint, metric=perplexity(joint.loss))

    def _batch(
        self, model: nn.Module, ids: Tensor, first: int, until: int
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Scores and losses of every scored token of a batch, (B * (L - 1),) each, and its outputs in parts."""
        wanted = ids[:, 1:].flatten()
        dense = None if self._answers is None else self._answers(first, until)
        scores, losses, outputs = [], [], []
        for start, stop, logs in self._workload.logs(model, ids):
            nll, _ = _nll(logs, wanted[start:stop])
            losses.append(nll)
            if dense is None:
                scores.append(-nll)
            else:
                shares, tokens = dense[0][start:stop], dense[1][start:stop]
                scores.append(-bucket_divergence(shares, tokens, logs))
                outputs.append(bucketed(tokens[:, :OUTPUT_TOKENS], logs).cpu())
        return torch.cat(scores), torch.cat(losses), outputs


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
    # What is left beside the top tokens; below 1e-7 it is rounding.
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
    kept = targets != IGNORED
    nll = -logs.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    return nll.where(kept, 0.0), kept


def base_of_model(model: Any, name: str) -> dict[str, Any]:
    """How to rebuild a transformers model: its config as plain JSON."""
    config = getattr(model, "config", None)
    if config is None:
        return {"source": "given"}
    plain: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    kept = {key: value for key, value in plain.items() if key not in _ELSEWHERE}
    return {"source": "transformers", "name": name, "config": kept}


def scoring_dtype(workload: Workload, wanted: str) -> torch.dtype | None:
    """Number format that candidates of a language model are scored in; None for other workloads.

    ``auto`` takes bfloat16 on a CPU only where a timed product of the model's size says that it is
    faster; the answer is kept in the cache folder, so that a resumed run decides as the first did.
    """
    if not workload.language:
        return None
    dense = next(workload.model.parameters()).dtype
    if wanted != "auto":
        return torch.float32 if wanted == "float32" else torch.bfloat16
    if dense != torch.float32:
        return dense
    if workload.device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else dense
    if workload.device.type != "cpu":
        return dense
    return torch.bfloat16 if _bf16_is_faster(workload.model) else dense


def _bf16_is_faster(model: nn.Module) -> bool:
    widest = max(
        (p for p in model.parameters() if p.ndim == 2 and p.shape[0] < 16 * p.shape[1]), key=Tensor.numel
    )
    about = [
        torch.__version__,
        torch.get_num_threads(),
        torch.backends.cpu.get_cpu_capability(),
        *widest.shape,
    ]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
    path = cache_folder() / "dtype" / f"{key}.json"
    with contextlib.suppress(ArtifactError, KeyError, TypeError):
        return bool(read_json(path)["bfloat16"])
    times = {dtype: _product_seconds(widest.detach(), dtype) for dtype in (torch.float32, torch.bfloat16)}
    faster = times[torch.bfloat16] * _FASTER < times[torch.float32]
    with contextlib.suppress(ArtifactError):  # the cache is a convenience
        write_json_atomic(path, {"bfloat16": faster, "about": about})
    return faster


def _product_seconds(weight: Tensor, dtype: torch.dtype) -> float:
    """Fastest of a few products of 256 rows with a weight."""
    right = weight.to(dtype).t()
    left = torch.ones(256, right.shape[0], dtype=dtype)
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return min(seconds)
