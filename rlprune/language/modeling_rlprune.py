"""Language models whose layers differ in size, for ``trust_remote_code=True``; made by rlprune.

This file and those that it imports stand in every folder of a pruned language model and need torch and
transformers only. ``config.json`` is the dense model's, with transformers' own ``per_layer_config``
({layer: {attribute: value}}, sparse) for the layers that were cut. Stock families either refuse such a
file or do not look at it, so for each supported family there are subclasses here, made when they are
first asked for: ``PrunedLlamaConfig``, ``PrunedLlamaForCausalLM``, its body ``PrunedLlamaModel``, and, where the
family has a classifier of sequences, ``PrunedLlamaForSequenceClassification``, whose head is not in the folder.

A size of 0 means that the part was removed: nothing is computed there and nothing is added to the
residual stream but the part's own output bias, where it has one. ``added_biases`` lists linear layers that
got a bias which the family does not have, ``pruned_hidden_size`` is the residual stream's where it was cut.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)

from .families import FAMILIES, family_from, inside, remember
from .sizes import resize

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["AUTO_CLASSES", "add_biases", "auto_map", "config_class", "model_class", "sizes_of"]

AUTO_CLASSES: dict[str, tuple[Any, str]] = {
    "AutoModelForCausalLM": (MODEL_FOR_CAUSAL_LM_MAPPING, "ForCausalLM"),
    "AutoModelForImageTextToText": (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, "ForConditionalGeneration"),
    "AutoModel": (MODEL_MAPPING, "Model"),
    "AutoModelForSequenceClassification": (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "ForSequenceClassification",
    ),
}
"""transformers' auto classes under which a folder loads: the stock class of a configuration, the end of our name."""


_BUILDING: ContextVar[bool] = ContextVar("building", default=False)


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
    """Mixin of a model with a family's blocks: built dense, then each layer is given its own size."""

    sized_by_config = True

    def __init__(self, config: PreTrainedConfig, *args: object, **kwargs: object) -> None:
        learn_family(config)
        inside_another = _BUILDING.get()
        token = _BUILDING.set(True)
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            _BUILDING.reset(token)
        if inside_another:  # a classifier asks for its body by the auto class: the whole is sized at once
            return
        resize(self, sizes_of(config), getattr(config, "pruned_hidden_size", None))
        add_biases(self, getattr(config, "added_biases", None) or [])

    @classmethod
    def is_custom_code(cls) -> bool:
        """Whether layers may initialise themselves as they like: they are stock, though our class is not.

        Of classes from elsewhere transformers passes over modules without tensors of their own, and leaves the
        buffers that these fill (Falcon-H1's multipliers) as they were in memory.
        """
        return False


def sizes_of(config: PreTrainedConfig) -> list[dict[str, int]]:
    """The sizes of every layer under the family's own names, dense ones included; 0 where a part is removed."""
    listed: list[dict[str, int]] | None = getattr(config, "pruned_layers", None)
    if listed is not None:
        return listed
    family = FAMILIES[config.model_type]
    own = family.sizes if family.mixture is None else (*family.sizes, *family.mixture.sizes)
    names = [name for name in dict.fromkeys(own) if name]
    return [{name: getattr(layer, name) for name in names} for layer in config.per_layer_config]


def learn_family(config: PreTrainedConfig) -> None:
    """Take the adapter that config.json brings (`pruned_family`), where this package has none of its own."""
    content = getattr(config, "pruned_family", None)
    if content is not None:
        remember(config.model_type, family_from(content))


def is_composite(config: PreTrainedConfig) -> bool:
    """Whether the language part is one of several, with a configuration of its own."""
    return config.get_text_config() is not config


