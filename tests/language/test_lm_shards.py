"""Pruning a language model shard by shard: the same files as in memory, in little memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import rlprune
from helpers.lm import tiny_lm, tokens
from helpers.pruned_lm import REPO, edit, error_of, logits, plan_of, pruned_folder, widths_of
from rlprune.artifacts import pruned_model as artifacts
from rlprune.artifacts import safetensors as tensorfiles
from rlprune.errors import GraphError
from rlprune.language.files import pretrained
from rlprune.language.files import streaming as shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pruned_folder(tmp_path / "edited")


def same_folders(a: Path, b: Path) -> None:
    assert sorted(os.listdir(a)) == sorted(os.listdir(b))
    for path in a.iterdir():
        assert path.read_bytes() == (b / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    "name", ["llama", "llama-mha-tied", "phi3", "gpt2", "opt", "gpt_neox", "falcon", "bloom"]
)
def test_pruning_shards_equals_pruning_in_memory(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = tmp_path / "dense"
    tiny_lm(name, dtype=torch.bfloat16).save_pretrained(source, max_shard_size="20KB")
    model = AutoModelForCausalLM.from_pretrained(source)
    space = rlprune.trace(model, tokens(), drop=True, verify=False)
    plan = plan_of(space, widths_of(space, 4))
    in_memory = tmp_path / "memory"
    size = {"max_shard_size": "15KB"}
    rlprune.save(rlprune.prune(model, plan), plan, in_memory, base={"name": "dense"}, **size)
    same_folders(in_memory, shards.prune_shards(source, plan, tmp_path / "a", **size))
    same_folders(in_memory, shards.prune_shards(source, in_memory / "plan.json", tmp_path / "b", **size))


def test_a_plan_with_parts_left_out_is_applied_to_shards(tmp_path: Path) -> None:
    source = tmp_path / "dense"
    tiny_lm().save_pretrained(source)
    space = rlprune.trace(shards.dense_skeleton(source), tokens(), ignore=["model.layers.0"], verify=False)
    plan = plan_of(space, widths_of(space, 1, drop=False))
    a = shards.prune_shards(source, plan, tmp_path / "a")
    same_folders(a, shards.prune_shards(source, a, tmp_path / "b"))
    assert torch.equal(logits(rlprune.load(a)), logits(rlprune.prune(tiny_lm(), plan)))


def test_checkpoints_that_do_not_fit_a_plan(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "dense"
    tiny_lm("qwen3").save_pretrained(source)
    assert "architecture" in error_of(lambda: shards.prune_shards(source, folder, tmp_path / "a"))
    edit(source / "config.json", lambda c: c.update(quantization_config={"bits": 4}))
    assert "quantization_config" in error_of(lambda: shards.prune_shards(source, folder, tmp_path / "a"))
    transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=32).save_pretrained(source)
    said = error_of(lambda: shards.prune_shards(source, folder, tmp_path / "a"), GraphError)
    assert said == (
        "MambaForCausalLM: no adapter for model_type 'mamba'; `rlprune list families` has those that are"
    )
    tiny_lm().save_pretrained(source)
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    safetensors.torch.save_file(tensors | {"odd": torch.zeros(1)}, source / "model.safetensors")
    assert "'odd'" in error_of(lambda: shards.prune_shards(source, folder, tmp_path / "a"))
    del tensors["model.norm.weight"]
    safetensors.torch.save_file(tensors, source / "model.safetensors")
    assert "'model.norm.weight' is missing" in error_of(
        lambda: shards.prune_shards(source, folder, tmp_path / "a")
    )
    assert not (tmp_path / "a").exists()


MEMORY = """
import json, sys, threading, time
import torch
torch.set_num_threads(1)
import rlprune
from rlprune.language.files import streaming as shards
from transformers import LlamaForCausalLM
torch.zeros(4) @ torch.zeros(4)
def held():  # pages of mapped files are not counted: the system takes them back when it needs to
    text = open("/proc/self/status").read()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024
peak, done = [0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], held())
        time.sleep(0.002)
source, plan, out = sys.argv[1:4]
model = shards.dense_skeleton(source)
before = held()
threading.Thread(target=watch, daemon=True).start()
shards.prune_shards(source, plan, out)
pruning = peak[0] - before
before, peak[0] = held(), 0
slim = rlprune.load(out)
done.set()
print(json.dumps({"prune": pruning, "load": peak[0] - before}))
"""


def test_memory_of_pruning_shards_and_of_loading(tmp_path: Path) -> None:
    """A checkpoint of 200 MB is cut in the memory of its largest tensors; loading holds one copy."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=7, num_attention_heads=12,
        num_key_value_heads=4, vocab_size=1000, dtype="float32",
    )  # fmt: skip
    model = pretrained.skeleton(config)
    entries = pretrained.stored_entries(model)
    source = tmp_path / "dense"
    source.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensorfiles.write_checkpoint(
        source,
        entries,
        lambda names: ((n, torch.randn(entries[n].shape, generator=generator)) for n in names),
        "60MB",
    )
    config.save_pretrained(source)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert size > 180e6
    space = rlprune.trace(model, tokens(), verify=False)
    plan = plan_of(space, np.maximum(1, space.widths // 2))
    skeleton = tmp_path / "plan.json"
    slim = rlprune.prune(model, plan)
    shapes = {name: entry.shape for name, entry in pretrained.stored_entries(slim).items()}
    skeleton.write_text(json.dumps(artifacts.plan_document(plan, {"source": "transformers"}, shapes)))
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEMORY, str(source), str(skeleton), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    used = json.loads(done.stdout.splitlines()[-1])
    small = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    shutil.rmtree(source)
    shutil.rmtree(tmp_path / "out")
    # Some 55 to 64 MB, most of it the shards that are being read and written.
    assert used["prune"] < 0.4 * size, (used, size)
    assert used["load"] < 1.4 * small, (used, small)


def test_old_spellings_of_names_and_tied_tensors(tmp_path: Path) -> None:
    """GPT-2's published checkpoint has no prefix and holds buffers that models now compute."""
    model = tiny_lm("gpt2")
    source = tmp_path / "dense"
    model.save_pretrained(source)
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    safetensors.torch.save_file(old, source / "model.safetensors")
    space = rlprune.trace(model, tokens(), verify=False)
    plan = plan_of(space, widths_of(space, 1, drop=False))
    out = shards.prune_shards(source, plan, tmp_path / "out")
    assert torch.equal(logits(rlprune.load(out)), logits(rlprune.prune(model, plan)))
