"""One adapter for each family of transformers causal language models: where the parts are and what follows a cut.

This file imports nothing of rlprune: a copy of it travels in every saved folder of a pruned language model, so
that ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` works where rlprune is not installed.

Shapes: H hidden size, D head size, K key-value heads, R query heads to each of them, F neurons.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn


class UnsupportedModel(ValueError):
    """A model that no adapter knows, or that does not look as its adapter expects; the module is named."""


@dataclass(frozen=True)
class Family:
    """How to find the parts of one ``model_type``; paths are relative to the causal LM or to a block.

    ``qkv`` holds three layers, or one fused layer whose rows are ``blocked`` (all queries, all keys, all
    values) or interleaved (for each key-value head its queries, its key, its value). ``up`` holds the layers
    that make the neurons; with ``fused_up`` one layer makes gate and up halves. ``sizes`` are the config's own
    names of (query heads, key-value heads, neurons); None where the config has no such field.
    ``whole`` says why heads cannot be told apart (the attention is then one unit, kept or dropped whole).
    """

    blocks: str = "model.layers"
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    blocked: bool = False
    out: str = "o_proj"
    ffn: str = "mlp"
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    fused_up: bool = False
    down: str = "down_proj"
    sizes: tuple[str, str | None, str] = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    # Attributes of the attention's own config object that its forward reads.
    config_heads: tuple[str, ...] = ()
    # The parts take the residual stream as an argument and add it themselves.
    adds_residual: bool = False
    whole: str = ""
    # A config field that, where it is true, makes the attention whole for the reason given.
    whole_if: tuple[tuple[str, str], ...] = ()
    # Modules that have another name in checkpoints: (module, name there).
    renamed: tuple[tuple[str, str], ...] = ()
    # A config field: where it is true, the cache holds the keys and values once for each query head.
    cached_by_query: str = ""


_PLAIN_UP = ("up_proj",)
_ALIBI = "ALiBi gives every head a slope of its own"
_LLAMA = Family()
_FUSED = Family(qkv=("query_key_value",), out="dense", up=("dense_h_to_4h",), down="dense_4h_to_h")
_FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            "llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite",
            "smollm3", "olmo", "olmo2", "olmo3", "seed_oss", "exaone4", "hunyuan_v1_dense",
        ),
        _LLAMA,
    ),
    "cohere": Family(whole_if=(("use_qk_norm", "its query and key norms hold a row for each head"),)),
    "cohere2": _LLAMA,
    "stablelm": Family(whole_if=(("qk_layernorm", "its query and key norms are one layer for each head"),)),
    "nemotron": Family(up=_PLAIN_UP),
    "glm": Family(up=("gate_up_proj",), fused_up=True),
    "glm4": Family(up=("gate_up_proj",), fused_up=True),
    "phi3": Family(
        qkv=("qkv_proj",), blocked=True, up=("gate_up_proj",), fused_up=True, config_heads=("num_attention_heads",)
    ),
    "phi": Family(out="dense", up=("fc1",), down="fc2"),
    "starcoder2": Family(up=("c_fc",), down="c_proj"),
    "opt": Family(
        blocks="model.decoder.layers", out="out_proj", ffn="", up=("fc1",), down="fc2",
        sizes=("num_attention_heads", None, "ffn_dim"),
    ),
    "gpt_neox": replace(
        _FUSED, blocks="gpt_neox.layers", attention="attention",
        sizes=("num_attention_heads", None, "intermediate_size"), renamed=(("lm_head", "embed_out"),),
    ),
    "gpt2": Family(
        blocks="transformer.h", attention="attn", qkv=("c_attn",), blocked=True, out="c_proj", up=("c_fc",),
        down="c_proj", sizes=("n_head", None, "n_inner"),
    ),
    "gptj": Family(
        blocks="transformer.h", attention="attn", out="out_proj", up=("fc_in",), down="fc_out",
        sizes=("n_head", None, "n_inner"),
    ),
    "bloom": replace(
        _FUSED, blocks="transformer.h", attention="self_attention", adds_residual=True, whole=_ALIBI,
        sizes=("n_head", None, "intermediate_size"),
    ),
    "falcon": replace(
        _FUSED, blocks="transformer.h", attention="self_attention", whole_if=(("alibi", _ALIBI),),
        sizes=("num_attention_heads", "num_kv_heads", "ffn_hidden_size"), cached_by_query="new_decoder_architecture",
    ),
}  # fmt: skip
FAMILIES: Mapping[str, Family] = _FAMILIES
"""{model_type: its adapter}."""
OTHERS: dict[str, str] = {}
"""{model_type: module that registered it}, of those that do not come with rlprune."""


def register(model_type: str, family: Family) -> None:
    """Add the adapter of a ``model_type`` that transformers knows, or that was registered with its auto classes.

    Raises ValueError: the type has an adapter, or ``family`` is none.
    """
    if model_type in FAMILIES:
        raise ValueError(f"families.register: the model_type {model_type!r} has an adapter already")
    if not isinstance(family, Family):
        raise ValueError(f"families.register: {model_type!r} needs a Family, got {type(family).__name__}")
    _FAMILIES[model_type] = family
    OTHERS[model_type] = str(sys._getframe(1).f_globals.get("__name__", ""))


def unregister(model_type: str) -> None:
    """Take back what `register` added."""
    del _FAMILIES[model_type], OTHERS[model_type]


@dataclass(frozen=True)
class Block:
    """The parts of one transformer block, as names inside the causal LM, and their sizes.

    ``attention`` and ``ffn`` are module paths (``ffn`` is the block's first feed-forward layer where the family
    has no module for the part). ``whole`` is the reason why the attention's heads cannot be told apart, or "".
    """

    index: int
    path: str
    attention: str
    qkv: tuple[str, ...]
    out: str
    ffn: str
    up: tuple[str, ...]
    down: str
    kv_heads: int
    query_heads: int  # all of them, K * R
    head_dim: int
    neurons: int
    whole: str = ""

    @property
    def ratio(self) -> int:
        """Query heads to each key-value head (R)."""
        return self.query_heads // max(1, self.kv_heads)


def family_of(model_or_config: object) -> Family:
    """The adapter of a model or config; UnsupportedModel names the class or module that stands in the way."""
    config = getattr(model_or_config, "config", model_or_config)
    model = model_or_config if isinstance(model_or_config, nn.Module) else None
    what = type(model if model is not None else config).__name__
    kind = getattr(config, "model_type", "")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{what}: an encoder-decoder model; only causal language models can be pruned")
    experts = _experts(model) if model is not None else None
    if experts is not None:
        raise UnsupportedModel(f"{what}: {experts} is a mixture of experts, which is not supported")
    if kind not in FAMILIES:
        raise UnsupportedModel(
            f"{what}: no adapter for model_type {kind!r}; allowed: {', '.join(sorted(FAMILIES))}"
        )
    if model is not None and (not hasattr(model, "lm_head") and not hasattr(model, "embed_out")):
        raise UnsupportedModel(f"{what}: has no language-model head; load it with AutoModelForCausalLM")
    return FAMILIES[kind]


def _experts(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        kind = type(module).__name__
        if name.rsplit(".", 1)[-1] == "experts" or ("Moe" in kind and "Block" in kind) or "Experts" in kind:
            return f"{name!r} ({kind})"
    return None


def blocks_of(model: nn.Module) -> list[Block]:
    """Every block of the model in order, sizes read from the tensors' shapes (0 where a part is dropped)."""
    family = family_of(model)
    modules = dict(model.named_modules())
    layers = modules.get(family.blocks)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UnsupportedModel(f"{type(model).__name__}: has no blocks at {family.blocks!r}")
    return [_block(model, family, modules, i) for i in range(len(layers))]


