"""One adapter for each family of transformers causal language models: where the parts are and what follows a cut.

This file imports nothing of rlprune but ``linear.py``: copies of both travel in every saved folder of a pruned
language model, so that ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` works where rlprune
is not installed.

Shapes: H hidden size, D head size, K key-value heads, R query heads to each of them, F neurons.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from .experts import Experts, Mixture, find_experts
from .linear import UnsupportedModel as UnsupportedModel
from .linear import features, is_dropped, is_linear


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
    # Parameters of the attention with one entry for each query head.
    per_query_head: tuple[str, ...] = ()
    # Where the feed-forward parts of some or all blocks are mixtures of experts.
    mixture: Mixture | None = None
    # What follows is said of families that `rlprune.language.structure` found.
    # More layers of the attention whose rows belong to heads.
    gates: tuple[str, ...] = ()
    # Blocks may have no attention or no feed-forward part of this shape: hybrid models.
    optional: bool = False
    # Parts that stay as they are, and why: (what is "attention" or "ffn", reason).
    kept: tuple[tuple[str, str], ...] = ()
    # Parts that can be cut but not removed: "attention", "ffn".
    undroppable: tuple[str, ...] = ()
    # How many things the attention's forward returns; 0: the tensor itself.
    returns: int = 2
    # Sizes stand in config.json's `pruned_layers`, not in transformers' per_layer_config.
    listed: bool = False


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
    "mixtral": Family(mixture=Mixture(sizes=("num_local_experts", "intermediate_size", ""))),
    "olmoe": Family(mixture=Mixture(sizes=("num_experts", "intermediate_size", ""))),
    "qwen3_moe": Family(mixture=Mixture()),
    "qwen2_moe": Family(
        mixture=Mixture(
            shared="shared_expert",
            sizes=("num_experts", "moe_intermediate_size", "shared_expert_intermediate_size"),
        )
    ),
    "gpt_oss": Family(
        per_query_head=("sinks",),
        mixture=Mixture(router="router", sizes=("num_local_experts", "intermediate_size", "")),
    ),
}  # fmt: skip
FAMILIES: Mapping[str, Family] = _FAMILIES
"""{model_type: its adapter}."""
OTHERS: dict[str, str] = {}
"""{model_type: module that registered it}, of those that do not come with rlprune."""
FOUND: set[str] = set()
"""Model types whose entry was found by structure in this process, or read from a saved folder."""


def register(model_type: str, family: Family) -> None:
    """Add the adapter of a ``model_type`` that transformers knows, or that was registered with its auto classes.

    It takes the place of parts that were found by structure.

    Raises ValueError: the type has an adapter, or ``family`` is none.
    """
    if model_type in FAMILIES and model_type not in FOUND:
        raise ValueError(f"families.register: the model_type {model_type!r} has an adapter already")
    if not isinstance(family, Family):
        raise ValueError(f"families.register: {model_type!r} needs a Family, got {type(family).__name__}")
    _FAMILIES[model_type] = family
    FOUND.discard(model_type)
    OTHERS[model_type] = str(sys._getframe(1).f_globals.get("__name__", ""))


def unregister(model_type: str) -> None:
    """Take back what `register` or `remember` added."""
    del _FAMILIES[model_type]
    OTHERS.pop(model_type, None)
    FOUND.discard(model_type)


def remember(model_type: str, family: Family) -> None:
    """Keep the entry of a type that no one registered; one that was registered stays."""
    if model_type not in FAMILIES or model_type in FOUND:
        _FAMILIES[model_type] = family
        FOUND.add(model_type)


def family_fields(family: Family) -> dict[str, Any]:
    """What an entry says beyond the defaults, as JSON holds it; `family_from` reads it."""
    return {
        f.name: getattr(family, f.name)
        for f in fields(family)
        if getattr(family, f.name) != getattr(_LLAMA, f.name)
    }


def family_from(content: object) -> Family:
    """The entry of `family_fields`; UnsupportedModel for anything else."""
    if not isinstance(content, dict):
        raise UnsupportedModel("pruned_family: must be a table of names")
    kinds = {f.name: type(getattr(_LLAMA, f.name)) for f in fields(Family)}
    given: dict[str, Any] = {}
    for name, value in content.items():
        value = _tuples(value)
        if name not in kinds or not isinstance(value, kinds[name]):
            raise UnsupportedModel(
                f"pruned_family.{name}: is none of an adapter's fields, or of another kind"
            )
        given[name] = value
    return Family(**given)


def _tuples(value: object) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class Block:
    """The parts of one transformer block, as names inside the causal LM, and their sizes.

    ``attention`` and ``ffn`` are module paths (``ffn`` is the block's first feed-forward layer where the family
    has no module for the part); "" where the block has no such part. ``whole`` is the reason why the attention's
    heads cannot be told apart, or "". A block with ``experts`` has a plain feed-forward part where it shares one
    between all tokens; else ``ffn`` and ``down`` are "" and ``up`` is empty.
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
    experts: Experts | None = None
    gates: tuple[str, ...] = ()

    @property
    def ffn_output(self) -> str:
        """The module whose output is what the feed-forward part adds: the mixture, or the down projection."""
        return self.experts.owner if self.experts is not None else self.down

    @property
    def heads_rows(self) -> tuple[str, ...]:
        """All layers of the attention whose rows belong to heads."""
        return (*self.qkv, *self.gates)

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
    refuse_kind(model_or_config)
    if kind not in FAMILIES:
        raise UnsupportedModel(
            f"{what}: no adapter for model_type {kind!r}{near_types(kind)}; `rlprune list families` has those that are"
        )
    if model is not None and not (kind in FOUND and _output_layer(model) is not None):
        headless = not hasattr(model, "lm_head") and not hasattr(model, "embed_out")
        if headless and not getattr(
            type(model), "sized_by_config", False
        ):  # one of rlprune's own bodies or classifiers
            raise UnsupportedModel(f"{what}: has no language-model head; load it with AutoModelForCausalLM")
    return FAMILIES[kind]


