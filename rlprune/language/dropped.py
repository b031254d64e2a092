"""What stands in a transformer block where a part was removed whole: modules without weights, but for an output bias.

This file imports nothing of rlprune but files that travel with it in every saved folder of a pruned language model.

No empty layer is left behind: quantisers and exporters look for ``nn.Linear`` and cannot do anything with one that
has no columns. The output layer of the part becomes an `OnlyBias` under the same name, so that its bias keeps its
place in the state dict, and a recovery may give it one.

Shapes: B sequences, L tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .families import family_of
from .linear import feature_names, is_linear

# What versions and families of transformers call the cache that an attention is handed.
_CACHES = ("cache", "past_key_values", "layer_past")


class OnlyBias(nn.Module):
    """An output layer without inputs: whatever it is given, it gives its bias (H,) for each token, or zeros.

    Args:
        size: H; the last dimension of what it gives.
        bias: the bias of the layer that it stands for, or None.
    """

    is_dropped = True

    def __init__(self, size: int, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features = size
        self.bias = bias

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., any) -> (..., H)."""
        return _with_bias(inputs.new_zeros((*inputs.shape[:-1], self.out_features)), self)


class NoFeatures(nn.Module):
    """A first layer without outputs, where a family calls it from the block itself (OPT)."""

    is_dropped = True

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., H) -> (..., 0)."""
        return inputs[..., :0]


class DroppedAttention(nn.Module):
    """An attention of no heads: it adds its output layer's bias, or nothing, and keeps the cache's length.

    Made by `drop`, which changes the class of the module: its attributes stay, and its norms.
    """

    is_dropped = True
    layer_idx: int
    output_layer: str
    adds_residual: bool
    returns: int = 2

    def forward(
        self, hidden_states: Tensor, *args: object, **kwargs: Any
    ) -> Tensor | tuple[Tensor | None, ...]:
        """Hidden states (B, L, H) -> the part's contribution (B, L, H), and no attention weights."""
        caches = [kwargs[name] for name in _CACHES if kwargs.get(name) is not None]
        if caches:
            _advance(caches[0], self.layer_idx, hidden_states)
        result = _contribution(self, hidden_states, args, kwargs)
        return (result, *[None] * (self.returns - 1)) if self.returns else result


class DroppedFeedForward(nn.Module):
    """A feed-forward part of no neurons: it adds its output layer's bias, or nothing. Made by `drop`."""

    is_dropped = True
    output_layer: str
    adds_residual: bool

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: Any) -> Tensor:
        """Hidden states (B, L, H) -> the part's contribution (B, L, H)."""
        return _contribution(self, hidden_states, args, kwargs)


def drop(model: nn.Module, module: str, kind: str) -> None:
    """Turn the part at ``module`` into a stub; ``kind`` is "attention" or "ffn".

    Its first layers go, its output layer keeps its bias only.
    """
    family = family_of(model)
    owner = model.get_submodule(module)
    if is_linear(owner):  # OPT: both layers stand in the block itself, which calls them
        block = model.get_submodule(module.rpartition(".")[0])
        for name in family.up:
            setattr(block, name, NoFeatures())
        _keep_bias(block, family.down)
        return
    inputs, output = (family.qkv, family.out) if kind == "attention" else (family.up, family.down)
    if kind == "attention":
        inputs = (*inputs, *family.gates, *family.per_query_head)
    for name in inputs:
        delattr(owner, name)
    _keep_bias(owner, output)
    owner.__dict__["output_layer"] = output
    owner.__dict__["adds_residual"] = family.adds_residual
    owner.__dict__["returns"] = family.returns
    owner.__class__ = DroppedAttention if kind == "attention" else DroppedFeedForward


def _keep_bias(owner: nn.Module, name: str) -> None:
    layer: Any = getattr(owner, name)
    size = getattr(layer, feature_names(layer)[1])
    setattr(owner, name, OnlyBias(int(size), layer.bias))


def _with_bias(result: Tensor, layer: OnlyBias) -> Tensor:
    """``result`` (..., H) plus the layer's bias, where it has one."""
    return result if layer.bias is None else result + layer.bias.to(result.dtype)


def _contribution(
    module: DroppedAttention | DroppedFeedForward,
    hidden: Tensor,
    args: Sequence[object],
    kwargs: Mapping[str, object],
) -> Tensor:
    layer: Any = getattr(module, module.output_layer)
    result = _with_bias(hidden.new_zeros(hidden.shape), layer)
    if module.adds_residual:
        residual: Any = kwargs["residual"] if "residual" in kwargs else args[0]
        result = result + residual
    return result


def _advance(cache: Any, index: int, hidden: Tensor) -> None:
    """Tell the cache that the tokens passed: keys and values of no width, so that they take no memory."""
    empty = hidden.new_empty((hidden.shape[0], 1, hidden.shape[1], 0))
    cache.update(empty, empty, index)
    layer = cache.layers[index] if index < len(getattr(cache, "layers", ())) else None
    if layer is not None and type(layer).__name__ == "DynamicLayer":
        # Its own get_seq_length calls an empty tensor a length of 0, and the positions follow from layer 0.
        layer.__class__ = _empty_layer(type(layer))


_EMPTY_LAYERS: dict[str, type] = {}


def _empty_layer(kind: type) -> type:
    def get_seq_length(self: Any) -> int:
        return int(self.keys.shape[-2]) if self.is_initialized and self.keys.ndim > 1 else 0

    if kind.__name__ not in _EMPTY_LAYERS:
        fields = {"get_seq_length": get_seq_length, "_layer_type": None}
        _EMPTY_LAYERS[kind.__name__] = type("EmptyDynamicLayer", (kind,), fields)
    return _EMPTY_LAYERS[kind.__name__]
