"""Modules that are not made of torch's plain layers: what they are, and how to get plain ones."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod


def untraceable(model: nn.Module) -> str:
    """One line on why the layers of a model cannot be followed or cut, and what to do; "" where they can."""
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        return (
            f"{kind} is a program of TorchScript without Python layers: give the model that it was made from"
        )
    if hasattr(model, "_orig_mod"):
        return "the model is wrapped by torch.compile: give the one inside, model._orig_mod, and compile the cut one"
    for name, module in model.named_modules():
        reason = _module(module)
        if reason:
            return f"{name or kind!r}: {reason}"
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        reason = _tensor(tensor)
        if reason:
            return f"{name!r}: {reason}"
    return ""


def _module(module: nn.Module) -> str:
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "is a program of TorchScript without Python layers: use the module that it was made from"
    if parametrize.is_parametrized(module):
        held = ", ".join(getattr(module, "parametrizations"))  # noqa: B009
        return (
            f"its {held} is parametrized; make it plain first: "
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {held.split(', ')[0]!r})"
        )
    for hook in module._forward_pre_hooks.values():
        name = type(hook).__name__
        if name in ("WeightNorm", "SpectralNorm"):
            remove = "remove_weight_norm" if name == "WeightNorm" else "remove_spectral_norm"
            held = getattr(hook, "name", "weight")
            return f"its {held} is recomputed by {name}; make it plain first: torch.nn.utils.{remove}(module)"
        if isinstance(hook, BasePruningMethod):
            return "its weights are masked by torch.nn.utils.prune; make it plain first: prune.remove(module, name)"
    if ".quantized" in kind.__module__ or ".ao.nn" in kind.__module__:
        return f"{kind.__name__} is quantised: prune the float model, then quantise"
    return ""


def _tensor(tensor: torch.Tensor) -> str:
    if is_lazy(tensor):
        return "has no size yet: run the model once before it is traced"
    if tensor.is_meta:
        return "is on the meta device, without values: load the weights first"
    if tensor.layout != torch.strided:
        return f"is sparse ({tensor.layout}): give the dense tensors, tensor.to_dense()"
    if tensor.is_quantized:
        return "is quantised: prune the float model, then quantise"
    return ""
