"""What fine-tuning takes from the inside of transformers.

``dropped.py`` reaches into its caches by itself, because a copy of that file has to run where rlprune is missing.

Relied on, the same in 5.17 and in 5.24:

- ``PreTrainedModel._no_split_modules``: class names of the blocks that FSDP wraps one by one.
- ``PreTrainedConfig._experts_implementation``: how the experts of a mixture are computed, read at every call.
- ``_apply_gate(gate_up)`` of the modules of experts: (n, 2 F) -> (n, F).
- ``TrainingArguments._n_gpu``: the GPUs that one process uses at once.
- ``Trainer._get_train_sampler(train_dataset)``, ``._save(output_dir, state_dict)`` and ``._load_from_checkpoint(
  resume_from_checkpoint, model)``: the order of the data, and the weights of a checkpoint.

``tests/test_internals.py`` fails where one of them is gone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..utils.files import read_tensors, write_tensors_atomic
from .linear import LayerConfig

if TYPE_CHECKING:
    from transformers import TrainingArguments

WEIGHTS = "model.safetensors"
_IMPLEMENTATION = "_experts_implementation"


def lend_block_classes(model: nn.Module, wrapper: nn.Module) -> None:
    """Let FSDP, which asks the outermost module for the class names of its blocks, find those of ``model``."""
    wrapper._no_split_modules = getattr(model, "_no_split_modules", None)  # type: ignore[assignment]


@contextlib.contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """The experts of a transformers model run one by one for a while; nothing happens to a model without any.

    ``set_experts_implementation`` looks for a word in the source of the model's own class, which subclasses lack.
    """
    found = [getattr(module, "config", None) for module in model.modules()]
    # A layer with a config of its own says eager already, or reads what all layers share.
    configs = {id(c): c for c in found if hasattr(c, _IMPLEMENTATION) and not isinstance(c, LayerConfig)}
    before = {key: getattr(c, _IMPLEMENTATION) for key, c in configs.items()}
    for config in configs.values():
        setattr(config, _IMPLEMENTATION, "eager")
    try:
        yield
    finally:
        for key, config in configs.items():
            setattr(config, _IMPLEMENTATION, before[key])


def routed_neurons(experts: nn.Module, hidden: Tensor, expert: int) -> Tensor:
    """The neurons of one expert for tokens that are sent to it: (n, H) -> (n, F)."""
    owner: Any = experts
    first = "gate_up_proj" if owner.has_gate else "up_proj"
    weight = getattr(owner, first)[expert]
    result = hidden.to(weight.dtype) @ (weight if owner.is_transposed else weight.T)
    bias = getattr(owner, f"{first}_bias", None)
    result = result if bias is None else result + bias[expert]
    found: Tensor = owner._apply_gate(result) if owner.has_gate else owner.act_fn(result)
    return found


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
