"""Folders of pruned language models that were edited or damaged: errors name the file and the field."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import rlprune
from helpers.pruned_lm import edit, error_of, logits, pruned_folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pruned_folder(tmp_path_factory.mktemp("whole") / "a")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "edited"))


def layer(number: str, **sizes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["per_layer_config"].setdefault(number, {}).update(sizes)


EDITS: dict[str, tuple[str, Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "a width": ("config.json", layer("0", intermediate_size=39), ("per_layer_config.0.intermediate_size", "39")),
    "heads": ("config.json", layer("1", num_attention_heads=5), ("per_layer_config.1.num_attention_heads", "5")),
    "a layer": ("config.json", layer("7", intermediate_size=3), ("per_layer_config.7",)),
    "a name": ("config.json", layer("0", intermediate_sise=3), ("intermediate_sise", "intermediate_size")),
    "no table": ("config.json", lambda c: c.update(per_layer_config=[1]), ("per_layer_config",)),
    "all sizes": ("config.json", lambda c: c.pop("per_layer_config"), ("per_layer_config.0",)),
    "the hidden size": ("config.json", lambda c: c.update(hidden_size=40), ("hidden_size", "40", "48")),
    "the positions": ("config.json", lambda c: c["rope_parameters"].update(rope_theta=7.0), ("rope_parameters",)),
    "the family": ("config.json", lambda c: c.update(model_type="qwen3"), ("model_type",)),
    "biases": ("config.json", lambda c: c.update(added_biases=["model.norm"]), ("added_biases",)),
    "the format": ("config.json", lambda c: c.update(dtype="bfloat16"), ("dtype", "bfloat16", "float32")),
    "the plan's sizes": ("plan.json", lambda p: p["layers"][0].update(intermediate_size=3), ("intermediate_size",)),
    "the plan's layers": ("plan.json", lambda p: p.pop("layers"), ("layers",)),
    "the plan's width": ("plan.json", lambda p: p["widths"].__setitem__(0, 1 + p["widths"][0]), ("width",)),
    "the plan's base": ("plan.json", lambda p: p["base"]["config"].update(vocab_size=90), ("vocab_size", "90")),
    "the plan's config": ("plan.json", lambda p: p["base"].pop("config"), ("base.config",)),
    "the plan's tensors": (
        "plan.json", lambda p: p["tensors"]["model.norm.weight"].__setitem__(0, 3), ("model.norm.weight", "48")
    ),
    "the index": (
        "model.safetensors.index.json", lambda i: i["weight_map"].pop("model.norm.weight"), ("model.norm.weight",)
    ),
    "a path": (
        "model.safetensors.index.json",
        lambda i: i["weight_map"].update({"model.norm.weight": "../x.safetensors"}),
        ("weight_map", "../x"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", EDITS)
def test_an_edited_folder_names_file_and_field(what: str, folder: Path) -> None:
    file, change, words = EDITS[what]
    edit(folder / file, change)
    message = error_of(lambda: rlprune.load(folder))
    assert str(folder) in message and all(word in message for word in words), message


def test_the_same_edit_in_both_files_is_found_by_the_tensors(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    number = next(n for n, sizes in config["per_layer_config"].items() if sizes.get("intermediate_size"))
    layer(number, intermediate_size=3)(config)
    (folder / "config.json").write_text(json.dumps(config))
    edit(folder / "plan.json", lambda p: p["layers"][int(number)].update(intermediate_size=3))
    assert "config.json asks for" in error_of(lambda: rlprune.load(folder))
    edit(folder / "config.json", lambda c: c.update(model_type="bert"))
    edit(folder / "plan.json", lambda p: p["base"]["config"].update(model_type="bert"))
    assert "'bert' is not supported" in error_of(lambda: rlprune.load(folder))


def test_damaged_shards(folder: Path) -> None:
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    data = second.read_bytes()
    second.write_bytes(data[:-10])
    assert f"{second}: truncated" in error_of(lambda: rlprune.load(folder))
    second.unlink()
    assert f"{second}: no such file" in error_of(lambda: rlprune.load(folder))
    second.write_bytes(data)
    tensors = safetensors.torch.load_file(first)
    name, tensor = tensors.popitem()
    safetensors.torch.save_file(tensors, first)
    message = error_of(lambda: rlprune.load(folder))
    assert str(first) in message and name in message and "missing" in message
    safetensors.torch.save_file(tensors | {name: tensor * float("nan")}, first)
    assert "NaN" in error_of(lambda: rlprune.load(folder))
    safetensors.torch.save_file(tensors | {name: tensor[:-1].contiguous()}, first)
    assert "has shape" in error_of(lambda: rlprune.load(folder))
    safetensors.torch.save_file(tensors | {name: tensor + 1}, first)
    assert f"{name!r} is not the tensor that was saved" in error_of(lambda: rlprune.load(folder))


def test_code_in_the_folder_is_not_run_by_us(folder: Path) -> None:
    for name in ("modeling_rlprune.py", "families.py"):
        (folder / name).write_text("raise SystemExit('run')")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    assert torch.isfinite(logits(rlprune.load(folder))).all()


def test_stock_transformers_says_that_it_cannot(folder: Path) -> None:
    """Without trust_remote_code there is an error, not a model with other weights."""
    from transformers import AutoModelForCausalLM

    with pytest.raises(Exception, match="per-layer attribute"):
        AutoModelForCausalLM.from_pretrained(folder)
