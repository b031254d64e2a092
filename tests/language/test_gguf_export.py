"""GGUF files of pruned language models: every tensor, and what readers compute from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlprune
from helpers.gguf_models import deci_logits, fields, tensors
from helpers.lm import tiny_lm, tokens
from helpers.pruned_lm import error_of, plan_of

gguf = pytest.importorskip("gguf")
from rlprune.language.files import llama_cpp  # noqa: E402
from rlprune.language.files.gguf_file import check_file, is_ours, write_gguf  # noqa: E402
from rlprune.language.files.gguf_layout import layout_of  # noqa: E402

IDS = tokens(24)[0]
# (KV heads, neurons) of three blocks of Llama: 3 heads and 40 neurons are whole.
PLANS = {
    "unequal": (3, 29, 2, 17, 1, 40),
    "first attention dropped": (0, 29, 2, 17, 1, 40),
    "attentions and a feed-forward part dropped": (3, 29, 0, 17, 1, 0),
    "a block dropped": (3, 5, 0, 0, 2, 40),
    "no attention at all": (0, 5, 0, 5, 0, 7),
}


def cut(name: str, widths: Sequence[int] | None, **more: Any) -> Any:
    """A tiny model of a variant, cut to widths (None: dense)."""
    model = tiny_lm(name, **more)
    space = rlprune.trace(model, tokens(), drop=True, verify=False)
    return rlprune.prune(model, plan_of(space, np.array(space.widths if widths is None else widths), 1))


def written(slim: Any, folder: Path, dtype: str = "f32") -> Path:
    folder.mkdir(exist_ok=True)
    return write_gguf(slim, folder / f"{dtype}.gguf", dtype, folder).path


def own_logits(slim: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return slim(input_ids=ids[None]).logits[0]


class TestDeci:
    @pytest.mark.parametrize("widths", PLANS.values(), ids=PLANS)
    @pytest.mark.parametrize("name", ["llama", "llama-biases"])
    def test_the_file_computes_what_the_model_does(self, tmp_path, name, widths):
        slim = cut(name, widths)
        found = deci_logits(written(slim, tmp_path), IDS)
        assert torch.allclose(found, own_logits(slim), atol=2e-5)

    @pytest.mark.parametrize("name", ["qwen2", "seed_oss"])
    def test_families_with_another_rotation_are_turned(self, tmp_path, name):
        slim = cut(name, (2, 29, 1, 17, 0, 40))
        assert torch.allclose(deci_logits(written(slim, tmp_path), IDS), own_logits(slim), atol=2e-5)

    @pytest.mark.parametrize(
        "rope",
        [
            {"rope_type": "linear", "factor": 4.0},
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 64},
        ],
        ids=lambda rope: rope["rope_type"],
    )  # fmt: skip
    def test_rotary_settings(self, tmp_path, rope):
        slim = cut("llama", PLANS["unequal"], rope_parameters=rope | {"rope_theta": 5000.0})
        found = deci_logits(written(slim, tmp_path), IDS)
        assert torch.allclose(found, own_logits(slim), atol=2e-5)
        plain = cut("llama", PLANS["unequal"], rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
        assert not torch.allclose(own_logits(plain), own_logits(slim), atol=1e-3), "the setting matters here"

    def test_a_pruned_hidden_size_and_a_lone_head(self, tmp_path):
        model = tiny_lm("llama", seed=3)
        space = rlprune.trace(model, tokens(), hidden=True, verify=False)
        widths = [
            w - 1 if g.kind != "hidden" else w // 2 for g, w in zip(space.groups, space.widths, strict=True)
        ]
        widths[0] = 1
        slim = rlprune.prune(model, plan_of(space, np.array(widths)))
        path = written(slim, tmp_path)
        assert fields(path)["deci.embedding_length"] == 24
        assert torch.allclose(deci_logits(path, IDS), own_logits(slim), atol=2e-5)


@given(
    st.tuples(*[st.integers(0, 3), st.integers(0, 40)] * 3).filter(any),
    st.sampled_from(["f32", "f16", "bf16", "q8_0"]),
)
@settings(max_examples=12, deadline=None)
def test_any_widths_read_back(tmp_path_factory, widths, dtype):
    """Every tensor is there under llama.cpp's name, has our numbers, and the file computes what the model does."""
    slim = cut("llama", widths)
    path = written(slim, tmp_path_factory.mktemp("any"), dtype)
    found, state = tensors(path), slim.state_dict()
    places = [i for i in range(3) if widths[2 * i] or widths[2 * i + 1]]
    for place, block in enumerate(places):
        for theirs, ours in {
            "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        }.items():  # fmt: skip
            kept = widths[2 * block + (0 if "attn" in theirs else 1)]
            if kept:
                wanted = state[f"model.layers.{block}.{ours}.weight"]
                assert near(found[f"blk.{place}.{theirs}.weight"], wanted, dtype)
            else:
                assert not found.get(f"blk.{place}.{theirs}.weight", torch.zeros(1)).any()
        assert torch.equal(
            found[f"blk.{place}.ffn_norm.weight"],
            state[f"model.layers.{block}.post_attention_layernorm.weight"],
        )
    assert near(found["token_embd.weight"], state["model.embed_tokens.weight"], dtype)
    if dtype == "f32" and fields(path)["general.architecture"] == "deci":
        assert torch.allclose(deci_logits(path, IDS), own_logits(slim), atol=2e-5)


def near(found: torch.Tensor, wanted: torch.Tensor, dtype: str) -> bool:
    """Equal under a type; matrices of rows that are no multiple of 32 are float16 under q8_0."""
    kind = {"f32": torch.float32, "bf16": torch.bfloat16}.get(dtype, torch.float16)
    if dtype == "q8_0" and wanted.shape[-1] % 32 == 0:
        return bool(((found - wanted).abs() <= wanted.abs().max() / 127).all())
    return torch.equal(found, wanted.to(kind).float())


class TestOwnArchitectures:
    """Where blocks are alike; transformers' own GGUF reader is the oracle."""

    @pytest.mark.parametrize(
        ("name", "widths", "own", "more"),
        [
            ("llama", (2, 16, 2, 16, 2, 16), "llama", {}),
            ("llama-mha-tied", None, "llama", {}),
            ("qwen2", (2, 16, 2, 16, 0, 0), "qwen2", {}),
            (
                "qwen3",
                (2, 16, 2, 16, 2, 16),
                "qwen3",
                {"head_dim": 128},
            ),  # which its reader takes for granted
        ],
    )
    def test_transformers_reads_the_same_model(self, tmp_path, name, widths, own, more):
        pytest.importorskip("accelerate")
        from transformers import AutoModelForCausalLM

        slim = cut(name, widths, **more)
        path = written(slim, tmp_path)
        assert fields(path)["general.architecture"] == own
        read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
        assert torch.allclose(own_logits(read), own_logits(slim), atol=1e-5)

    def test_a_sliding_window_ends_the_context(self, tmp_path):
        slim = cut("mistral", None)
        assert layout_of(slim).context == 8
        assert "the file's context is its 8 tokens" in " ".join(layout_of(slim).notes)

    def test_biases_of_zeros_are_none(self):
        slim = cut("llama-biases", None)
        with torch.no_grad():
            for name, parameter in slim.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
        assert not any(tensor.name.endswith("bias") for tensor in layout_of(slim).tensors)


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "widths", "words"),
        [
            ("gpt2", None, "'gpt2'; allowed: granite, llama"),
            ("smollm3", (2, 29, 2, 17, 2, 40), "one number of neurons for all blocks"),
            ("smollm3", (0, 0, 2, 40, 2, 40), "every fourth block"),
            ("qwen3", (3, 29, 2, 17, 1, 40), "openelm: reads no output layer"),
        ],
    )
    def test_one_line_names_what_stands_in_the_way(self, name, widths, words):
        if name == "smollm3" and widths[0] == 0:
            slim = cut(name, (*widths, 2, 40), num_hidden_layers=4)
        else:
            slim = cut(name, widths)
        assert words in error_of(lambda: layout_of(slim))

    def test_a_bias_that_is_not_read(self):
        slim = cut("qwen3", None, tie_word_embeddings=True)
        from rlprune.language.modeling_rlprune import add_biases

        add_biases(slim, ["model.layers.1.mlp.down_proj"])
        with torch.no_grad():
            slim.get_parameter("model.layers.1.mlp.down_proj.bias").fill_(1.0)
        text = error_of(lambda: layout_of(slim))
        assert (
            "no bias of 'model.layers.1.mlp.down_proj'" in text
            and "leave 'bias' out of recovery.steps" in text
        )

    def test_settings_and_numbers(self, tmp_path):
        yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
        assert "rope_type 'yarn'" in error_of(lambda: layout_of(cut("llama", None, rope_parameters=yarn)))
        assert "hidden_act is 'gelu'" in error_of(lambda: layout_of(cut("llama", None, hidden_act="gelu")))
        assert "every block was dropped" in error_of(lambda: layout_of(cut("llama", [0] * 6)))
        slim = cut("llama", None)
        with torch.no_grad():
            slim.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = 1e5
        assert "use --dtype bf16 or f32" in error_of(lambda: written(slim, tmp_path, "f16"))
        assert not list(tmp_path.glob("*")), "nothing is left half written"
        with torch.no_grad():
            slim.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = float("nan")
        assert "NaN" in error_of(lambda: written(slim, tmp_path))

    def test_a_changed_file_does_not_pass(self, tmp_path):
        slim = cut("llama", PLANS["unequal"])
        path, layout = written(slim, tmp_path), layout_of(slim)
        kinds = {tensor.name: gguf.GGMLQuantizationType.F32 for tensor in layout.tensors}
        check_file(path, layout, kinds)
        raw = bytearray(path.read_bytes())
        raw[-3] ^= 0x40
        path.write_bytes(raw)
        assert "does not read back" in error_of(lambda: check_file(path, layout, kinds))
        assert is_ours(path)
        path.write_bytes(b"GGUF")
        assert not is_ours(path)


