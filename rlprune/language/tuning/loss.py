"""What a language model's training needs: the loss of next tokens in bounded memory, and a loop of AdamW.

The loop serves the short recovery of a candidate; the final fine-tune (``rlprune.experiments.tune``) shares the loss
and goes through transformers' Trainer.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import GraphError, RlpruneError
from ...recovery.finetune import FitResult, Progress, Schedule
from ...utils.modes import evaluating

CHUNK_TOKENS = 256
"""Tokens whose logits exist at the same time: the full (tokens, vocabulary) table is never made."""
SOFT = 0.75
"""Share of the distillation in the loss, as in ``finetune.DistillTargets``."""
ADAPTER_LR = 1e-4
"""Default peak learning rate of adapters (LLM-Pruner, arXiv 2305.11627)."""
FULL_LR = 2e-5
"""Default peak learning rate of all parameters (Adapt-Pruner, arXiv 2502.03460)."""
WARMUP = 0.05
_LOOK_SECONDS = 0.25


class TokenModel:
    """A causal language model as a trunk (ids -> hidden states) and a head (hidden states -> logits).

    The two are taken from the ``base_model`` and the output embeddings that transformers names, with the
    scaling and soft cap that some families apply to logits. The first batch proves that they give the
    model's own logits; a model for which they do not, or that has no such parts, is run whole.
    """

    def __init__(self, model: nn.Module, split: bool | None = None) -> None:
        self._model = model
        self._split = split  # known already, of another model of the class

    def splits(self, ids: Tensor) -> bool:
        """Whether trunk and head are the whole model; found out once, on a few of the token ids (B, L)."""
        if self._split is None:
            self._split = self._prove(ids[:1, :8])
        return self._split

    def hidden(self, ids: Tensor) -> Tensor:
        """Hidden states (B, L, H) of token ids (B, L); the logits (B, L, V) where the model has no head."""
        if not self.splits(ids):
            return _logits(self._model, ids)
        return self._model.base_model(input_ids=ids, use_cache=False)[0]  # type: ignore[operator]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of what `hidden` gave, (..., H)."""
        if not self._split:
            return hidden
        config: Any = self._model.config.get_text_config()  # type: ignore[operator, union-attr]
        logits: Tensor = self._model.get_output_embeddings()(hidden)  # type: ignore[operator]
        scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
        logits = logits * float(scale) if scale else logits  # Cohere
        logits = logits / float(divisor) if divisor else logits  # Granite
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        return logits if not cap else cap * torch.tanh(logits / cap)

    def _prove(self, ids: Tensor) -> bool:
        known = hasattr(self._model, "get_output_embeddings") and hasattr(self._model, "base_model")
        if not known or getattr(self._model, "base_model") is self._model:  # noqa: B009
            return False
        with torch.no_grad(), evaluating(self._model):
            self._split = True
            try:
                ours = self.head(self.hidden(ids))
            except (TypeError, AttributeError, RuntimeError):
                return False
            expected = _logits(self._model, ids)
        return ours.shape == expected.shape and torch.allclose(ours, expected, rtol=1e-4, atol=1e-5)


class TokenLoss:
    """Mean loss of the next tokens: cross-entropy, and distillation from a teacher where one is given.

    ``(1 - soft) * cross-entropy + soft * T^2 * KL(teacher || student)`` at temperature T (Hinton et al.
    2015, arXiv 1503.02531), over all tokens but the first of each sequence, or over those that targets name. Logits
    are made, used and dropped for `CHUNK_TOKENS` tokens at a time, and made again in the backward pass, so that memory
    does not grow with the batch times the vocabulary. The teacher keeps its device, its mode and its gradients.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        temperature: float = 2.0,
        soft: float = SOFT,
    ) -> None:
        self._student = TokenModel(student)
        self._teacher_model = teacher
        self._teacher = None if teacher is None else TokenModel(teacher)
        self._temperature = temperature
        self._soft = soft

    def __call__(self, ids: Tensor, targets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """The loss of token ids (B, L), a scalar tensor; raises RlpruneError for fewer than two tokens.

        Args:
            targets: (B, L), the ids again and -100 where a token is not learned; None for all tokens.
            weights: (B,) what a token of each sequence counts in a mean over the sequences; None for a mean over all
                tokens that are learned. With accumulated batches only weights give every token the same say.
        """
        if ids.ndim != 2 or ids.shape[1] < 2:
            raise RlpruneError(f"fine-tuning: token ids of shape {tuple(ids.shape)} hold no next token")
        kept = None if targets is None else targets[:, 1:].reshape(-1) != -100
        taught = self._taught(ids)
        hidden = self._student.hidden(ids)[:, :-1].flatten(0, 1)
        targets = ids[:, 1:].reshape(-1)
        each = None if weights is None else weights.repeat_interleave(ids.shape[1] - 1)
        if kept is not None:
            hidden, targets = hidden[kept.to(hidden.device)], targets[kept]
            taught = None if taught is None else taught[kept.to(taught.device)]
            each = None if each is None else each[kept]
        total = hidden.new_zeros((), dtype=torch.float32)
        if not len(targets):
            return total + 0.0 * hidden.sum()  # nothing to learn, but the backward pass needs a graph
        for start in range(0, len(targets), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            lesson = None if taught is None else taught[rows].to(hidden.device)
            part = checkpoint(
                self._rows,
                hidden[rows],
                targets[rows],
                lesson,
                None if each is None else each[rows].to(hidden.device),
                use_reentrant=False,
                preserve_rng_state=False,  # a head draws no random numbers
            )
            total = total + part
        return total / (len(targets) if each is None else len(ids))

    def _taught(self, ids: Tensor) -> Tensor | None:
        """The teacher's hidden states of the tokens that have a next one, (B (L-1), H)."""
        if self._teacher is None or self._teacher_model is None or self._soft == 0:
            return None
        with torch.no_grad(), evaluating(self._teacher_model):
            home = next(self._teacher_model.parameters()).device
            return self._teacher.hidden(ids.to(home))[:, :-1].flatten(0, 1)

    def _rows(self, hidden: Tensor, targets: Tensor, lesson: Tensor | None, weights: Tensor | None) -> Tensor:
        """Summed loss of some tokens: hidden (N, H), targets and weights (N,), the teacher's hidden states (N, H')."""
        logits = self._student.head(hidden).float()
        if weights is None:
            hard = F.cross_entropy(logits, targets, reduction="sum")
        else:
            hard = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
        if lesson is None or self._teacher is None or self._teacher_model is None:
            return hard
        t = self._temperature
        with torch.no_grad():
            home = next(self._teacher_model.parameters()).device
            wanted = F.log_softmax(self._teacher.head(lesson.to(home)).float().to(logits.device) / t, dim=-1)
        if wanted.shape != logits.shape:
            raise GraphError(
                f"distillation: the dense model has {wanted.shape[-1]} tokens, the pruned one {logits.shape[-1]}"
            )
        ours = F.log_softmax(logits / t, dim=-1)
        if weights is None:
            soft = F.kl_div(ours, wanted, reduction="sum", log_target=True)
        else:
            soft = (F.kl_div(ours, wanted, reduction="none", log_target=True).sum(-1) * weights).sum()
        return (1 - self._soft) * hard + self._soft * t * t * soft


