"""Folders of pruned language models that other tools wrote again load, and their plan is found again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import rlprune
from helpers.lm import MIXTURES, tiny_lm, tokens
from helpers.pruned_lm import edit, error_of, logits, plan_of, pruned, tokenizer, widths_of
from helpers.transformers_quiet import quiet_transformers
from rlprune.artifacts import ForeignFolderWarning
from rlprune.artifacts.documents import read_plan
from rlprune.language.files.mark import MARK, is_pruned
from rlprune.workloads.adapter import read_pruned


def rewritten(folder: Path, out: Path) -> Path:
    """What ``save_pretrained`` makes of a folder of ours: config.json, weights and code, no plan.json."""
    with quiet_transformers():
        rlprune.load(folder).save_pretrained(out)
    for file in folder.glob("token*"):
        shutil.copyfile(file, out / file.name)
    return out


def same_plan(one: Any, other: Any) -> None:
    """Two documents say the same of what was cut."""
    kept = [{g["name"]: g["kept"] for g in document["groups"]} for document in (one, other)]
    assert kept[0] == kept[1]
    for name in ("fingerprint", "widths", "cost", "dense_cost", "tensors", "layers", "input", "origin"):
        assert one[name] == other[name], name
    assert one["base"]["name"] == other["base"]["name"]
    assert one["base"]["config"] == other["base"]["config"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "gpt_neox"])
def test_the_plan_outlives_save_pretrained(name: str, tmp_path: Path) -> None:
    slim, plan = pruned(name, 3)
    base = {"name": "hf:dense"}
    folder = rlprune.save(slim, plan, tmp_path / "a", base=base)
    again = rewritten(folder, tmp_path / "b")
    assert not (again / "plan.json").exists()
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, again)]
    assert configs[0]["auto_map"] == configs[1]["auto_map"] and configs[0][MARK] == configs[1][MARK]
    same_plan(read_plan(folder), read_pruned(again))
    assert torch.equal(logits(rlprune.load(again)), logits(slim))
    space = rlprune.trace(tiny_lm(name), tokens(), drop=True, verify=False)
    found = rlprune.load_plan(again, space)
    assert all(np.array_equal(a, b) for a, b in zip(found.kept, plan.kept, strict=True))


@given(seed=st.integers(0, 10_000))
@example(seed=121)  # the hidden size was a group, and lost nothing
@settings(
    max_examples=8, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_plan_is_read_back_from_the_mark(seed: int, tmp_path: Path) -> None:
    slim, plan = pruned("llama", seed, hidden=bool(seed % 2))
    folder = tmp_path / f"a{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # a seed may come twice
    rlprune.save(slim, plan, folder)
    document = read_plan(folder)
    (folder / "plan.json").unlink()
    same_plan(document, read_pruned(folder))


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_and_their_lanes_are_in_the_mark(name: str, tmp_path: Path) -> None:
    model = tiny_lm(name)
    space = rlprune.trace(model, tokens(), drop=True, verify=False)
    widths = [max(1, group.minimum, group.width * 2 // 3) for group in space.groups]
    scores = [np.random.default_rng(0).random(group.units) for group in space.groups]
    plan = rlprune.make_plan(space, importance=scores, widths=widths)
    slim = rlprune.prune(model, plan)
    folder = rlprune.save(slim, plan, tmp_path / "a", base={"name": "hf:dense"})
    again = rewritten(folder, tmp_path / "b")
    same_plan(read_plan(folder), read_pruned(again))
    assert torch.equal(logits(rlprune.load(again)), logits(rlprune.load(folder)))


def test_two_cuts_are_one_plan_against_the_base(tmp_path: Path) -> None:
    """The second plan is made on the model of a folder without plan.json, weights changed in between."""
    model = tiny_lm("llama")
    space = rlprune.trace(model, tokens(), drop=True, verify=False)
    first = plan_of(space, widths_of(space, 1))
    folder = rlprune.save(rlprune.prune(model, first), first, tmp_path / "a")
    slim = rlprune.load(rewritten(folder, tmp_path / "b"))
    own = rlprune.trace(slim, tokens(), drop=True, verify=False)
    second = plan_of(own, np.maximum(own.widths // 2, 1), seed=5)
    known = rlprune.load_plan(tmp_path / "b", space)
    both = rlprune.compose(known, second)
    assert torch.equal(logits(rlprune.prune(model, both)), logits(rlprune.prune(slim, second)))


def test_an_unknown_base_is_said_and_the_model_is_its_own(tmp_path: Path) -> None:
    slim, plan = pruned("llama", 3)
    folder = rewritten(rlprune.save(slim, plan, tmp_path / "a"), tmp_path / "b")
    edit(folder / "config.json", lambda c: c.pop(MARK))  # as earlier versions wrote it
    assert is_pruned(json.loads((folder / "config.json").read_text()))
    with pytest.warns(ForeignFolderWarning, match="its dense model is not known .* counts as its own base"):
        document = read_pruned(folder)
    assert document["cost"] == document["dense_cost"]
    assert document["cost"]["params"] == sum(p.numel() for p in slim.parameters())
    with pytest.warns(ForeignFolderWarning):
        assert torch.equal(logits(rlprune.load(folder)), logits(slim))


def test_an_architecture_that_changed_is_its_own_base(tmp_path: Path) -> None:
    """Tokens were added after the cut: the dense model of the mark has another vocabulary."""
    folder = rlprune.save(*pruned("llama", 3), tmp_path / "a", tokenizer=tokenizer())
    grown: Any = rlprune.load(folder)
    grown.resize_token_embeddings(100, mean_resizing=False)
    with quiet_transformers():
        grown.save_pretrained(tmp_path / "b")
    with pytest.warns(ForeignFolderWarning, match="the architecture was changed since it was pruned"):
        found: Any = rlprune.load(tmp_path / "b")
    assert found.get_input_embeddings().weight.shape[0] == 100
    assert torch.equal(logits(found), logits(grown))


def test_a_stale_plan_beside_weights_of_another_tool(tmp_path: Path) -> None:
    """save_pretrained into the same folder: the same weights, other weights, and another model altogether."""
    slim, plan = pruned("llama", 3)
    folder = rlprune.save(slim, plan, tmp_path / "a")
    twin: Any = rlprune.load(folder)
    with quiet_transformers():
        twin.save_pretrained(folder)
        assert torch.equal(logits(rlprune.load(folder)), logits(slim))  # nothing changed: nothing is said
        twin.config.pad_token_id = 0  # as the Trainer does, from the tokenizer
        with torch.no_grad():
            twin.model.norm.weight.add_(1.0)
        twin.save_pretrained(folder)
    with pytest.warns(ForeignFolderWarning, match="another tool has written the weights since plan.json"):
        again = rlprune.load(folder)
    assert torch.equal(logits(again), logits(twin)) and again.config.pad_token_id == 0
    with quiet_transformers():
        rlprune.load(rlprune.save(*pruned("llama", 4), tmp_path / "other")).save_pretrained(folder)
    line = error_of(lambda: rlprune.load(folder))
    assert "plan.json: is of another model than config.json" in line and "delete plan.json" in line
    (folder / "plan.json").unlink()
    assert torch.equal(logits(rlprune.load(folder)), logits(rlprune.load(tmp_path / "other")))


MARKS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no table": (lambda m: m.update(kept=3), "rlprune.kept: must be a table of groups"),
    "no bits": (lambda m: m["kept"].update({next(iter(m["kept"])): "zz"}), "bits in hexadecimal"),
    "too many bits": (lambda m: m["kept"].update({next(iter(m["kept"])): "ff" * 9}), "bits in hexadecimal"),
    "a group": (lambda m: m["kept"].update({"model.layers.0.mpl": "00"}), "'model.layers.0.mlp'"),
    "newer": (lambda m: m.update(version=9), "rlprune.version: 9 is newer"),
    "no version": (lambda m: m.update(version=True), "rlprune.version: must be"),
    "a name": (lambda m: m.update(base=7), "rlprune.base: cannot be 7"),
    "an input": (lambda m: m.update(input=[1]), "rlprune.input: must be a shape"),
}


@pytest.mark.parametrize("what", MARKS)
def test_a_damaged_mark_names_its_field(what: str, tmp_path: Path) -> None:
    folder = rlprune.save(*pruned("llama", 3), tmp_path / "a")
    (folder / "plan.json").unlink()
    change, words = MARKS[what]
    edit(folder / "config.json", lambda c: change(c[MARK]))
    line = error_of(lambda: rlprune.load(folder))
    assert f"{folder / 'config.json'}: " in line and words in line, line


def test_a_mark_and_a_plan_of_two_models(tmp_path: Path) -> None:
    """Both files are ours, and say that other units were kept."""
    folder = rlprune.save(*pruned("llama", 3), tmp_path / "a")

    def flip(config: dict[str, Any]) -> None:
        kept = config[MARK]["kept"]
        name = next(n for n, bits in kept.items() if "mlp" in n and bits.strip("0"))
        kept[name] = kept[name][::-1]

    edit(folder / "config.json", flip)
    assert "plan.json keeps other units" in error_of(lambda: rlprune.load(folder))


def test_sizes_that_transformers_itself_gives_layers_are_no_sign() -> None:
    """Gemma 4's configurations come with a ``per_layer_config``."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from rlprune.language.files.pretrained import is_uneven

    fields = CONFIG_MAPPING["gemma4_text"]().to_dict()
    assert fields["per_layer_config"] and not is_uneven(fields) and not is_pruned(fields)
    llama = CONFIG_MAPPING["llama"]().to_dict()
    assert is_uneven(llama | {"per_layer_config": {"0": {"intermediate_size": 8}}})
    assert is_pruned(fields | {MARK: {"version": 1}})
    assert is_pruned(llama | {"auto_map": {"AutoConfig": "modeling_rlprune.PrunedLlamaConfig"}})
