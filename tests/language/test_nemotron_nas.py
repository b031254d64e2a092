"""Folders of nemotron-nas: read by a reader written here after the public ones, and by transformers' AutoConfig."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import rlprune
from helpers.lm import tiny_lm, tokens
from helpers.pruned_lm import plan_of, tokenizer
from rlprune.cli.main import main
from rlprune.errors import ArtifactError
from rlprune.experiments import export
from rlprune.language.files.nemotron_nas import ffn_mult, neurons_of


def find_multiple(n: int, k: int) -> int:
    return n if n % k == 0 else n + k - n % k


def logits_of(folder: Path, ids: Tensor) -> Tensor:
    """A DeciLM in 40 lines of torch, float32: every size comes from config.json, as in vLLM's and mlx-lm's files."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    used: set[str] = set()

    def w(name: str) -> Tensor:
        used.add(name)
        return weights[name]

    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads

    def norm(x: Tensor, name: str) -> Tensor:
        return w(name) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]))

    def rotated(x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2])[:, None] * config["rope_theta"] ** (
            -torch.arange(0, size, 2) / size
        )
        cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
        return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin

    x = w("model.embed_tokens.weight")[ids]
    batch, length = ids.shape
    for index, block in enumerate(config["block_configs"]):
        at, attention, ffn = f"model.layers.{index}", block["attention"], block["ffn"]
        if not attention["no_op"]:
            h = norm(x, f"{at}.input_layernorm.weight")
            kv = heads // attention["n_heads_in_group"]
            assert w(f"{at}.self_attn.k_proj.weight").shape == (kv * size, hidden)
            q, k, v = (
                F.linear(h, w(f"{at}.self_attn.{n}_proj.weight"))
                .view(batch, length, -1, size)
                .transpose(1, 2)
                for n in "qkv"
            )
            assert q.shape[1] == heads
            k, v = (t.repeat_interleave(attention["n_heads_in_group"], 1) for t in (rotated(k), v))
            mixed = F.scaled_dot_product_attention(rotated(q), k, v, is_causal=True)
            x = x + F.linear(mixed.transpose(1, 2).flatten(2), w(f"{at}.self_attn.o_proj.weight"))
        if not ffn["no_op"]:
            if "ffn_mult" in ffn:
                width = find_multiple(int(2 * round(ffn["ffn_mult"], 6) * hidden / 3), 256)
            else:
                width = ffn["intermediate_size"]
            h = norm(x, f"{at}.post_attention_layernorm.weight")
            gate, up = (F.linear(h, w(f"{at}.mlp.{n}_proj.weight")) for n in ("gate", "up"))
            assert gate.shape[-1] == width
            x = x + F.linear(F.silu(gate) * up, w(f"{at}.mlp.down_proj.weight"))
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    out = F.linear(norm(x, "model.norm.weight"), w(head))
    assert used == set(weights), "no tensor that a reader would not know"
    return out


def pruned(
    tmp_path: Path, name: str = "llama", step: int | str = "auto", seed: int = 0, **sizes: Any
) -> Path:
    """A folder of a model pruned at random in the space of vLLM, parts removed."""
    model = tiny_lm(name, num_hidden_layers=4, **sizes)
    space = rlprune.trace(model, tokens(), drop=True, verify=False, runtime="vllm", round_to=step)
    shares = np.random.default_rng(seed).random(len(space.groups))
    widths = space.project(shares, 0.7, "block_params")
    kinds = [(g.kind, g.block) for g in space.groups]
    widths[kinds.index(("attention", 3))] = space.widths[kinds.index(("attention", 3))]
    widths[kinds.index(("attention", 2))] = widths[kinds.index(("ffn", 1))] = 0
    plan = plan_of(space, widths)
    return rlprune.save(rlprune.prune(model, plan), plan, tmp_path / "pruned", tokenizer=tokenizer())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("name", "step", "sizes"),
    [
        ("llama", "auto", {}),
        ("llama-mha-tied", 1, {}),
        ("mistral", "auto", {"sliding_window": None}),
        ("llama", 256, {"intermediate_size": 768}),
    ],
)
def test_a_public_reader_gives_the_same_logits(
    name: str, step: int | str, sizes: dict[str, Any], seed: int, tmp_path: Path
) -> None:
    folder = pruned(tmp_path, name, step, seed, **sizes)
    found = export.export(folder, "nemotron-nas", tmp_path / "nas")
    ids = tokens(11)
    with torch.no_grad():
        wanted = rlprune.load(folder)(input_ids=ids).logits
    assert torch.allclose(logits_of(found.path, ids), wanted, atol=1e-5)
    parts = [b["ffn"] for b in json.loads((found.path / "config.json").read_text())["block_configs"]]
    assert all(("ffn_mult" in part) == (step == 256) for part in parts)
    assert any("for vLLM only" in note for note in found.notes) == (step != 256)
    assert {"tokenizer.json", "configuration_decilm.py"} <= {p.name for p in found.path.iterdir()}