def _block(model: nn.Module, family: Family, modules: Mapping[str, nn.Module], index: int) -> Block:
    path = f"{family.blocks}.{index}"
    attention = f"{path}.{family.attention}"
    inner = f"{path}.{family.ffn}" if family.ffn else path
    qkv = tuple(f"{attention}.{n}" for n in family.qkv)
    out, down = f"{attention}.{family.out}", f"{inner}.{family.down}"
    up = tuple(f"{inner}.{n}" for n in family.up)
    for name in (*qkv, out, *up, down):
        if name not in modules or not is_linear(modules[name]):
            found = type(modules[name]).__name__ if name in modules else "nothing"
            raise UnsupportedModel(
                f"{type(model).__name__}: {name!r} should be a linear layer; found: {found}"
            )
    owner: Any = modules[attention]
    head = getattr(owner, "head_dim", None) or getattr(owner, "head_size", None)
    if not isinstance(head, int):
        raise UnsupportedModel(f"{attention!r}: has no head_dim")
    queries = features(modules[out])[0] // head
    rows = features(modules[qkv[-1]])[1] // head
    kv = rows if len(qkv) == 3 else (rows - queries) // 2
    return Block(
        index, path, attention, qkv, out, inner if family.ffn else up[0], up, down, kv, queries, head,
        features(modules[down])[0], _whole(model, family, owner, kv, head),
    )  # fmt: skip


def _whole(model: nn.Module, family: Family, attention: nn.Module, kv: int, head: int) -> str:
    if kv == 1:
        return "a single key-value head"
    if family.whole:
        return family.whole
    for name, reason in family.whole_if:
        if getattr(model.config, name, False):
            return reason
    known = {*family.qkv, family.out}
    for name, parameter in attention.named_parameters():
        if name.split(".")[0] not in known and parameter.numel() != head:
            return f"{name.rsplit('.', 1)[0]!r} normalises over all heads"
    return ""


def is_linear(module: nn.Module) -> bool:
    """Whether a layer is ``nn.Linear`` (a subclass that only renames it too) or transformers' ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is stored as (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def features(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer, from its weight's shape."""
    rows, columns = tensor_of(module, "weight").shape
    return (int(rows), int(columns)) if is_conv1d(module) else (int(columns), int(rows))


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """A parameter of a layer, whose type torch leaves open between tensors and modules."""
    found: Tensor = getattr(module, name)
    return found


