"""Pruned language models of equal layers as plain folders of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rlprune
from helpers.lm import tiny_lm, tokens
from helpers.pruned_lm import error_of, logits, plan_of, pruned_folder, tokenizer
from rlprune.cli.main import main
from rlprune.experiments import export
from rlprune.language.files import uniform


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pruned_folder(tmp_path / "edited")


def even(space: rlprune.PruningSpace, heads: int, neurons: int, without: tuple[int, ...] = ()) -> np.ndarray:
    return np.array(
        [0 if g.block in without else {"attention": heads, "ffn": neurons}[g.kind] for g in space.groups]
    )


@pytest.mark.parametrize(
    "name", ["llama", "llama-mha-tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]
)
def test_even_widths_load_with_plain_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    # The sliding layers of the Gemmas are told apart by a list with an entry for each layer.
    model: Any = tiny_lm(name, num_hidden_layers=4)
    space = rlprune.trace(model, tokens(), drop=True, verify=False)
    heads = next(g.width for g in space.groups if g.kind == "attention")
    # Without a head size of their own in the configuration the heads have to divide the hidden size of 32.
    heads = heads if name == "phi3" else heads - 2 if name == "llama-mha-tied" else max(1, heads - 1)
    slim = rlprune.prune(model, plan := plan_of(space, even(space, heads, 24, (1,))))
    folder = rlprune.save(slim, plan, tmp_path / "a", tokenizer=tokenizer())
    out = export.export(folder, "hf", tmp_path / "plain").path
    config = json.loads((out / "config.json").read_text())
    assert not {"auto_map", "per_layer_config"} & set(config) and config["num_hidden_layers"] == 3
    assert not [path.name for path in out.iterdir() if path.suffix == ".py"]
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert type(plain) is type(model)
    assert torch.equal(logits(plain), logits(rlprune.load(folder)))
    if name != "gemma2":  # eager in these tests, sdpa when loaded
        assert torch.equal(logits(plain), logits(slim))
    both = [m.generate(tokens(6), max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (plain, slim)]
    assert torch.equal(*both)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "bloom", "falcon"])
def test_even_neurons_in_families_with_fixed_heads(name: str, tmp_path: Path) -> None:
    model = tiny_lm(name)
    space = rlprune.trace(model, tokens(), drop=True, verify=False)
    widths = np.array([24 if g.kind == "ffn" else g.width for g in space.groups])
    slim = rlprune.prune(model, plan := plan_of(space, widths))
    folder = rlprune.save(slim, plan, tmp_path / "a")
    target, how = uniform.export_folder(folder, tmp_path / "b")
    # BLOOM's configuration has no field for the number of neurons.
    assert ("without trust_remote_code" in how) == (name != "bloom"), how
    assert (target / "plan.json").exists() == (name == "bloom")


def test_uneven_widths_keep_the_per_layer_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, how = uniform.export_folder(folder)
    assert target == folder / "hf" and "trust_remote_code=True: layers differ: " in how
    assert torch.equal(logits(rlprune.load(target)), logits(rlprune.load(folder)))
    assert main(["export", str(folder), "--to", "hf", "--out", str(folder / "again")]) == 0
    assert main(["export", str(folder), "--to", "torch-export"]) == 2
    assert "--to hf" in capsys.readouterr().err


def test_a_dropped_block_that_leaves_a_bias_has_no_plain_form(tmp_path: Path) -> None:
    model = tiny_lm("opt")
    space = rlprune.trace(model, tokens(), drop=True, verify=False)
    widths = np.where([g.block == 1 for g in space.groups], 0, space.widths)
    slim = rlprune.prune(model, plan_of(space, widths))
    with pytest.raises(uniform.NotUniform, match="other logits"):
        uniform.write_plain(slim, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    nothing = rlprune.prune(model, plan_of(space, 0 * widths))
    with pytest.raises(uniform.NotUniform, match="every block"):
        uniform.plain_form(nothing)


def test_vision_models_are_no_folder_for_hf(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    space = rlprune.trace(model, torch.zeros(1, 3, 8, 8))
    plan = plan_of(space, space.widths)
    folder = rlprune.save(rlprune.prune(model, plan), plan, tmp_path / "a")
    assert "no language model" in error_of(lambda: export.export(folder, "hf"))
