"""A pruned language model by the commands: fine-tuned by PEFT, merged, saved by transformers, and pruned again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rlprune
from helpers.lm import tokens
from helpers.lm_folder import write_config, write_folder
from helpers.pruned_lm import edit, error_of, logits
from helpers.transformers_quiet import quiet_transformers
from rlprune.artifacts import ForeignFolderWarning
from rlprune.artifacts.documents import read_plan
from rlprune.cli import main as cli
from rlprune.language.files.mark import MARK


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense -> once (pruned by a rule, two parts dropped) -> merged (LoRA by PEFT, saved by transformers)."""
    place = tmp_path_factory.mktemp("round")
    write_folder(place / "dense", num_hidden_layers=3)
    write_config(place / "my.yaml", place / "dense")
    words = ["--set", "prune.drop=true", "--budget", "75%", "--out", str(place / "once")]
    assert cli.main(["prune", str(place / "my.yaml"), "--rule", "shortgpt", *words]) == 0
    merge(place / "once", place / "merged")
    return place


def merge(folder: Path, out: Path) -> None:
    """A few steps of LoRA on a pruned folder, as PEFT's users write them, merged and saved."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
        optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            ids = tokens(16, 4)
            wrapped(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        wrapped.merge_and_unload().save_pretrained(out)
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(out)


def done(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def perplexity(table: str) -> float:
    """The pruned model's perplexity in the table of `rlprune evaluate`."""
    line = next(line for line in table.splitlines() if line.startswith("test perplexity"))
    return float(line.split()[-2])


