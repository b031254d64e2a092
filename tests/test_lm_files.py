"""Folders of pruned language models: both loaders agree to the bit, edits are found, shards and plain folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rlprune
from rlprune import artifacts, export, pretrained, shards, tensorfiles, uniform
from rlprune.cli import main
from rlprune.errors import ArtifactError, ConfigError
from tests.lm import VARIANTS, tiny_lm, tokens

REPO = Path(__file__).parent.parent
Made = tuple[Any, rlprune.Plan]  # the pruned model and its plan


def widths_of(space: rlprune.PruningSpace, seed: int, drop: bool = True) -> np.ndarray:
    """Random widths; with ``drop`` some attention and some feed-forward part is gone."""
    generator = np.random.default_rng(seed)
    widths = np.array([generator.integers(1, w + 1) for w in space.widths])
    if drop:
        for kind in ("attention", "ffn"):
            places = [i for i, group in enumerate(space.groups) if group.kind == kind]
            if places:
                widths[generator.choice(places)] = 0
    return widths


def plan_of(space: rlprune.PruningSpace, widths: np.ndarray, seed: int = 0) -> rlprune.Plan:
    generator = np.random.default_rng(seed)
    scores = [generator.random(group.width) for group in space.groups]
    return rlprune.make_plan(space, importance=scores, widths=widths)


def pruned(
    name: str = "llama", seed: int = 0, *, drop: bool = True, hidden: bool = False, **more: Any
) -> Made:
    model = tiny_lm(name, **more)
    space = rlprune.trace(model, tokens(), drop=True, hidden=hidden, verify=False)
    plan = plan_of(space, widths_of(space, seed, drop), seed)
    return rlprune.prune(model, plan), plan


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(10, 2)).logits


def error_of(action: Callable[[], Any], kind: type[Exception] = ArtifactError) -> str:
    with pytest.raises(kind) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


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
        artifacts.save(slim, plan, tmp_path / name, max_shard_size="30KB" if number % 2 else "5GB")
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
    folder = artifacts.save(slim, plan, tmp_path / "a")
    twin = rlprune.load(folder)
    assert torch.equal(logits(slim), logits(twin))
    assert type(twin).__name__ == "PrunedLlamaForCausalLM" and not twin.training
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert sum(p.numel() for p in twin.parameters()) == plan.space.cost(plan.widths, "params")
    assert "lm_head.weight" not in json.loads((folder / "plan.json").read_text())["tensors"]
    # What was loaded can be saved again, by us and by transformers, and is the same.
    artifacts.save(twin, plan, tmp_path / "b")
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
    twin = rlprune.load(artifacts.save(slim, plan, tmp_path / "a"))
    assert twin.dtype == dtype and torch.equal(logits(slim), logits(twin))
    slim.model.norm.float()
    message = error_of(lambda: artifacts.save(slim, plan, tmp_path / "b"))
    assert "model.norm.weight" in message and "float32" in message and not (tmp_path / "b").exists()


def test_added_biases_and_hidden_size(tmp_path: Path) -> None:
    slim, plan = pruned(seed=5, hidden=True)
    twin = rlprune.load(artifacts.save(with_biases(slim), plan, tmp_path / "a"))
    assert torch.equal(logits(twin), logits(slim))


def test_a_model_from_a_gguf_file_can_be_saved(tmp_path: Path) -> None:
    """transformers keeps where it came from in the configuration and refuses to save it."""
    slim, plan = pruned()
    slim.config.quantization_config = {"quant_method": "gguf"}
    slim.config._model_name_or_path = "a file"
    folder = artifacts.save(slim, plan, tmp_path / "a")
    config = (folder / "config.json").read_text()
    assert "gguf" not in config and "a file" not in config + (folder / "plan.json").read_text()
    assert torch.equal(logits(rlprune.load(folder)), logits(slim))


def test_the_second_pruning_of_a_loaded_model(tmp_path: Path) -> None:
    slim, plan = pruned(seed=1, drop=False)
    first = rlprune.load(artifacts.save(slim, plan, tmp_path / "a"))
    space = rlprune.trace(first, tokens(), verify=False)
    again = plan_of(space, np.maximum(1, space.widths // 2))
    smaller = rlprune.prune(first, again)
    twin = rlprune.load(artifacts.save(smaller, again, tmp_path / "b"))
    assert torch.equal(logits(twin), logits(smaller))
    assert sum(p.numel() for p in twin.parameters()) < sum(p.numel() for p in slim.parameters())


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2")


def test_tokenizer_and_generation_config_travel(tmp_path: Path) -> None:
    slim, plan = pruned()
    slim.generation_config.temperature, slim.generation_config.do_sample = 0.25, True
    folder = artifacts.save(slim, plan, tmp_path / "a", tokenizer=tokenizer())
    assert pretrained.load_tokenizer(folder)("w5 w7")["input_ids"] == [5, 7]
    assert rlprune.load(folder).generation_config.temperature == 0.25
    copied = artifacts.save(slim, plan, tmp_path / "b", tokenizer=folder)
    assert pretrained.load_tokenizer(copied)("w5 w7")["input_ids"] == [5, 7]
    message = error_of(lambda: artifacts.save(nn.Linear(2, 2), plan, tmp_path / "c", tokenizer=tokenizer()))
    assert "tokenizer" in message
    (copied / "tokenizer.json").write_text("{")
    assert f"{copied}: the tokenizer" in error_of(lambda: pretrained.load_tokenizer(copied))
    assert pretrained.load_tokenizer(artifacts.save(slim, plan, tmp_path / "d")) is None


# Edits by hand


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifacts.save(*pruned(seed=2), tmp_path_factory.mktemp("whole") / "a", max_shard_size="30KB")


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
    layer("0", intermediate_size=3)(config := json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config))
    edit(folder / "plan.json", lambda p: p["layers"][0].update(intermediate_size=3))
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


def test_save_refuses_what_does_not_fit(tmp_path: Path) -> None:
    slim, plan = pruned()
    other = pruned("qwen3")[0]
    assert "not made with this plan" in error_of(
        lambda: artifacts.save(pruned(seed=1)[0], plan, tmp_path / "a")
    )
    assert "save" in error_of(lambda: artifacts.save(other, plan, tmp_path / "a"))
    slim.model.norm.weight.data[0] = float("nan")
    assert "model.norm.weight" in error_of(lambda: artifacts.save(slim, plan, tmp_path / "a"))
    slim.model.norm.weight.data[0] = 1.0
    slim.model.norm.extra = nn.Parameter(torch.zeros(1))
    assert "model.norm.extra" in error_of(lambda: artifacts.save(slim, plan, tmp_path / "a"))
    assert "max_shard_size" in error_of(
        lambda: artifacts.save(slim, plan, tmp_path / "a", max_shard_size="5 apples"), ConfigError
    )
    assert not (tmp_path / "a").exists()


# Plain folders


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
    folder = artifacts.save(slim, plan, tmp_path / "a", tokenizer=tokenizer())
    out = export.export(folder, "hf", tmp_path / "plain")
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
    folder = artifacts.save(slim, plan, tmp_path / "a")
    target, how = uniform.export_folder(folder, tmp_path / "b")
    # BLOOM's configuration has no field for the number of neurons.
    assert ("without trust_remote_code" in how) == (name != "bloom"), how
    assert (target / "plan.json").exists() == (name == "bloom")


def test_uneven_widths_keep_the_per_layer_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, how = uniform.export_folder(folder)
    assert target == folder / "hf" and "trust_remote_code=True: layers differ: " in how
    assert torch.equal(logits(rlprune.load(target)), logits(rlprune.load(folder)))
    assert main(["export", str(folder), "--to", "hf", "--out", str(folder / "again")]) == 0
    assert main(["export", str(folder), "--to", "onnx"]) == 2
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
    folder = artifacts.save(rlprune.prune(model, plan), plan, tmp_path / "a")
    assert "no language model" in error_of(lambda: export.export(folder, "hf"))


# Shards


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
    artifacts.save(rlprune.prune(model, plan), plan, in_memory, base={"name": "dense"}, **size)
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
    edit(source / "config.json", lambda c: [c.pop("quantization_config"), c.update(model_type="mixtral")])
    assert "'mixtral' is not supported" in error_of(
        lambda: shards.prune_shards(source, folder, tmp_path / "a")
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
from rlprune import shards
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


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=8),
    most=st.integers(1, 400),
    kind=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
def test_streamed_files_are_what_safetensors_reads(
    shapes: list[list[int]], most: int, kind: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    tensors = {f"t{i}": torch.randn(shape).to(kind) for i, shape in enumerate(shapes)}
    entries = {name: tensorfiles.entry_of(tensor) for name, tensor in tensors.items()}
    tensorfiles.write_checkpoint(folder, entries, lambda names: ((n, tensors[n]) for n in names), most)
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= safetensors.torch.load_file(path)
    assert found.keys() == tensors.keys()
    read = dict(tensorfiles.TensorFiles(folder).read())
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and torch.equal(read[name], tensor)
        assert found[name].dtype == tensor.dtype
    for names in tensorfiles.split(entries, most):
        assert len(names) == 1 or sum(entries[n].nbytes for n in names) <= most


def test_sizes_are_read() -> None:
    assert tensorfiles.parse_size("5GB") == 5 * 10**9 and tensorfiles.parse_size("1.5 KiB") == 1536
    assert tensorfiles.parse_size(7) == 7
    for wrong in ("", "GB", "-1", "5 TB", "0"):
        with pytest.raises(ConfigError, match="max_shard_size"):
            tensorfiles.parse_size(wrong)