@pytest.mark.skipif(not llama_cpp.is_installed(), reason=f"llama.cpp is not installed: {llama_cpp.INSTALL}")
class TestLlamaCpp:
    @pytest.mark.parametrize(
        ("name", "widths", "dtype", "more"),
        [
            ("llama", PLANS["attentions and a feed-forward part dropped"], "f32", {}),
            ("llama-biases", PLANS["first attention dropped"], "f16", {}),
            ("qwen2", (2, 29, 1, 17, 0, 40), "f32", {}),
            ("qwen3", PLANS["attentions and a feed-forward part dropped"], "f32", {"tie_word_embeddings": True}),
            ("smollm3", None, "f32", {}),
            ("granite", None, "f32", {"attention_multiplier": 0.3, "embedding_multiplier": 2.0}),
            ("llama", (3, 32, 2, 17, 1, 40), "q8_0", {"hidden_size": 96}),
        ],
    )  # fmt: skip
    def test_logits_and_greedy_tokens(self, tmp_path, name, widths, dtype, more):
        slim = cut(name, widths, **more)
        found = llama_cpp.compare(slim, written(slim, tmp_path, dtype), dtype, IDS.tolist(), 12)
        assert found.apart < (0.002 if dtype != "q8_0" else 0.03)
        assert (found.same, found.generated) == (12, 12) or dtype == "q8_0"
        assert found.theirs == pytest.approx(found.ours, abs=1e-2)

    def test_a_wrong_layout_and_a_broken_file_are_told(self, tmp_path):
        slim = cut("llama", PLANS["unequal"])
        path = written(slim, tmp_path)
        other = cut("llama", PLANS["unequal"], seed=5)
        assert "other logits" in error_of(lambda: llama_cpp.compare(other, path, "f32", IDS.tolist(), 2))
        path.write_bytes(path.read_bytes()[:3000])
        assert "llama.cpp cannot run it" in error_of(lambda: llama_cpp.run_llama_cpp(path, [IDS.tolist()]))