def feature_names(module: nn.Module) -> tuple[str, str]:
    """Names of the attributes that hold a linear layer's (inputs, outputs)."""
    return ("nx", "nf") if is_conv1d(module) else ("in_features", "out_features")


def head_attributes(model: nn.Module, block: Block) -> dict[str, int]:
    """Attributes of an attention module that count its heads: {attribute: how much of it one unit is worth}.

    A unit is one key-value head with its R query heads (all heads where the attention is whole). A name that
    starts with "config." is a field of the config object that the module's forward reads.
    """
    units = 1 if block.whole else block.kv_heads
    owner = model.get_submodule(block.attention)
    worth = {
        "num_heads": block.query_heads,
        "num_attention_heads": block.query_heads,
        "num_key_value_heads": block.kv_heads,
        "num_kv_heads": block.kv_heads,
        "split_size": block.query_heads * block.head_dim,
    }
    found = {
        n: v // units for n, v in worth.items() if isinstance(owner.__dict__.get(n), int) and not block.whole
    }
    return found | {
        f"config.{n}": worth[n] // units for n in family_of(model).config_heads if not block.whole
    }


def neuron_attributes(model: nn.Module, block: Block) -> dict[str, int]:
    """Attributes of a feed-forward module that count its neurons; the same shape as `head_attributes`."""
    owner = model.get_submodule(block.ffn)
    return {"intermediate_size": 1} if isinstance(owner.__dict__.get("intermediate_size"), int) else {}


class LayerConfig:
    """A config with a few fields of its own; everything else is read from the config that all layers share."""

    def __init__(self, shared: object, fields: Mapping[str, object]) -> None:
        self.__dict__["_shared"] = shared
        self.__dict__.update(fields)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_shared":
            raise AttributeError(name)
        return getattr(self._shared, name)


def set_attribute(module: nn.Module, attribute: str, value: int) -> None:
    """Set an integer attribute; "config.x" sets it in a config of the module's own, a tuple keeps its length of 1."""
    if attribute.startswith("config."):
        name = attribute.removeprefix("config.")
        owner: Any = module  # whose attribute is neither a tensor nor a module
        shared = owner.config
        if isinstance(shared, LayerConfig):
            shared.__dict__[name] = value
        else:
            owner.config = LayerConfig(shared, {name: value})
    elif isinstance(getattr(module, attribute, None), tuple):
        setattr(module, attribute, (value,))
    else:
        setattr(module, attribute, value)


# Parts that are gone

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


# Sizes of a model, and a model of given sizes


def layer_sizes(model: nn.Module) -> list[dict[str, int]]:
    """For each block the sizes under the config's own names; 0 heads or neurons where a part is dropped."""
    heads, kv, neurons = family_of(model).sizes
    return [
        {heads: b.query_heads, **({kv: b.kv_heads} if kv else {}), neurons: b.neurons}
        for b in blocks_of(model)
    ]


def resize(model: nn.Module, sizes: Sequence[Mapping[str, int]], hidden_size: int | None = None) -> None:
    """Give the modules of a model built from the dense config the sizes of `layer_sizes`; works on ``meta`` too.

    Values of the tensors that change size are undefined; a checkpoint is to be loaded afterwards.

    Raises:
        UnsupportedModel: the number of blocks or a size does not fit the model.
    """
    blocks = blocks_of(model)
    heads_name, _, neurons_name = family_of(model).sizes
    if len(sizes) != len(blocks):
        raise UnsupportedModel(f"per_layer_config: {len(sizes)} layers for a model of {len(blocks)}")
    for block, wanted in zip(blocks, sizes, strict=True):
        heads, neurons = wanted.get(heads_name), wanted.get(neurons_name)
        for name, value, most in (
            (heads_name, heads, block.query_heads),
            (neurons_name, neurons, block.neurons),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
                raise UnsupportedModel(
                    f"per_layer_config[{block.index}].{name}: {value!r}; allowed: 0 to {most}"
                )
        assert heads is not None and neurons is not None
        each = block.query_heads if block.whole else block.ratio
        if heads % max(1, each):
            raise UnsupportedModel(
                f"per_layer_config[{block.index}].{heads_name}: {heads}; allowed: multiples of {each}"
            )
        if heads != block.query_heads:
            _resize_attention(model, block, heads // each)
        if neurons != block.neurons:
            _resize_ffn(model, block, neurons)
    if hidden_size is not None:
        _resize_hidden(model, hidden_size)


def _resize_attention(model: nn.Module, block: Block, units: int) -> None:
    dense = 1 if block.whole else block.kv_heads
    attributes = head_attributes(model, block)
    for name in block.qkv:
        _resize_linear(model.get_submodule(name), outputs=lambda n: n // dense * units)
    _resize_linear(model.get_submodule(block.out), inputs=lambda n: n // dense * units)
    owner = model.get_submodule(block.attention)
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
    """Width of the residual stream, from the shape of the first block's first layer."""
    return features(model.get_submodule(blocks_of(model)[0].qkv[0]))[0]


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
        if is_linear(module):
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
