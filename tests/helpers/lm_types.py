"""A tiny random model of any causal type that transformers knows, from what its config calls its sizes."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 96
# Sizes under every name that configs give them; a config gets those that it has.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 48),
    **dict.fromkeys(
        ("intermediate_size", "d_ff", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 40
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 3
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 6),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 6),
    "num_key_value_heads": 3,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    "sliding_window": 8,
    "is_decoder": True,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "num_experts_per_token"), 2),
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 8),
    "qk_rope_head_dim": 4,
    "first_k_dense_replace": 1,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
    "rotary_dim": 4,
}
_LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 24,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
# What a type needs beyond that.
_OWN: dict[str, dict[str, Any]] = {
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen3_5_moe_text": _LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "falcon_h1": _MAMBA | {"mamba_d_head": 8, "mamba_d_ssm": 32},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "granitemoehybrid": _MAMBA | {
        "num_local_experts": 0, "shared_intermediate_size": 40, "layer_types": ["mamba", "attention", "mamba"],
    },
    "nemotron_h": {
        "mamba_num_heads": 4, "mamba_head_dim": 24, "ssm_state_size": 8, "n_groups": 1,
        "layers_block_type": ["mamba", "attention", "mlp"],
    },
    "diffllama": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "opt": {"word_embed_proj_dim": 48},
    "xglm": {"attention_heads": 6},
    "minicpm3": {"head_dim": None, "num_key_value_heads": 6},
    "youtu": {"head_dim": None, "num_key_value_heads": 6},
    "falcon": {"ffn_hidden_size": 40, "new_decoder_architecture": True, "num_kv_heads": 3},
    "gemma2": {"attn_implementation": "eager"},
}  # fmt: skip
HYBRIDS = ("qwen3_5_text", "lfm2", "falcon_h1", "granitemoehybrid", "nemotron_h", "olmo_hybrid")
"""Types whose blocks mix softmax attention with other mixers."""


def type_config(kind: str) -> Any:
    """A config of the type with few, small layers; raises whatever the type's own config raises."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    stock: Any = CONFIG_MAPPING[kind]
    known = {*vars(stock()), *getattr(stock, "attribute_map", {})}
    config = stock(
        **{**{name: value for name, value in _SIZES.items() if name in known}, **_OWN.get(kind, {})}
    )
    for name, other in (("eos_token_id", VOCABULARY - 1), ("pad_token_id", 0)):
        if kind not in ("gemma4_text", "gemma4_unified_text"):
            setattr(config, name, None)
            lost = getattr(stock.from_dict(config.to_dict()), name, None) is not None
            setattr(config, name, other if lost else None)  # some read None as their own default
    return config


def type_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of the type in eval mode, its matrices random and large enough to matter."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = type_config(kind)
        if dtype == torch.float64 and any("expert" in name for name in vars(config)):
            config._experts_implementation = "eager"  # the product of all experts at once takes no float64
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)  # some are float32 whatever is asked for
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.7 / parameter.shape[-1] ** 0.5)
    return model.eval()
