"""Causal language models whose layers differ in size, for ``trust_remote_code=True``; made by rlprune.

This file and those that it imports stand in every folder of a pruned language model and need torch and
transformers only. ``config.json`` is the dense model's, with transformers' own ``per_layer_config``
({layer: {attribute: value}}, sparse) for the layers that were cut. Stock families either refuse such a
file or do not look at it, so for each supported family there are two subclasses here, made when they are
first asked for: ``PrunedLlamaConfig`` and ``PrunedLlamaForCausalLM``, and so on.

A size of 0 means that the part was removed: nothing is computed there and nothing is added to the
residual stream but the part's own output bias, where it has one. ``added_biases`` lists linear layers that
got a bias which the family does not have, ``pruned_hidden_size`` is the residual stream's where it was cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .families import FAMILIES
from .sizes import resize

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["add_biases", "config_class", "model_class", "sizes_of"]


class PerLayerConfig:
    """Mixin of a configuration: attributes of the whole are the dense model's, ``per_layer_config[i]`` the layer's.

    transformers raises when a per-layer attribute is read from the whole. The stock constructor reads them all,
    though, and here the dense model is exactly what it is to build before the layers are sized.
    """

    def __getattribute__(self, name: str) -> Any:
        if name != "attribute_map":
            name = object.__getattribute__(self, "attribute_map").get(name, name)
        return object.__getattribute__(self, name)


class PerLayerModel(nn.Module):
    """Mixin of a causal language model: built dense, then each layer is given its own size."""

    def __init__(self, config: PreTrainedConfig, *args: object, **kwargs: object) -> None:
        super().__init__(config, *args, **kwargs)
        resize(self, sizes_of(config), getattr(config, "pruned_hidden_size", None))
        add_biases(self, getattr(config, "added_biases", None) or [])


def sizes_of(config: PreTrainedConfig) -> list[dict[str, int]]:
    """The sizes of every layer under the family's own names, dense ones included; 0 where a part is removed."""
    names = [name for name in FAMILIES[config.model_type].sizes if name is not None]
    return [{name: getattr(layer, name) for name in names} for layer in config.per_layer_config]


def add_biases(model: nn.Module, modules: list[str]) -> None:
    """Give the named linear layers a bias of zeros, where they have none."""
    for name in modules:
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear) and module.bias is None:
            like = module.weight
            zeros = torch.zeros(like.shape[0], dtype=like.dtype, device=like.device)
            module.bias = nn.Parameter(zeros, requires_grad=like.requires_grad)


def config_class(model_type: str) -> Any:
    """``Pruned<Family>Config`` of a supported family; KeyError for others."""
    return _made(model_type)[0]


def model_class(model_type: str) -> Any:
    """``Pruned<Family>ForCausalLM`` of a supported family; KeyError for others."""
    return _made(model_type)[1]


_CLASSES: dict[str, tuple[Any, Any]] = {}  # model type -> configuration and model


def _stem(model_type: str) -> str:
    known = CONFIG_MAPPING_NAMES.get(model_type)  # else registered with the auto classes
    return (known or CONFIG_MAPPING[model_type].__name__).removesuffix("Config")


def _made(model_type: str) -> tuple[Any, Any]:
    """Both classes of a family, made once."""
    if model_type not in FAMILIES:
        raise KeyError(f"{model_type!r} is none of the supported families: {', '.join(FAMILIES)}")
    if model_type not in _CLASSES:
        stem = _stem(model_type)
        stock: Any = CONFIG_MAPPING[model_type]
        body = {"__module__": __name__, "__doc__": f"{stem} with layers of different sizes."}
        config: Any = type(f"Pruned{stem}Config", (PerLayerConfig, stock), body | {"model_type": model_type})
        bases: Any = (PerLayerModel, MODEL_FOR_CAUSAL_LM_MAPPING[stock])
        model: Any = type(f"Pruned{stem}ForCausalLM", bases, body | {"config_class": config})
        # So that save_pretrained puts this file beside the weights.
        config.register_for_auto_class("AutoConfig")
        model.register_for_auto_class("AutoModelForCausalLM")
        _CLASSES[model_type] = config, model
    return _CLASSES[model_type]


def __getattr__(name: str) -> Any:
    for model_type in FAMILIES:
        if model_type in CONFIG_MAPPING:
            stem = _stem(model_type)
            if name == f"Pruned{stem}Config":
                return config_class(model_type)
            if name == f"Pruned{stem}ForCausalLM":
                return model_class(model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
