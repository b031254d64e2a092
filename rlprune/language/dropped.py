"""Attention and feed-forward parts that were removed whole: what stands in their place.

This file imports nothing of rlprune but files that travel with it in every saved folder of a pruned language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .families import family_of
from .linear import features, is_linear

# What versions and families of transformers call the cache that an attention is handed.
_CACHES = ("cache", "past_key_values", "layer_past")


class DroppedAttention(nn.Module):
    """An attention of no heads: it adds its output layer's bias, or nothing, and keeps the cache's length.

    Made by `drop`, which changes the class of the module and leaves its children with their empty tensors, so
    that the names in the state dict stay.
    """

    layer_idx: int
    output_layer: str
    adds_residual: bool

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: Any) -> tuple[Tensor, None]:
        """Hidden states (B, L, H) -> the part's contribution (B, L, H), and no attention weights."""
        caches = [kwargs[name] for name in _CACHES if kwargs.get(name) is not None]
        if caches:
            _advance(caches[0], self.layer_idx, hidden_states)
        return _nothing(self, hidden_states, args, kwargs), None


class DroppedFeedForward(nn.Module):
    """A feed-forward part of no neurons: it adds its output layer's bias, or nothing. Made by `drop`."""

    output_layer: str
    adds_residual: bool

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: Any) -> Tensor:
        """Hidden states (B, L, H) -> the part's contribution (B, L, H)."""
        return _nothing(self, hidden_states, args, kwargs)


def drop(model: nn.Module, module: str, kind: str) -> None:
    """Turn the part at ``module`` into a stub; ``kind`` is "attention" or "ffn". Its tensors are cut by others."""
    family = family_of(model)
    owner = model.get_submodule(module)
    if is_linear(owner):
        return  # OPT: its two layers stand in the block itself and work without neurons as they are
    owner.__dict__["output_layer"] = family.out if kind == "attention" else family.down
    owner.__dict__["adds_residual"] = family.adds_residual
    owner.__class__ = DroppedAttention if kind == "attention" else DroppedFeedForward


def _nothing(
    module: DroppedAttention | DroppedFeedForward,
    hidden: Tensor,
    args: Sequence[object],
    kwargs: Mapping[str, object],
) -> Tensor:
    layer = module.get_submodule(module.output_layer)
    bias = getattr(layer, "bias", None)
    size = features(layer)[1]
    result = hidden.new_zeros((*hidden.shape[:-1], size))
    if bias is not None:
        result = result + bias.to(result.dtype)
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
