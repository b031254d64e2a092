"""A tiny Llama with its tokenizer as a transformers folder, and a config that prunes it in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 300
CONFIG = """\
name: tiny
model: {{name: "hf:{model}"}}
data: {{name: help_texts, sequence_length: 16, calibration: 6, validation: 6, test: 5, train: 8}}
budget: {{metric: params, target: 0.8}}
prune: {{importance: l2}}
recovery: {{steps: [reconstruct]}}
search: {{evaluations: 4, batch: 2}}
score: {{dtype: float32}}
finish: {{rules: false, candidates: 1}}
device: cpu
"""


def write_folder(path: Path, **settings: Any) -> Path:
    """A random Llama of 3 blocks and its tokenizer, as save_pretrained writes them."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from rlprune.language.loading import help_tokenizer

    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
    } | settings  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    logging.disable_progress_bar()
    try:
        model.save_pretrained(path)
    finally:
        logging.enable_progress_bar()
    help_tokenizer(VOCABULARY).save_pretrained(path)
    return path


def write_mixture(path: Path, **settings: Any) -> Path:
    """The same of a random Mixtral: 2 blocks of 4 experts with 16 neurons each, two of them to a token."""
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.utils import logging

    from rlprune.language.loading import help_tokenizer

    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "num_local_experts": 4, "num_experts_per_tok": 2, "bos_token_id": 0, "eos_token_id": 0,
        "initializer_range": 0.2,
    } | settings  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**sizes))
    logging.disable_progress_bar()
    try:
        model.save_pretrained(path)
    finally:
        logging.enable_progress_bar()
    help_tokenizer(VOCABULARY).save_pretrained(path)
    return path


def write_config(path: Path, model: Path | str) -> Path:
    """The YAML file of a run on a model's folder or file."""
    path.write_text(CONFIG.format(model=model), encoding="utf-8")
    return path
