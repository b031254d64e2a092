"""Several processes that fine-tune one model: those that ``accelerate launch`` or ``torchrun`` has started.

Every process draws the same global batch and takes its share of it. Gradients and batch statistics are summed over all
of them, so the weights are those of one process with the same batch, up to the order of sums (and, where the model has
dropout, its draws).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, RlpruneError
from ..utils.launched import process_count
from ..utils.pytrees import sample_count, take
from ..utils.torch_internals import BATCH_NORM

# The others wait while the first one trains a dense model, which may take hours.
_PATIENCE = timedelta(days=2)


class Team:
    """The processes of one fine-tune, through accelerate.

    Args:
        cpu: whether they compute on the CPU; else each has a GPU of its own.

    Raises:
        ConfigError: accelerate is missing.
    """

    def __init__(self, cpu: bool) -> None:
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise ConfigError(
                f"{process_count()} processes were started, and a fine-tune in several needs the package accelerate: "
                "pip install 'rlprune[language]'"
            ) from error
        self._state: Any = PartialState(cpu=cpu, timeout=_PATIENCE)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        found: torch.device = self._state.device
        return found

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process goes through the block before the others: what it leaves in the cache they find."""
        with self._state.main_process_first():
            yield

    def share(self, batch: tuple[Any, ...]) -> tuple[tuple[Any, ...], float]:
        """This process's samples of a global batch, and their share of it.

        Raises:
            RlpruneError: there are fewer samples than processes.
        """
        count, rank, world = (
            sample_count(batch[0], batch[1]),
            self._state.process_index,
            self._state.num_processes,
        )
        if count < world:
            raise RlpruneError(
                f"finish.batch_size: a batch of {count} cannot be shared among {world} processes; start fewer"
            )
        start, stop = count * rank // world, count * (rank + 1) // world
        return tuple(take(part, slice(start, stop)) for part in batch), (stop - start) / count

    def sum_gradients(self, model: nn.Module, loss: Tensor) -> Tensor:
        """Put the sum of all processes' gradients in the place of each one's; returns the sum of their losses.

        A parameter that nobody has a gradient of has none afterwards.
        """
        trained = [p for p in model.parameters() if p.requires_grad]
        known = loss.new_tensor([float(p.grad is not None) for p in trained])
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        flat = torch.cat(
            [loss.detach().reshape(1), known, *(part.flatten().to(loss.dtype) for part in parts)]
        )
        torch.distributed.all_reduce(flat)
        at = 1 + len(trained)
        for parameter, some in zip(trained, flat[1:at].tolist(), strict=True):
            found = flat[at : at + parameter.numel()].view_as(parameter)
            parameter.grad = found.to(parameter.dtype) if some else None
            at += parameter.numel()
        return flat[0]

    def close(self) -> None:
        """End the group of processes."""
        self._state.destroy_process_group()


def team_of(device: torch.device) -> Team | None:
    """The team of this process where a launcher has started several; None for one alone."""
    return Team(device.type == "cpu") if process_count() > 1 else None


@contextlib.contextmanager
def shared_statistics(model: nn.Module) -> Iterator[None]:
    """While active, batch norms in train mode normalise by the statistics of all processes' samples together.

    torch's SyncBatchNorm does so on GPUs only, and as modules of its own.
    """
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORM)]
    for norm in norms:
        norm.forward = partial(_normalised, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


class _Summed(torch.autograd.Function):
    """The sum of all processes' tensors; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        torch.distributed.all_reduce(total)
        return total


def _normalised(norm: Any, x: Tensor) -> Tensor:
    """Batch norm of (N, C, ...) whose mean and variance are those of all processes' N together."""
    if not norm.training:
        found: Tensor = type(norm).forward(norm, x)
        return found
    dims = [0, *range(2, x.ndim)]
    shape = [1, -1, *(1 for _ in range(x.ndim - 2))]
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    count = wide.new_tensor([x.numel() / x.shape[1]])
    sums = _Summed.apply(torch.cat([wide.sum(dims), count]))
    total, mean = sums[-1].detach(), sums[:-1] / sums[-1]
    centred = wide - mean.view(shape)
    variance = _Summed.apply(centred.square().sum(dims)) / total
    if norm.track_running_stats:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            part = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean.detach().to(norm.running_mean.dtype), part)
            unbiased = variance.detach() * total / (total - 1).clamp_min(1)
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), part)
    scaled = centred * torch.rsqrt(variance + norm.eps).view(shape)
    if norm.affine:
        scaled = scaled * norm.weight.view(shape) + norm.bias.view(shape)
    return scaled.to(x.dtype)
