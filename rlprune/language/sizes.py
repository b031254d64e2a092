"""Sizes of a language model's parts, and a model that is given such sizes.

This file imports nothing of rlprune but files that travel with it in every saved folder of a pruned language model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from .dropped import drop
from .experts import resize_experts
from .families import (
    Block,
    Family,
    UnsupportedModel,
    blocks_of,
    family_of,
    head_attributes,
    neuron_attributes,
)
from .linear import feature_names, features, is_conv1d, is_dropped, is_linear, set_attribute, tensor_of


def layer_sizes(model: nn.Module) -> list[dict[str, int]]:
    """For each block the sizes under the config's own names; 0 heads or neurons where a part is dropped.

    Of a part that the block never had (hybrid models) nothing is said.
    """
    family = family_of(model)
    heads, kv, _ = family.sizes
    return [
        {
            **({heads: b.query_heads, **({kv: b.kv_heads} if kv else {})} if b.attention else {}),
            **_inner_sizes(family, b),
        }
        for b in blocks_of(model)
    ]


def _inner_sizes(family: Family, block: Block) -> dict[str, int]:
    """Sizes of what the feed-forward part of a block is made of, under the config's own names."""
    if block.experts is None or family.mixture is None:
        return {family.sizes[2]: block.neurons} if block.ffn else {}
    count, neurons, shared = family.mixture.sizes
    found = {count: block.experts.count, neurons: block.experts.neurons}
    return found | ({shared: block.neurons} if block.up else {})