def test_a_merged_model_is_evaluated_exported_and_pruned_again(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, merged = made / "my.yaml", made / "merged"
    assert not (merged / "plan.json").exists()
    slim: Any = rlprune.load(merged)
    assert not torch.equal(logits(slim), logits(rlprune.load(made / "once")))
    workload = rlprune.build_workload(rlprune.load_config(str(config)))
    with workload.test_opened():
        wanted = workload.evaluate(slim, "test").metric
    table = done(capsys, "evaluate", merged, config)
    assert perplexity(table) == pytest.approx(wanted, abs=1e-3)
    assert f"{read_plan(made / 'once')['cost']['params']:,.0f}" in table
    done(capsys, "export", merged, "--to", "hf", "--out", tmp_path / "exported")
    assert torch.equal(logits(rlprune.load(tmp_path / "exported")), logits(slim))
    assert read_plan(tmp_path / "exported")["base"]["name"] == f"hf:{made / 'dense'}"

    again = ["prune", config, "--rule", "uniform", "--budget", "85%"]
    ways = {"named": ["--set", f"model.name=hf:{merged}"], "checkpoint": ["--checkpoint", merged]}
    once = read_plan(made / "once")
    for name, words in ways.items():
        out = tmp_path / name
        done(capsys, *again, *words, "--out", out)
        twice = read_plan(out)
        assert twice["fingerprint"] == once["fingerprint"]
        assert twice["base"]["name"] == f"hf:{made / 'dense'}" and twice["dense_cost"] == once["dense_cost"]
        kept = {group["name"]: set(group["kept"]) for group in once["groups"]}
        groups = {group["name"]: set(group["kept"]) for group in twice["groups"]}
        assert all(groups[n] <= kept[n] for n in groups if n in kept)
        assert twice["cost"]["params"] <= 0.85 * once["cost"]["params"]
        assert twice["origin"]["after"] == once["origin"]
        small: Any = rlprune.load(out)
        assert sum(p.numel() for p in small.parameters()) == twice["cost"]["params"]
        assert torch.isfinite(logits(small)).all()
    assert torch.equal(
        logits(rlprune.load(tmp_path / "named")), logits(rlprune.load(tmp_path / "checkpoint"))
    )
    dense_table = done(capsys, "evaluate", tmp_path / "named", config)
    assert "pruned/dense" in dense_table
    before = done(capsys, "evaluate", tmp_path / "named", config, "--set", f"model.name=hf:{merged}")
    assert "pruned/before" in before and f"{once['cost']['params']:,.0f}" in before
    assert perplexity(before) == pytest.approx(perplexity(dense_table), abs=1e-3)


def test_a_search_on_a_merged_model(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--set", f"model.name=hf:{made / 'merged'}", "budget.target=90%"]
    assert "feasible" in done(capsys, "inspect", made / "my.yaml", *words)
    done(capsys, "train", made / "my.yaml", *words, "--out", tmp_path / "run")
    twice = read_plan(tmp_path / "run" / "pruned")
    assert twice["fingerprint"] == read_plan(made / "once")["fingerprint"]
    assert "after" in twice["origin"]


def test_a_second_cut_of_groups_that_the_first_held_still(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first plan had no attention among its groups; the second cuts heads, and the saved plan has both."""
    dense = ["prune", made / "my.yaml", "--set", "prune.ignore=[model.layers.*.self_attn]"]
    done(capsys, *dense, "--rule", "uniform", "--budget", "85%", "--out", tmp_path / "one")
    assert all("attn" not in g["name"] for g in read_plan(tmp_path / "one")["groups"])
    again = ["prune", made / "my.yaml", "--set", f"model.name=hf:{tmp_path / 'one'}", "--rule", "uniform"]
    done(capsys, *again, "--budget", "80%", "--out", tmp_path / "two")
    groups = read_plan(tmp_path / "two")["groups"]
    assert any("attn" in g["name"] and len(g["kept"]) < g["width"] for g in groups)
    assert torch.isfinite(logits(rlprune.load(tmp_path / "two"))).all()


@pytest.mark.filterwarnings("default::rlprune.artifacts.ForeignFolderWarning")
def test_an_unknown_base_is_pruned_against_itself(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    folder = Path(shutil.copytree(made / "merged", tmp_path / "old"))
    edit(folder / "config.json", lambda c: c.pop(MARK))
    words = ["prune", str(made / "my.yaml"), "--rule", "uniform", "--budget", "90%"]
    words += ["--set", f"model.name=hf:{folder}", "--out", str(tmp_path / "again")]
    assert cli.main(words) == 0
    assert "its dense model is not known" in capsys.readouterr().err
    plan = read_plan(tmp_path / "again")
    assert plan["dense_cost"]["params"] == read_plan(made / "once")["cost"]["params"]
    assert torch.isfinite(logits(rlprune.load(tmp_path / "again"))).all()
    (tmp_path / "again" / "plan.json").unlink()
    assert read_plan_again(tmp_path / "again") == plan["cost"]
    table = done(capsys, "evaluate", folder, made / "my.yaml")
    assert "pruned/dense" in table


def read_plan_again(folder: Path) -> dict[str, float]:
    """Costs as config.json alone gives them."""
    from rlprune.workloads.adapter import read_pruned

    return read_pruned(folder)["cost"]


def test_what_cannot_be_read_is_said(made: Path, place: Path, refused: Callable[..., str]) -> None:
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text("{}")
    words = ["prune", str(made / "my.yaml"), "--rule", "uniform", "--set", "model.name=hf:adapter"]
    assert "merge that first (model.merge_and_unload())" in refused(*words)
    bare = place / "bare"
    bare.mkdir()
    for file in ("config.json", "model.safetensors"):
        (bare / file).write_bytes((made / "merged" / file).read_bytes())
    line = refused(*words[:-1], "model.name=hf:bare")
    assert "its tokenizer cannot be read" in line and "copy those of the dense model" in line
    edit(bare / "config.json", lambda c: c.update(quantization_config={"quant_method": "bitsandbytes"}))
    line = refused(*words[:-1], "model.name=hf:bare")
    assert "its weights are quantised by bitsandbytes; give the unquantised model" in line
    edit(bare / "config.json", lambda c: c.pop("quantization_config"))
    config = json.loads((bare / "config.json").read_text())
    config["per_layer_config"]["0"]["intermediate_size"] = 7
    (bare / "config.json").write_text(json.dumps(config))
    with pytest.warns(
        ForeignFolderWarning, match="rlprune.kept in config.json is not what per_layer_config has"
    ):
        line = error_of(lambda: rlprune.load("bare"))
    assert "config.json asks for" in line
