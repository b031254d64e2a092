"""Recovery steps that leave zeros in the weights of a language model: Wanda's masks, 2:4 and half of each row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError
from ..pruning.plan import Plan
from ..recovery.steps import RecoveryContext, Repair, recovery_step
from .calibration.walk import parts
from .tuning.peft import stored_inputs_first, target_layers

Keep = Callable[[Tensor], Tensor]
"""Scores (out, in) -> which weights stay, a mask of the same shape."""


@recovery_step(
    "zero two of every four weights of a row by Wanda's metric (2:4)", after="reconstruct", wing="language"
)
def wanda_2_4(context: RecoveryContext) -> Repair:
    """Wanda's 2:4 masks (Sun et al. 2023, arXiv 2306.11695; locuslab/wanda, lib/prune.py: prune_n 2, prune_m 4).

    |W_ij| * ||X_j|| over each run of four inputs of a row; block by block, the inputs of a block are those after the
    blocks before it are masked. Layers whose inputs are no multiple of four are refused.
    """
    return _masking(context, "wanda_2_4", _two_of_four)


@recovery_step("zero half of each row's weights by Wanda's metric", after="reconstruct", wing="language")
def wanda_half(context: RecoveryContext) -> Repair:
    """Wanda's unstructured masks at 50%: the lower half of |W_ij| * ||X_j|| in every row (arXiv 2306.11695)."""
    return _masking(context, "wanda_half", _upper_half)


def _masking(context: RecoveryContext, step: str, keep: Keep) -> Repair:
    batches = list(context.batches())
    if not batches:
        raise DataError(f"recovery.steps: {step!r} reads the calibration split, which is empty")

    def repair(slim: nn.Module, plan: Plan) -> None:
        names = target_layers(slim)
        if step == "wanda_2_4" and (odd := [n for n in names if _weight(slim, n).shape[1] % 4]):
            raise ConfigError(f"recovery.steps: 'wanda_2_4': the inputs of {odd[0]} are no multiple of 4")
        for part in parts(slim, batches):
            own = [name for name in names if part.holds(name)]
            norms = _norms(slim, own, part.look)
            with torch.no_grad():
                for name in own:
                    weight = _weight(slim, name)
                    weight.mul_(keep(weight.abs().float() * norms[name]).to(weight.dtype))
            part.run()

    return repair


def _norms(model: nn.Module, names: list[str], run: Callable[[], None]) -> dict[str, Tensor]:
    """||X_j|| of the input columns (in,) of some layers, over all tokens of one pass."""
    sums: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].detach().float().flatten(0, -2).square().sum(dim=0)
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.sqrt() for name, total in sums.items()}


def _weight(model: nn.Module, name: str) -> Tensor:
    """A layer's weight as (out, in), a view."""
    layer = model.get_submodule(name)
    weight = model.get_parameter(f"{name}.weight").detach()
    return weight.T if stored_inputs_first(layer) else weight


def _two_of_four(scores: Tensor) -> Tensor:
    runs = scores.unflatten(1, (-1, 4))
    lowest = runs.topk(2, dim=2, largest=False).indices
    return torch.ones_like(runs).scatter_(2, lowest, 0.0).flatten(1)


def _upper_half(scores: Tensor) -> Tensor:
    lowest = scores.topk(scores.shape[1] // 2, dim=1, largest=False).indices
    return torch.ones_like(scores).scatter_(1, lowest, 0.0)