def resize(model: nn.Module, sizes: Sequence[Mapping[str, int]], hidden_size: int | None = None) -> None:
    """Give the modules of a model built from the dense config the sizes of `layer_sizes`; works on ``meta`` too.

    Values of the tensors that change size are undefined; a checkpoint is to be loaded afterwards.

    Raises:
        UnsupportedModel: the number of blocks or a size does not fit the model.
    """
    blocks, family = blocks_of(model), family_of(model)
    heads_name = family.sizes[0]
    if len(sizes) != len(blocks):
        raise UnsupportedModel(f"per_layer_config: {len(sizes)} layers for a model of {len(blocks)}")
    for block, wanted in zip(blocks, sizes, strict=True):
        own = {heads_name: block.query_heads} if block.attention else {}
        limits = {**own, **_inner_sizes(family, block)}
        sizes_here: dict[str, int] = {}
        for name, most in limits.items():
            value, least = wanted.get(name), 0
            if block.experts is not None and family.mixture is not None and name == family.mixture.sizes[0]:
                least = block.experts.top_k
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise UnsupportedModel(
                    f"per_layer_config[{block.index}].{name}: {value!r}; allowed: {least} to {most}"
                )
            sizes_here[name] = value
        heads = sizes_here.get(heads_name, 0)
        each = block.query_heads if block.whole else block.ratio
        if heads % max(1, each):
            raise UnsupportedModel(
                f"per_layer_config[{block.index}].{heads_name}: {heads}; allowed: multiples of {each}"
            )
        if heads != block.query_heads:
            _resize_attention(model, block, heads // each)
        _resize_inner(model, family, block, sizes_here)
    if hidden_size is not None:
        _resize_hidden(model, hidden_size)


def _resize_inner(model: nn.Module, family: Family, block: Block, sizes: Mapping[str, int]) -> None:
    """Size the feed-forward part of a block: its neurons, or its experts and what they share."""
    shared = family.sizes[2]
    if block.experts is not None and family.mixture is not None:
        count, neurons, shared = family.mixture.sizes
        if (sizes[count], sizes[neurons]) != (block.experts.count, block.experts.neurons):
            resize_experts(model, block.experts, sizes[count], sizes[neurons])
    if block.up and sizes[shared] != block.neurons:
        _resize_ffn(model, block, sizes[shared])


def _resize_attention(model: nn.Module, block: Block, units: int) -> None:
    dense = 1 if block.whole else block.kv_heads
    attributes = head_attributes(model, block)
    for name in block.heads_rows:
        _resize_linear(model.get_submodule(name), outputs=lambda n: n // dense * units)
    _resize_linear(model.get_submodule(block.out), inputs=lambda n: n // dense * units)
    owner = model.get_submodule(block.attention)
    for name in family_of(model).per_query_head:
        _shrink(owner, name, (len(tensor_of(owner, name)) // dense * units,))
    for attribute, worth in attributes.items():
        set_attribute(owner, attribute, worth * units)
    if units == 0:
        drop(model, block.attention, "attention")


def _resize_ffn(model: nn.Module, block: Block, neurons: int) -> None:
    attributes = neuron_attributes(model, block)
    for name in block.up:
        _resize_linear(model.get_submodule(name), outputs=lambda n: n // block.neurons * neurons)
    _resize_linear(model.get_submodule(block.down), inputs=lambda n: neurons)
    for attribute, worth in attributes.items():
        set_attribute(model.get_submodule(block.ffn), attribute, worth * neurons)
    if neurons == 0:
        drop(model, block.ffn, "ffn")


def _resize_linear(
    layer: nn.Module, inputs: Callable[[int], int] | None = None, outputs: Callable[[int], int] | None = None
) -> None:
    before = features(layer)
    after = (inputs(before[0]) if inputs else before[0], outputs(before[1]) if outputs else before[1])
    _shrink(layer, "weight", after if is_conv1d(layer) else after[::-1])
    if getattr(layer, "bias", None) is not None:
        _shrink(layer, "bias", (after[1],))
    for name, value in zip(feature_names(layer), after, strict=True):
        setattr(layer, name, value)


def _shrink(owner: nn.Module, name: str, shape: Sequence[int]) -> None:
    old = tensor_of(owner, name)
    new = old.detach().new_empty(tuple(shape))
    setattr(owner, name, nn.Parameter(new, requires_grad=old.requires_grad))


def hidden_size(model: nn.Module) -> int:
    """Width of the residual stream, from the shape of the first layer that reads it."""
    modules = dict(model.named_modules())
    readers = [modules.get(name) for b in blocks_of(model) for name in (*b.qkv[:1], *b.up[:1])]
    found = [features(layer)[0] for layer in readers if layer is not None and is_linear(layer)]
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    return found[0] if found else int(embeddings.embedding_dim)  # every part is dropped


def hidden_dims(model: nn.Module) -> tuple[list[tuple[str, int, bool]], list[tuple[str, str]]]:
    """Everything that is as wide as the residual stream.

    Returns:
        Tensors as (name, dimension, is it the input side of a linear layer), each once where tensors are tied,
        and the integer attributes that follow as (module, attribute).
    """
    blocks, size = blocks_of(model), hidden_size(model)
    inner = {n for b in blocks for n in (*b.qkv, *b.up)}
    outer = {n for b in blocks for n in (b.out, b.down)}
    owners = tuple(f"{b.attention}." for b in blocks)
    known = {name for name, _ in model.named_parameters()}
    tensors: list[tuple[str, int, bool]] = []
    attributes: list[tuple[str, str]] = []
    for name, module in model.named_modules():
        found: list[tuple[str, int, bool]] = []
        if name in outer and is_dropped(module):
            found.append(("bias", 0, False))
            attributes.append((name, "out_features"))
        elif is_linear(module):
            inputs, outputs = feature_names(module)
            flipped = is_conv1d(module)
            sides = features(module)
            if name in inner or (name not in outer and sides[0] == size):
                found.append(("weight", 0 if flipped else 1, True))
                attributes.append((name, inputs))
            if name in outer or (name not in inner and sides[1] == size and sides[0] != size):
                found += [("weight", 1 if flipped else 0, False), ("bias", 0, False)]
                attributes.append((name, outputs))
        elif isinstance(module, nn.Embedding) and module.embedding_dim == size:
            found.append(("weight", 1, False))
            attributes.append((name, "embedding_dim"))
        elif not name.startswith(owners):
            found = [(n, 0, False) for n, p in module.named_parameters(recurse=False) if p.shape == (size,)]
            if getattr(module, "normalized_shape", None) == (size,):
                attributes.append((name, "normalized_shape"))
        tensors += [(f"{name}.{n}", d, i) for n, d, i in found if f"{name}.{n}" in known]
    return tensors, attributes


def _resize_hidden(model: nn.Module, size: int) -> None:
    tensors, attributes = hidden_dims(model)
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, name))
    for name, dim, _ in tensors:
        old = model.get_parameter(name)
        shape = [*old.shape[:dim], size, *old.shape[dim + 1 :]]
        new = nn.Parameter(old.detach().new_empty(shape), requires_grad=old.requires_grad)
        holders[id(new)] = holders.pop(id(old))
        for module, place in holders[id(new)]:
            module._parameters[place] = new  # tied weights stay tied
    for name, attribute in attributes:
        set_attribute(model.get_submodule(name), attribute, size)
