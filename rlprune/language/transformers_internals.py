"""What fine-tuning takes from the inside of transformers.

``dropped.py`` reaches into its caches by itself, because a copy of that file has to run where rlprune is missing.

Relied on, the same in 5.17 and in 5.24:

- ``PreTrainedModel._no_split_modules``: class names of the blocks that FSDP wraps one by one.
- ``TrainingArguments._n_gpu``: the GPUs that one process uses at once.
- ``Trainer._get_train_sampler(train_dataset)``, ``._save(output_dir, state_dict)`` and ``._load_from_checkpoint(
  resume_from_checkpoint, model)``: the order of the data, and the weights of a checkpoint.

``tests/test_internals.py`` fails where one of them is gone.
"""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..utils.files import read_tensors, write_tensors_atomic

if TYPE_CHECKING:
    from transformers import TrainingArguments

WEIGHTS = "model.safetensors"


def lend_block_classes(model: nn.Module, wrapper: nn.Module) -> None:
    """Let FSDP, which asks the outermost module for the class names of its blocks, find those of ``model``."""
    wrapper._no_split_modules = getattr(model, "_no_split_modules", None)  # type: ignore[assignment]


def use_one_gpu(arguments: TrainingArguments) -> None:
    """One process on a machine of several GPUs would otherwise be run by the old DataParallel."""
    arguments._n_gpu = min(1, arguments.n_gpu)


class TrainedOnly:
    """Mixed into a Trainer: checkpoints hold what is trained and nothing else, and the data keeps its order."""

    model: nn.Module
    args: Any
    is_fsdp_enabled: bool

    def _get_train_sampler(self, train_dataset: Sized | None = None) -> torch.utils.data.Sampler[int]:
        data = train_dataset if train_dataset is not None else self.train_dataset  # type: ignore[attr-defined]
        return torch.utils.data.SequentialSampler(data)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        # Under FSDP the whole tensors come in state_dict; the model holds shards.
        found = {n: (state_dict or trained).get(n, trained[n]) for n in trained}
        write_tensors_atomic(Path(output_dir or self.args.output_dir) / WEIGHTS, found)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        kept = read_tensors(Path(resume_from_checkpoint) / WEIGHTS)
        with torch.no_grad():
            for name, parameter in (model or self.model).named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(kept[name])
