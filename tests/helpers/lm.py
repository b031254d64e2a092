"""Tiny language models of every family with random weights, for all tests of the language side."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY = 96
_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GROUPED = _BASE | {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
_PLAIN_ROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}

# Name of a variant -> (model_type, settings of its config).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "llama-mha-tied": ("llama", _BASE | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-biases": ("llama", _GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama-mqa": ("llama", _BASE | {"num_key_value_heads": 1}),
    "mistral": ("mistral", _GROUPED | {"sliding_window": 8}),
    "qwen2": ("qwen2", _BASE | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", _GROUPED),
    "gemma": ("gemma", _GROUPED | {"head_dim": 16}),
    "gemma2": ("gemma2", _GROUPED | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma3": ("gemma3_text", _GROUPED | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "phi3": ("phi3", _BASE | {"num_key_value_heads": 2, "pad_token_id": 0}),
    "phi": ("phi", _BASE | {"num_key_value_heads": 2, "qk_layernorm": True}),
    "opt": (
        "opt",
        {k: v for k, v in _BASE.items() if k != "intermediate_size"}
        | {"ffn_dim": 40, "word_embed_proj_dim": 32, "pad_token_id": 0},
    ),
    "opt-project": (
        "opt",
        {k: v for k, v in _BASE.items() if k != "intermediate_size"}
        | {"ffn_dim": 40, "word_embed_proj_dim": 16, "pad_token_id": 0, "do_layer_norm_before": False},
    ),
    "gpt_neox": ("gpt_neox", _BASE),
    "gpt_neox-serial": ("gpt_neox", _BASE | {"use_parallel_residual": False}),
    "gpt2": (
        "gpt2",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 40, "n_positions": 128}
        | {"bos_token_id": 1, "eos_token_id": None},
    ),
    "gptj": (
        "gptj",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 40, "n_positions": 128}
        | {"rotary_dim": 4, "bos_token_id": 1, "eos_token_id": None},
    ),
    "bloom": (
        "bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4}
        | {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0},
    ),
    "falcon": (
        "falcon",
        {k: v for k, v in _BASE.items() if k != "intermediate_size"}
        | {"ffn_hidden_size": 40, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    "falcon-mqa": (
        "falcon",
        {k: v for k, v in _BASE.items() if k != "intermediate_size"} | {"ffn_hidden_size": 40},
    ),
    "falcon-mha": (
        "falcon",
        {k: v for k, v in _BASE.items() if k != "intermediate_size"}
        | {"ffn_hidden_size": 40, "multi_query": False, "parallel_attn": False},
    ),
    "granite": ("granite", _BASE | {"num_key_value_heads": 2, "residual_multiplier": 0.5}),
    "smollm3": ("smollm3", _BASE | {"num_key_value_heads": 2}),
    "olmo": ("olmo", _BASE | {"num_key_value_heads": 2, "clip_qkv": 2.0}),
    "olmo2": ("olmo2", _BASE | {"num_key_value_heads": 2}),
    "cohere": ("cohere", _BASE | {"num_key_value_heads": 2}),
    "stablelm": ("stablelm", _BASE | {"num_key_value_heads": 2}),
    "starcoder2": ("starcoder2", _BASE | {"num_key_value_heads": 2}),
    "nemotron": ("nemotron", _BASE | {"num_key_value_heads": 2, "head_dim": 8}),
    "glm": ("glm", _GROUPED),
    "glm4": ("glm4", _GROUPED),
    "ministral": ("ministral", _GROUPED),
    "olmo3": ("olmo3", _BASE | {"num_key_value_heads": 2}),
    "seed_oss": ("seed_oss", _GROUPED),
    "exaone4": ("exaone4", _GROUPED),
    "hunyuan": ("hunyuan_v1_dense", _GROUPED),
    "cohere2": ("cohere2", _BASE | {"num_key_value_heads": 2}),
}
# The same of mixtures of experts, whose groups are others.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", _GROUPED | _EXPERTS | {"num_local_experts": 5, "intermediate_size": 16}),
    "olmoe": (
        "olmoe",
        _BASE | _EXPERTS | {"num_key_value_heads": 2, "num_experts": 6, "intermediate_size": 16},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        _GROUPED
        | _EXPERTS
        | {"num_experts": 6, "moe_intermediate_size": 16, "mlp_only_layers": [1], "norm_topk_prob": True},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        _GROUPED
        | _EXPERTS
        | {"num_experts": 6, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    ),
    "gpt_oss": (
        "gpt_oss",
        _GROUPED
        | _EXPERTS
        | {"num_local_experts": 5, "intermediate_size": 16, "sliding_window": 8}
        | _PLAIN_ROPE,
    ),
}


def tiny_config(name: str = "llama", attention: str = "sdpa", **settings: Any) -> Any:
    """The config of a variant, with settings changed; ``attention`` is sdpa or eager."""
    from transformers import AutoConfig

    kind, base = (VARIANTS | MIXTURES)[name]
    # These have no attention through torch's fused function.
    attention = "eager" if kind in ("bloom", "gptj", "gemma2", "gpt_oss") else attention
    return AutoConfig.for_model(kind, **(base | settings | {"attn_implementation": attention}))


def tiny_lm(
    name: str = "llama",
    seed: int = 0,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> nn.Module:
    """A model of a variant in eval mode; weights, biases and norm gains are random, and equal for equal seeds."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(name, attention, **settings)
    # The product of all experts at once takes no float64.
    more = {"experts_implementation": "eager"} if name in MIXTURES and dtype == torch.float64 else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **more)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.7 / parameter.shape[-1] ** 0.5)
                elif key.endswith("bias"):
                    parameter.uniform_(-0.3, 0.3)
                else:
                    parameter.uniform_(0.5, 1.5)
    return model.eval()


def tokens(length: int = 12, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids (B, L)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)
