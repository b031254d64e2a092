"""Folders of pruned language models: both loaders agree to the bit, and what travels with the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rlprune
from helpers.lm import VARIANTS, tiny_lm, tokens
from helpers.pruned_lm import REPO, error_of, logits, plan_of, pruned, tokenizer
from rlprune.errors import ConfigError
from rlprune.language.files import pretrained

ALONE = """
import json, sys
if sys.argv[2] == "without":
    sys.modules["rlprune"] = None  # importing it fails
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
ids = torch.tensor(json.load(open(sys.argv[1]))["ids"])
for folder in json.load(open(sys.argv[1]))["folders"]:
    if sys.argv[2] == "without":
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    else:
        import rlprune
        model = rlprune.load(folder)
    model.eval()
    with torch.no_grad():
        found = {"logits": model(input_ids=ids).logits}
    ways = {"cache": {}, "plain": {"use_cache": False}, "static": {"cache_implementation": "static"}}
    for name, more in ways.items():
        if name != "static" or getattr(model, "_can_compile_fullgraph", False):
            more = more | {"disable_compile": True}
            found[name] = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, **more)
    torch.save(found, folder + "/" + sys.argv[2] + ".pt")
    print(type(model).__name__, getattr(model.config, "auto_map", None) is not None)
"""


def fresh_process(folders: list[Path], how: str, tmp: Path) -> list[dict[str, torch.Tensor]]:
    """Logits and generated tokens of each folder from a process of its own, ``with`` or ``without`` rlprune."""
    job = tmp / f"{how}.json"
    job.write_text(json.dumps({"ids": tokens(10, 2).tolist(), "folders": [str(f) for f in folders]}))
    environment = os.environ | {"HF_HOME": str(tmp / "home"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(REPO) if how == "with" else ""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", ALONE, str(job), how],
        cwd=tmp, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{how}.pt", weights_only=True) for folder in folders]


def with_biases(slim: Any) -> Any:
    """What FLAP's compensation leaves: output layers with a bias that their family does not have."""
    for block in slim.model.layers:
        for layer in (block.mlp.down_proj, block.self_attn.o_proj):
            layer.bias = nn.Parameter(torch.randn(layer.out_features))
    return slim


def test_both_loaders_give_the_same_bits_in_fresh_processes(tmp_path: Path) -> None:
    """Every family, with dropped parts; the second process cannot import rlprune."""
    made = {name: pruned(name, number) for number, name in enumerate(VARIANTS)}
    slim, plan = pruned(seed=5, hidden=True)
    made["hidden and biases"] = with_biases(slim), plan
    folders = [
        rlprune.save(slim, plan, tmp_path / name, max_shard_size="30KB" if number % 2 else "5GB")
        for number, (name, (slim, plan)) in enumerate(made.items())
    ]
    config = json.loads((folders[-1] / "config.json").read_text())
    assert len(config["added_biases"]) == 6 and config["pruned_hidden_size"] == plan.widths[-1]
    assert config["hidden_size"] == 48
    ours = fresh_process(folders, "with", tmp_path)
    theirs = fresh_process(folders, "without", tmp_path)
    for name, a, b in zip(made, ours, theirs, strict=True):
        assert torch.equal(a["logits"], b["logits"]), name
        # Attention may be another implementation there (gemma2 is eager here and sdpa there).
        torch.testing.assert_close(a["logits"], logits(made[name][0]), rtol=1e-4, atol=1e-5, msg=name)
        assert torch.isfinite(a["logits"]).all(), name
        for found in (a, b):
            assert torch.equal(found["cache"], found["plain"]), name
            assert torch.equal(found.get("static", found["plain"]), found["plain"]), name


