"""Tiny random models that read pictures beside text, one for each family whose language part is pruned."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 300
IMAGE, START, END = 290, 291, 292  # ids that the text's tokenizer does not give in these tests
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
_SIGLIP = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_QWEN = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_IDS = {
    "image_token_id": IMAGE,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "video_token_id": 293,
}

WHOLE: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": _TEXT | {"query_pre_attn_scalar": 8, "sliding_window": 8}, "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4, "image_token_index": IMAGE, "image_token_id": IMAGE, "boi_token_index": START,
        "eoi_token_index": END,
    },
    "gemma4": {
        "text_config": _TEXT | {
            "global_head_dim": 8, "num_global_key_value_heads": 2, "sliding_window": 8, "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 16,
            "pooling_kernel_size": 2,
        },
        "audio_config": None, "image_token_id": IMAGE, "boi_token_id": START, "eoi_token_id": END,
        "video_token_id": 293, "audio_token_id": 294,
    },
    "qwen2_vl": {
        "text_config": _TEXT | {"rope_parameters": _ROPE},
        "vision_config": _QWEN | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}, **_IDS,
    },
    "qwen2_5_vl": {
        "text_config": _TEXT | {"rope_parameters": _ROPE},
        "vision_config": _QWEN | {
            "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "window_size": 16,
            "fullatt_block_indexes": [0],
        },
        **_IDS,
    },
    "qwen3_vl": {
        "text_config": _TEXT | {"rope_parameters": _ROPE | {"mrope_interleaved": True}},
        "vision_config": _QWEN | {
            "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **_IDS,
    },
}  # fmt: skip


def whole_config(name: str) -> Any:
    """The config of a family's whole model."""
    from transformers import AutoConfig

    return AutoConfig.for_model(name, **WHOLE[name], tie_word_embeddings=True)


def whole_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model in eval mode; weights are random and large enough to matter."""
    from transformers import AutoModelForImageTextToText

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(whole_config(name), dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.5 / parameter.shape[-1] ** 0.5)
    return model.eval()


def picture_inputs(name: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A picture of 4 places between a few words, as the family's processor would hand them over."""
    ids = torch.tensor([[5, 6, START, *[IMAGE] * 4, END, 7, 8, 9]])
    generator = torch.Generator().manual_seed(1)
    found: dict[str, torch.Tensor] = {"input_ids": ids}
    if name == "gemma3":
        found["pixel_values"] = torch.rand(1, 3, 16, 16, generator=generator, dtype=dtype)
        found["token_type_ids"] = (ids == IMAGE).long()
    elif name == "gemma4":
        found["pixel_values"] = torch.rand(1, 16, 3 * 4 * 4, generator=generator, dtype=dtype)
        places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1)
        found["image_position_ids"] = places.reshape(1, 16, 2)
        found["mm_token_type_ids"] = (ids == IMAGE).long()
    else:
        found["pixel_values"] = torch.rand(16, 3 * 2 * 4 * 4, generator=generator, dtype=dtype)
        found["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        found["mm_token_type_ids"] = (ids == IMAGE).long()
    return found