def learned(ids: Tensor, targets: object) -> Tensor | None:
    """Targets (B, L) where they leave tokens of ``ids`` out (-100), else None: all are learned."""
    if (
        targets is ids
        or not isinstance(targets, Tensor)
        or targets.shape != ids.shape
        or not bool((targets[:, 1:] == -100).any())
    ):
        return None
    return targets


def train_language(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    steps: int,
    lr: float | None = None,
    weight_decay: float = 0.0,
    teacher: nn.Module | None = None,
    temperature: float = 2.0,
    seed: int = 0,
    progress: Progress | None = None,
    phase: str = "recovery",
) -> FitResult:
    """A few steps of AdamW on all parameters of a causal language model, in place; it is left in eval mode.

    Linear warm-up over the first 5% of the steps and a cosine to zero, gradients clipped to norm 1, as in
    Adapt-Pruner's interleaved training (arXiv 2502.03460). Weights of 16 bits are trained in 32 and
    rounded back at the end: steps of this size would be lost in them. On a CPU with a fixed number of
    threads the result depends on the batches and the seed alone; the global random state is left as it was.

    Args:
        batches: (input_ids (B, L), targets (B, L), -100 where none is learned); taken from the start again until the
            steps are done.
        lr: peak learning rate; None for 2e-5.
        teacher: distilled from where given (see `TokenLoss`).
        seed: of the dropout that a model may have.

    Raises RlpruneError for no batch or no step.
    """
    if steps < 1:
        raise RlpruneError("fine-tuning: at least one step is needed")
    started = time.monotonic()
    schedule = Schedule(steps, FULL_LR if lr is None else lr, 0.0, weight_decay, WARMUP)
    devices = [next(model.parameters()).device]
    with torch.random.fork_rng(devices=[d for d in devices if d.type == "cuda"]), full_precision(model):
        torch.manual_seed(seed)
        model.train()
        loss = TokenLoss(model, teacher, temperature)
        with torch.enable_grad():
            done, mean = _adamw(model, loss, batches, schedule, progress, phase)
    model.eval()
    return FitResult(done, mean, time.monotonic() - started)


@contextlib.contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """While active, parameters of 16 bits are held in 32; each is rounded back to its own format after."""
    before = {n: p.dtype for n, p in model.named_parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            if name in before:
                parameter.data = parameter.data.to(before[name])
                parameter.grad = None


def _adamw(
    model: nn.Module,
    loss: Callable[..., Tensor],
    batches: Iterable[tuple[Tensor, ...]],
    schedule: Schedule,
    progress: Progress | None,
    phase: str,
) -> tuple[int, float]:
    """All steps, fewer where it diverges; returns how many, and the mean loss of the last tenth."""
    # A dropped part keeps empty tensors, and norms that nothing reads: neither gets a gradient.
    trained = [p for p in model.parameters() if p.requires_grad and p.numel()]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=schedule.lr)
    last, done = time.monotonic(), 0
    recent: deque[Tensor] = deque(maxlen=max(1, schedule.steps // 10))
    for step, batch in zip(range(schedule.steps), _endless(batches), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        optimizer.zero_grad(set_to_none=True)
        value = loss(batch[0], learned(*batch[:2]) if len(batch) > 1 else None)
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        recent.append(value.detach())
        done = step + 1
        if done == schedule.steps or time.monotonic() - last > _LOOK_SECONDS:
            last, now = time.monotonic(), float(value.detach())
            if progress is not None:
                progress(phase, done, schedule.steps, {"loss": now})
            if not math.isfinite(now):
                break
    optimizer.zero_grad(set_to_none=True)
    return done, float(torch.stack(list(recent)).mean())


def _endless(batches: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    kept = batches if isinstance(batches, (list, tuple)) else list(batches)
    if not kept:
        raise RlpruneError("fine-tuning: the train split gives no batch")
    while True:
        yield from kept


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    outputs = model(ids)
    logits: Tensor = getattr(outputs, "logits", outputs)
    return logits