def test_transformers_reads_the_config_with_its_class(tmp_path: Path) -> None:
    """vLLM asks the object that AutoConfig gives for attributes of its blocks, and whether `ffn_mult` is one."""
    from transformers import AutoConfig

    out = export.export(pruned(tmp_path), "nemotron-nas", tmp_path / "nas").path
    config = AutoConfig.from_pretrained(out, trust_remote_code=True)
    assert config.model_type == "nemotron-nas" and config.architectures == ["DeciLMForCausalLM"]
    assert config.rope_parameters["rope_theta"] == 10000.0
    blocks = config.block_configs
    assert [b.attention.no_op for b in blocks] == [False, False, True, False]
    assert [b.ffn.no_op for b in blocks] == [False, True, False, False]
    assert not hasattr(blocks[0].ffn, "ffn_mult") and blocks[0].ffn.intermediate_size > 0
    assert blocks[0].attention.n_heads_in_group == 2
    written = json.loads((out / "config.json").read_text())
    assert json.loads(config.to_json_string())["block_configs"] == written["block_configs"]
    config.save_pretrained(tmp_path / "again")
    assert (
        json.loads((tmp_path / "again" / "config.json").read_text())["block_configs"]
        == written["block_configs"]
    )


@given(st.integers(1, 200), st.integers(16, 20_000))
def test_multipliers_say_multiples_of_256_exactly(steps: int, hidden: int) -> None:
    for rounded in (ffn_mult(256 * steps, hidden), round(ffn_mult(256 * steps, hidden), 6)):
        assert neurons_of(rounded, hidden) == 256 * steps
        assert find_multiple(int(2 * rounded * hidden / 3), 256) == 256 * steps


def save(model: Any, widths: Any, tmp_path: Path, **options: Any) -> Path:
    space = rlprune.trace(model, tokens(), drop=True, verify=False, round_to=1, **options)
    plan = plan_of(space, np.array([widths(g) for g in space.groups]))
    return rlprune.save(rlprune.prune(model, plan), plan, tmp_path / "pruned")


def test_what_does_not_map_is_named_with_the_setting_that_avoids_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tiny_lm("llama"), lambda g: 2 if g.kind == "attention" and g.block else g.width, tmp_path)
    assert main(["export", str(folder), "--to", "nemotron-nas", "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        "model.layers.1.self_attn (4 of 6 query heads), model.layers.2.self_attn (4 of 6 query heads)" in line
    )
    assert line.endswith("prune with prune.runtime=vllm")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "widths", "line"),
    [
        (
            "llama",
            lambda g: 0 if (g.kind, g.block) == ("attention", 0) else g.width,
            "the first attention is missing",
        ),
        (
            "llama-biases",
            lambda g: 0 if (g.kind, g.block) == ("ffn", 1) else g.width,
            r"model\.layers\.1\.mlp \(removed, but its output bias stays\)",
        ),
        (
            "gemma2",
            lambda g: g.width - 1,
            r"a 'gemma2' is not what its readers compute; allowed: llama, mistral",
        ),
        ("mistral", lambda g: g.width, "its readers have no sliding window"),
    ],
)
def test_other_models_are_refused(name: str, widths: Any, line: str, tmp_path: Path) -> None:
    model = tiny_lm(name)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_()
    with pytest.raises(ArtifactError, match=line):
        export.export(save(model, widths, tmp_path), "nemotron-nas", tmp_path / "out")