def reads_pictures(config: PreTrainedConfig) -> bool:
    """Whether transformers has a class for the whole of a composite model, which reads pictures as well as text."""
    return is_composite(config) and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def stock_class(config: PreTrainedConfig) -> Any:
    """transformers' own class of a dense model with an output head over tokens; KeyError where there is none.

    Of a composite model the whole, which reads pictures too.
    """
    mapping: Any = (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if reads_pictures(config) else MODEL_FOR_CAUSAL_LM_MAPPING
    )
    return mapping[type(config)]


def main_auto(config: PreTrainedConfig) -> str:
    """The auto class of the model that is pruned: the whole of a composite one, else the causal one."""
    made = _made(config.model_type)
    whole = "AutoModelForImageTextToText"
    return whole if is_composite(config) and whole in made else "AutoModelForCausalLM"


def add_biases(model: nn.Module, modules: list[str]) -> None:
    """Give the named output layers (as the causal LM calls them) a bias of zeros, where they have none."""
    like = next(model.parameters())
    for name in modules:
        module: Any = model.get_submodule(inside(model, name))
        if getattr(module, "bias", like) is None:
            zeros = torch.zeros(module.out_features, dtype=like.dtype, device=like.device)
            module.bias = nn.Parameter(zeros, requires_grad=like.requires_grad)


def config_class(model_type: str) -> Any:
    """``Pruned<Family>Config`` of a supported family; KeyError for others."""
    return _made(model_type)["AutoConfig"]


def model_class(model_type: str, auto: str = "AutoModelForCausalLM") -> Any:
    """``Pruned<Family>ForCausalLM`` of a supported family, or its class under another name of `AUTO_CLASSES`.

    KeyError: no supported family, or transformers has no such class of it.
    """
    return _made(model_type)[auto]


def auto_map(model_type: str) -> dict[str, str]:
    """What config.json says of the classes of a family: {auto class: "modeling_rlprune.Name"}."""
    return {
        auto: f"{__name__.rpartition('.')[2]}.{made.__name__}" for auto, made in _made(model_type).items()
    }


_CLASSES: dict[str, dict[str, Any]] = {}  # model type -> auto class -> ours


def _stem(model_type: str) -> str:
    known = CONFIG_MAPPING_NAMES.get(model_type)  # else registered with the auto classes
    return (known or CONFIG_MAPPING[model_type].__name__).removesuffix("Config")


def _made(model_type: str) -> dict[str, Any]:
    """All classes of a family, made once."""
    if model_type not in _CLASSES:
        stem = _stem(model_type)
        stock: Any = CONFIG_MAPPING[model_type]
        body = {"__module__": __name__, "__doc__": f"{stem} with layers of different sizes."}
        config: Any = type(f"Pruned{stem}Config", (PerLayerConfig, stock), body | {"model_type": model_type})
        # Registered, so that save_pretrained puts this file next to the weights.
        config.register_for_auto_class("AutoConfig")
        made = {"AutoConfig": config}
        # Of a composite model, a user who wants text alone gets the whole: there is no smaller one with these names.
        whole = (
            is_composite(stock())
            and stock in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
            and MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[stock]
        )
        for auto, (mapping, end) in AUTO_CLASSES.items():
            base = whole if whole and auto == "AutoModelForCausalLM" else mapping.get(stock, None)
            if base is not None:
                bases: Any = (PerLayerModel, base)
                made[auto] = type(f"Pruned{stem}{end}", bases, body | {"config_class": config})
                made[auto].register_for_auto_class(auto)
                # Stock classifiers build their body by `AutoModel`, which would ask whether our code may be run.
                mapping.register(config, made[auto], exist_ok=True)
        _CLASSES[model_type] = made
    return _CLASSES[model_type]


def __getattr__(name: str) -> Any:
    for model_type in (
        *CONFIG_MAPPING_NAMES,
        *(kind for kind in FAMILIES if kind not in CONFIG_MAPPING_NAMES),
    ):
        if model_type in CONFIG_MAPPING and name.startswith(f"Pruned{_stem(model_type)}"):
            for made in _made(model_type).values():
                if made.__name__ == name:
                    return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
