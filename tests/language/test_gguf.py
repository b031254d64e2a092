"""Language models from GGUF files: loaded, saved, and refused where they are broken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from helpers.language_settings import config_of, refused
from rlprune.errors import ArtifactError, ConfigError, DataError
from rlprune.experiments.build import build_workload
from rlprune.language.loading import help_tokenizer


def write_gguf(path: Path) -> LlamaForCausalLM:
    """A tiny Llama as a GGUF file with float weights and a byte-level tokenizer; returns the model."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    tokenizer = json.loads(help_tokenizer(300).backend_tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(tokenizer["vocab"].items(), key=lambda item: item[1])]
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(300)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    names |= {f"model.layers.0.{ours}": f"blk.0.{theirs}" for ours, theirs in parts.items()}
    for name, parameter in model.named_parameters():
        values, stem = parameter.detach(), name.removesuffix(".weight")
        if stem.endswith(("q_proj", "k_proj")):  # llama.cpp keeps the rotary pairs side by side
            heads = 2 if stem.endswith("q_proj") else 1
            values = values.view(heads, 2, -1, 32).transpose(1, 2).reshape(values.shape)
        writer.add_tensor(f"{names[stem]}.weight", values.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


class TestGGUF:
    def test_a_file_is_loaded_and_can_be_saved(self, tmp_path):
        pytest.importorskip("accelerate")
        expected = write_gguf(tmp_path / "tiny.gguf")
        workload = build_workload(config_of(f"hf:{tmp_path / 'tiny.gguf'}"))
        ids = workload.example_inputs
        with torch.no_grad():
            assert torch.allclose(workload.model(ids).logits, expected(ids).logits, atol=1e-5)
        text = json.dumps(workload.base) + workload.model.config.to_json_string()
        assert "quant" not in text.lower() and "gguf" not in json.dumps(workload.base["config"])
        workload.model.save_pretrained(tmp_path / "saved")
        workload.tokenizer.save_pretrained(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
        with torch.no_grad():
            assert torch.equal(again(ids).logits, workload.model(ids).logits)
        words = "def help(topic): return 'a string'"
        assert (
            AutoTokenizer.from_pretrained(tmp_path / "saved")(words)["input_ids"]
            == workload.tokenizer(words)["input_ids"]
        )

    def test_broken_and_foreign_files(self, tmp_path):
        pytest.importorskip("accelerate")
        path = tmp_path / "tiny.gguf"
        write_gguf(path)
        whole = path.read_bytes()
        for share in (0.001, 0.3, 0.6, 0.95):
            path.write_bytes(whole[: max(8, int(len(whole) * share))])
            assert "truncated or unknown GGUF" in refused(config_of(f"hf:{path}"), ArtifactError)
        path.write_bytes(b"PK" + whole)
        assert "not a GGUF file" in refused(config_of(f"hf:{path}"), ArtifactError)
        path.write_bytes(whole)
        assert "it holds tiny.gguf: name that file" in refused(config_of(f"hf:{tmp_path}"), DataError)

    def test_missing_packages(self, tmp_path, monkeypatch):
        path = tmp_path / "tiny.gguf"
        path.write_bytes(b"GGUF")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        text = refused(config_of(f"hf:{path}"), ConfigError)
        assert "needs gguf and accelerate: pip install 'rlprune[language]'" in text