def refuse_kind(model_or_config: object) -> None:
    """Raise UnsupportedModel for an encoder-decoder and for a mixture of experts."""
    config = getattr(model_or_config, "config", model_or_config)
    model = model_or_config if isinstance(model_or_config, nn.Module) else None
    what = type(model if model is not None else config).__name__
    kind = getattr(config, "model_type", "")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{what}: an encoder-decoder model; only causal language models can be pruned")
    experts = _experts(model) if model is not None else None
    if experts is not None and (kind not in FAMILIES or FAMILIES[kind].mixture is None):
        known = ", ".join(sorted(name for name, family in FAMILIES.items() if family.mixture is not None))
        raise UnsupportedModel(
            f"{what}: {experts} is a mixture of experts of a type without an adapter ({kind!r}); allowed: {known}"
        )


def near_types(kind: str) -> str:
    """A hint at known model types that are spelt like ``kind``, or nothing."""
    close = difflib.get_close_matches(kind, FAMILIES, n=2, cutoff=0.8)
    return f" (near: {', '.join(close)})" if close else ""


def _output_layer(model: nn.Module) -> object:
    get = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


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
    path = inside(model, family.blocks)
    layers = modules.get(path)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UnsupportedModel(f"{type(model).__name__}: has no blocks at {path!r}")
    return [_block(model, family, modules, f"{path}.{i}", i) for i in range(len(layers))]


def why_never_plain(model: nn.Module) -> str:
    """Why no plain config of transformers can say the sizes of such a model's blocks; "" where one may."""
    owner: Any = model  # torch takes a model's config for a module
    if owner.config.get_text_config() is not owner.config:
        return "the language part is one of several, with a configuration inside of the whole model's"
    blocks = blocks_of(model)
    missing = [block for block in blocks if not (block.attention and block.ffn)]
    if any(block.experts for block in missing):
        return "experts are in the place of a block's feed-forward part"
    if missing:
        return "not every block has an attention and a feed-forward part"
    return ""


def inside(model: nn.Module, path: str) -> str:
    """The path of a causal LM's module within a model that may be its inner one, without the head (LlamaModel)."""
    prefix = getattr(model, "base_model_prefix", "")
    inner = bool(prefix) and prefix not in dict(model.named_children())
    return path.removeprefix(f"{prefix}.") if inner else path