def test_saved_and_loaded_here(tmp_path: Path) -> None:
    slim, plan = pruned("llama-mha-tied", 3)
    folder = rlprune.save(slim, plan, tmp_path / "a")
    twin = rlprune.load(folder)
    assert torch.equal(logits(slim), logits(twin))
    assert type(twin).__name__ == "PrunedLlamaForCausalLM" and not twin.training
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert sum(p.numel() for p in twin.parameters()) == plan.space.cost(plan.widths, "params")
    assert "lm_head.weight" not in json.loads((folder / "plan.json").read_text())["tensors"]
    # What was loaded can be saved again, by us and by transformers, and is the same.
    rlprune.save(twin, plan, tmp_path / "b")
    for name in ("plan.json", "config.json", "model.safetensors", "generation_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (folder / name).read_bytes(), name
    twin.save_pretrained(tmp_path / "c")
    assert {"modeling_rlprune.py", "families.py"} <= set(os.listdir(tmp_path / "c"))
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["per_layer_config"] == json.loads((folder / "config.json").read_text())["per_layer_config"]
    # A base that is given is only compared.
    assert torch.equal(logits(rlprune.load(folder, base=tiny_lm("llama-mha-tied"))), logits(slim))
    assert "another architecture" in error_of(lambda: rlprune.load(folder, base=tiny_lm("llama")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_number_formats_stay(dtype: torch.dtype, tmp_path: Path) -> None:
    slim, plan = pruned(dtype=dtype)
    twin = rlprune.load(rlprune.save(slim, plan, tmp_path / "a"))
    assert twin.dtype == dtype and torch.equal(logits(slim), logits(twin))
    slim.model.norm.float()
    message = error_of(lambda: rlprune.save(slim, plan, tmp_path / "b"))
    assert "model.norm.weight" in message and "float32" in message and not (tmp_path / "b").exists()


def test_added_biases_and_hidden_size(tmp_path: Path) -> None:
    slim, plan = pruned(seed=5, hidden=True)
    twin = rlprune.load(rlprune.save(with_biases(slim), plan, tmp_path / "a"))
    assert torch.equal(logits(twin), logits(slim))


def test_a_model_from_a_gguf_file_can_be_saved(tmp_path: Path) -> None:
    """transformers keeps where it came from in the configuration and refuses to save it."""
    slim, plan = pruned()
    slim.config.quantization_config = {"quant_method": "gguf"}
    slim.config._model_name_or_path = "a file"
    folder = rlprune.save(slim, plan, tmp_path / "a")
    config = (folder / "config.json").read_text()
    assert "gguf" not in config and "a file" not in config + (folder / "plan.json").read_text()
    assert torch.equal(logits(rlprune.load(folder)), logits(slim))


def test_the_second_pruning_of_a_loaded_model(tmp_path: Path) -> None:
    slim, plan = pruned(seed=1, drop=False)
    first = rlprune.load(rlprune.save(slim, plan, tmp_path / "a"))
    space = rlprune.trace(first, tokens(), verify=False)
    again = plan_of(space, np.maximum(1, space.widths // 2))
    smaller = rlprune.prune(first, again)
    twin = rlprune.load(rlprune.save(smaller, again, tmp_path / "b"))
    assert torch.equal(logits(twin), logits(smaller))
    assert sum(p.numel() for p in twin.parameters()) < sum(p.numel() for p in slim.parameters())


def test_tokenizer_and_generation_config_travel(tmp_path: Path) -> None:
    slim, plan = pruned()
    slim.generation_config.temperature, slim.generation_config.do_sample = 0.25, True
    folder = rlprune.save(slim, plan, tmp_path / "a", tokenizer=tokenizer())
    assert pretrained.load_tokenizer(folder)("w5 w7")["input_ids"] == [5, 7]
    assert rlprune.load(folder).generation_config.temperature == 0.25
    copied = rlprune.save(slim, plan, tmp_path / "b", tokenizer=folder)
    assert pretrained.load_tokenizer(copied)("w5 w7")["input_ids"] == [5, 7]
    message = error_of(lambda: rlprune.save(nn.Linear(2, 2), plan, tmp_path / "c", tokenizer=tokenizer()))
    assert "tokenizer" in message
    (copied / "tokenizer.json").write_text("{")
    assert f"{copied}: the tokenizer" in error_of(lambda: pretrained.load_tokenizer(copied))
    assert pretrained.load_tokenizer(rlprune.save(slim, plan, tmp_path / "d")) is None


def test_save_refuses_what_does_not_fit(tmp_path: Path) -> None:
    slim, plan = pruned()
    other = pruned("qwen3")[0]
    assert "not made with this plan" in error_of(
        lambda: rlprune.save(pruned(seed=1)[0], plan, tmp_path / "a")
    )
    assert "save" in error_of(lambda: rlprune.save(other, plan, tmp_path / "a"))
    slim.model.norm.weight.data[0] = float("nan")
    assert "model.norm.weight" in error_of(lambda: rlprune.save(slim, plan, tmp_path / "a"))
    slim.model.norm.weight.data[0] = 1.0
    slim.model.norm.extra = nn.Parameter(torch.zeros(1))
    assert "model.norm.extra" in error_of(lambda: rlprune.save(slim, plan, tmp_path / "a"))
    assert "max_shard_size" in error_of(
        lambda: rlprune.save(slim, plan, tmp_path / "a", max_shard_size="5 apples"), ConfigError
    )
    assert not (tmp_path / "a").exists()
