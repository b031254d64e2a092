"""A causal language model and a text as a workload: token sequences, and what a perplexity of them means."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config.config import ModelConfig
from ..recovery.finetune import FitResult, Progress
from ..workloads.adapter import ModelAdapter, adapter_named
from ..workloads.base import SPLITS, Batch, Quality, TrainedWorkload, check_split
from ..workloads.judge import Judge
from ..workloads.score_kinds import registered
from .judge import (
    FORWARD_TOKENS,
    DenseAnswers,
    LanguageJudge,
    RegisteredLanguageJudge,
    check_kind,
    token_quality,
)
from .linear import tensor_of
from .logits import ChunkedLogs
from .stored import Stored
from .text import TextData
from .tuning.loss import train_language

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a config says of where it came from, not of the architecture.
_ELSEWHERE = ("_name_or_path", "transformers_version", "quantization_config")


class LanguageWorkload(TrainedWorkload):
    """A transformers causal LM, its tokenizer and a text.

    Batches are (input_ids (B, L), targets (B, L)) of int64 on the device; targets are the ids themselves,
    -100 where a token is context only; ``limit`` counts sequences. The metric is the perplexity, lower
    is better.

    Args:
        model: dense model, put into eval mode and moved to ``device``, unless accelerate has spread it over several.
        tokenizer: what made the text's ids, saved next to the pruned model; None where there is none.
        data: the tokenised splits.
        batch_size: most sequences in a batch; long sequences come in smaller ones.
        base: how to rebuild the architecture; by default from the model's own config.
        stored: how the checkpoint holds its weights, where they were read from one.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        data: TextData,
        *,
        name: str = "",
        batch_size: int = 256,
        device: torch.device | str = "cpu",
        base: Mapping[str, object] | None = None,
        stored: Stored | None = None,
    ) -> None:
        spread = getattr(model, "hf_device_map", None)  # accelerate has put the layers where they are to stay
        place = torch.device(device) if spread is None else input_device(model)
        self.model = (model if spread is not None else model.to(place)).eval()
        self.tokenizer = tokenizer
        self.data = data
        self.name = name or data.name
        self.base = base or base_of_model(model, self.name)
        self.stored = stored
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
                **({"prompt": len(part.prompt)} if part.prompt is not None else {}),
                **({"scored": part.scores, "examples": dict(part.examples)} if part.examples else {}),
            }
        return {"metric": "perplexity", "seed": self.data.seed, "splits": splits}

    def batches(self, split: str, limit: int | None = None) -> Iterator[Batch]:
        """Token ids (B, L) and targets (B, L), in the split's order."""
        part = self.data.splits[split]
        for start, stop in part.cuts(self.rows(split), limit):
            yield self._placed(*part.window(start, stop))

    def rows(self, split: str) -> int:
        """Sequences of a split in one batch."""
        tokens = FORWARD_TOKENS.get(self._place.type, FORWARD_TOKENS["cpu"])
        return max(1, min(self._batch_size, tokens // self.length(split)))

    def train_batches(self, generator: torch.Generator, batch_size: int | None = None) -> Iterator[Batch]:
        """One shuffled epoch; the last incomplete batch is left out unless it is the only one."""
        part = self.data.splits["train"]
        size = batch_size or self.rows("train")
        order = torch.randperm(len(part), generator=generator).tolist()
        for step in range(self.train_steps(size)):
            windows = [part.window(i, i + 1) for i in order[step * size : (step + 1) * size]]
            ids = torch.cat([window for window, _ in windows])
            whole = all(targets is window for window, targets in windows)
            yield self._placed(ids, ids if whole else torch.cat([targets for _, targets in windows]))

    def _placed(self, ids: Tensor, targets: Tensor) -> Batch:
        """A batch on the model's device. Targets that are the ids stay the same tensor: whether some are left out is
        then known without asking the device."""
        placed = ids.to(self._place)
        return placed, placed if targets is ids else targets.to(self._place)

    def train_steps(self, batch_size: int | None = None) -> int:
        """Number of batches of one epoch of ``train_batches``."""
        return max(1, self.size("train") // (batch_size or self.rows("train")))

    @property
    def adapter(self) -> ModelAdapter:
        return adapter_named("language")

    def judge(self, kind: str = "kl", limit: int | None = None, *, top_k: int = 256) -> Judge:
        """The judge of candidates; the dense model's answers are shared by all judges of one ``top_k``."""
        check_kind(kind)
        sequences = _Split(self, "validation")
        count = len(sequences) if limit is None else min(limit, len(sequences))
        if registered(kind, self.adapter.wing):
            return RegisteredLanguageJudge(sequences, count, self.logs, kind, self.model)
        answers = None
        if kind == "kl":
            if top_k not in self._dense_answers:
                self._dense_answers[top_k] = DenseAnswers(self.model, sequences, self.logs, top_k)
            answers = self._dense_answers[top_k]
        return LanguageJudge(sequences, count, answers, self.logs)

    def evaluate(self, model: nn.Module, split: str, limit: int | None = None) -> Quality:
        """Mean loss and perplexity over all scored tokens of the first ``limit`` sequences (`token_quality`)."""
        return token_quality(self, model, split, limit, self.logs)

    def scored(self, split: str) -> int:
        part = self.data.splits[split]
        return self.length(split) - 1 if part.answers is None else max(1, part.scored // len(part))

    def test_facts(self, count: int) -> dict[str, Any]:
        """What a perplexity on the test split means: its windows' length, their stride, the tokens scored."""
        length = self.length("test")
        facts = {"length": length, "stride": int(self.stride or length), "count": int(count)}
        test = self.data.splits["test"]
        return {"tokens": facts | ({"scored": test.scores} if test.examples else {})}

    def training_facts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        text = self.data.splits["train"]
        tensors = {"tokens": text.tokens}
        if text.answers is not None:
            tensors["answers"] = text.answers
        return {"text": [text.length, list(text.starts)]}, tensors

    def train(self, settings: ModelConfig, state: Path, progress: Progress | None) -> FitResult:
        """AdamW on the train split; a killed training starts again."""
        options = settings.train
        generator = torch.Generator().manual_seed(settings.seed)
        epochs = (self.train_batches(generator, options.batch_size) for _ in range(options.epochs))
        return train_language(
            self.model,
            [batch for epoch in epochs for batch in epoch],
            steps=options.epochs * self.train_steps(options.batch_size),
            lr=options.lr,
            weight_decay=options.weight_decay,
            seed=settings.seed,
            progress=progress,
            phase="dense training",
        )


@dataclass(frozen=True)
class _Split:
    """A split of a text as sequences on the workload's device."""

    workload: LanguageWorkload
    split: str

    @property
    def length(self) -> int:
        return self.workload.length(self.split)

    @property
    def rows(self) -> int:
        return self.workload.rows(self.split)

    def __len__(self) -> int:
        return self.workload.size(self.split)

    def window(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        ids, targets = self.workload.data.splits[self.split].window(start, stop)
        return ids.to(self.workload.device), targets.to(self.workload.device)


def input_device(model: nn.Module) -> torch.device:
    """Where a causal language model reads its token ids."""
    return tensor_of(model.get_input_embeddings(), "weight").device  # type: ignore[operator]


def base_of_model(model: nn.Module, name: str) -> dict[str, Any]:
    """How to rebuild a transformers model: its config as plain JSON."""
    config = getattr(model, "config", None)
    if config is None:
        return {"source": "given"}
    plain: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    kept = {key: value for key, value in plain.items() if key not in _ELSEWHERE}
    return {"source": "transformers", "name": name, "config": kept}