def _block(
    model: nn.Module, family: Family, modules: Mapping[str, nn.Module], path: str, index: int
) -> Block:
    attention = f"{path}.{family.attention}"
    inner = f"{path}.{family.ffn}" if family.ffn else path
    experts = None if family.mixture is None else find_experts(modules, inner, family.mixture)
    if experts is not None and family.mixture is not None:
        inner = f"{inner}.{family.mixture.shared}" if family.mixture.shared else ""
    qkv, gates = (tuple(f"{attention}.{n}" for n in names) for names in (family.qkv, family.gates))
    out, down = f"{attention}.{family.out}", f"{inner}.{family.down}" if inner else ""
    up = tuple(f"{inner}.{n}" for n in family.up) if inner else ()
    no_heads, no_neurons = is_dropped(modules.get(out)), not inner or is_dropped(modules.get(down))
    odd_heads = None if no_heads else _odd(modules, (*qkv, *gates, out))
    odd_neurons = None if no_neurons else _odd(modules, (*up, down))
    for name in (odd_heads, odd_neurons):
        if name is not None and not family.optional:
            found = type(modules[name]).__name__ if name in modules else "nothing"
            raise UnsupportedModel(
                f"{type(model).__name__}: {name!r} should be a linear layer; found: {found}"
            )
    ffn = inner if family.ffn or not up else up[0]
    ffn, up, down = (ffn, up, down) if odd_neurons is None else ("", (), "")
    neurons = 0 if no_neurons or not down else features(modules[down])[0]
    if odd_heads is not None:
        return Block(index, path, "", (), "", ffn, up, down, 0, 0, 0, neurons)
    owner = modules[attention]
    head = _head_dim(model, family, owner, attention)
    queries = 0 if no_heads else features(modules[out])[0] // head
    rows = 0 if no_heads else features(modules[qkv[-1]])[1] // head
    kv = rows if len(qkv) == 3 else (rows - queries) // 2
    return Block(
        index, path, attention, qkv, out, ffn, up, down, kv, queries, head, neurons,
        _whole(model, family, owner, kv, head), experts, gates,
    )  # fmt: skip


def _odd(modules: Mapping[str, nn.Module], names: Sequence[str]) -> str | None:
    """The first name that is no linear layer's."""
    return next((n for n in names if n not in modules or not is_linear(modules[n])), None)


def _head_dim(model: nn.Module, family: Family, attention: nn.Module, path: str) -> int:
    found: object = None
    for name in ("head_dim", "head_size", "attention_head_size"):
        found = found or getattr(attention, name, None)
    if found is None and family.listed:  # the config's sizes are the dense model's
        owner: Any = model  # torch takes a model's config for a module
        config = owner.config.get_text_config()
        found = config.hidden_size // config.num_attention_heads
    if not isinstance(found, int):
        raise UnsupportedModel(f"{path!r}: has no head_dim")
    return found


def _whole(model: nn.Module, family: Family, attention: nn.Module, kv: int, head: int) -> str:
    if kv == 1:
        return "a single key-value head"
    if family.whole:
        return family.whole
    for name, reason in family.whole_if:
        if getattr(model.config, name, False):
            return reason
    known = (*family.qkv, family.out, *family.gates, *family.per_query_head)
    for name, parameter in attention.named_parameters():
        alone = parameter.numel() in ((1, head) if family.listed else (head,))
        if not alone and not any(name == n or name.startswith(f"{n}.") for n in known):
            return f"{name.rsplit('.', 1)[0]!r} normalises over all heads"
    return ""


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
    if family_of(model).listed:  # names of other families, where they hold what they seem to say
        more = {
            **dict.fromkeys(("n_heads", "n_head", "num_query_heads"), block.query_heads),
            **dict.fromkeys(("n_kv_heads", "kv_heads"), block.kv_heads),
            **dict.fromkeys(("all_head_size", "embed_dim", "hidden_size", "q_size"), worth["split_size"]),
            "kv_size": block.kv_heads * block.head_dim,
        }
        worth |= {n: v for n, v in more.items() if owner.__dict__.get(n) == v}
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
