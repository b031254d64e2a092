"""`apply` of a plan that exists already, `prune` in stages, and `evaluate` and `inspect` of language models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rlprune
from helpers.lm_folder import write_config, write_folder
from helpers.questions import made_up, write
from helpers.small import SMALL_DIGITS
from rlprune.cli import main as cli

SETS = [word for override in SMALL_DIGITS for word in ("--set", override)]


def done(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    code = cli.main(list(words))
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/model.safetensors")


def same(first: str, second: str) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    write_folder(folder / "model")
    write_config(folder / "tiny.yaml", "model")
    return folder


def test_a_plan_gives_the_same_classifier_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    done(capsys, "prune", "digits", *SETS, "--rule", "erk", "--out", "first")
    text = done(capsys, "apply", "first", "digits", *SETS, "--out", "second")
    assert same("first", "second")
    assert re.search(r"macs: [\d,]+ of [\d,]+ \(\d+\.\d%\)", text)
    assert json.loads(Path("second/plan.json").read_text())["origin"]["method"] == "plan"
    # Another checkpoint of the same architecture: other weights, the same units.
    done(capsys, "apply", "first/plan.json", "digits", *SETS, "--set", "model.seed=5", "--out", "third")
    kept = [
        [g["kept"] for g in json.loads(Path(f, "plan.json").read_text())["groups"]]
        for f in ("first", "third")
    ]
    assert kept[0] == kept[1]
    assert not same("first", "third")


def test_a_plan_gives_the_same_language_model_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    drop = ("--set", "prune.drop=true")
    done(capsys, "prune", "tiny.yaml", "--rule", "uniform", "--out", "first", *drop)
    text = done(capsys, "apply", "first", "tiny.yaml", "--out", "second")
    assert all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(weights("first").values(), weights("second").values())
    )
    assert "kv_cache: " in text and "perplexity" in text
    none = ("--set", "recovery.steps=[none]")
    text = done(capsys, "apply", "first", "tiny.yaml", *none, "--out", "streamed")
    assert "not recovered" in text
    # The number format is stated, so the model is loaded and cut in memory: the same to the bit.
    done(capsys, "apply", "first", "tiny.yaml", *none, "--set", "model.dtype=float32", "--out", "memory")
    assert same("streamed", "memory")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits = [rlprune.load(folder)(ids).logits for folder in ("streamed", "memory")]
    assert torch.equal(*logits)
    assert (Path("streamed") / "tokenizer.json").is_file()


def test_pruning_in_stages(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    text = done(capsys, "prune", "tiny.yaml", "--rule", "uniform", "--stages", "2", "--out", "staged")
    shares = [float(line.split()[1].rstrip("%")) for line in text.splitlines()[1:4]]
    assert shares[0] == 100
    assert 88 < shares[1] <= 90
    assert 78 < shares[2] <= 80
    origin = json.loads(Path("staged/plan.json").read_text())["origin"]
    assert (origin["stages"], origin["steps"]) == (2, 0)
    assert not Path("staged.state").exists()
    assert sum(t.numel() for t in weights("staged").values()) <= 0.8 * sum(
        t.numel() for t in weights("model").values()
    )


def test_evaluate_a_language_model(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    done(capsys, "prune", "tiny.yaml", "--rule", "uniform", "--out", "pruned")
    task = write(place / "task.json", made_up(6, 0))
    text = done(capsys, "evaluate", "pruned", "tiny.yaml", "--tasks", str(task), "--limit", "4")
    rows = {line[: line.index("  ")].strip(): line.split() for line in text.splitlines() if "  " in line}
    plan = json.loads(Path("pruned/plan.json").read_text())
    dense, pruned = (int(n.replace(",", "")) for n in rows["params (all, tied once)"][-3:-1])
    assert (dense, pruned) == (plan["dense_cost"]["params"], plan["cost"]["params"])
    assert dense == sum(t.numel() for t in weights("model").values())
    assert pruned == sum(t.numel() for t in weights("pruned").values())
    # The cache as a real forward pass leaves it, counted in bfloat16.
    with torch.no_grad():
        cache = rlprune.load("pruned")(torch.zeros(1, 10, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert float(rows["KV cache, bytes a token (bf16)"][-2].replace(",", "")) == 2 * held / 10
    for name in ("macs of 16 tokens", "params of the blocks", "prefill of 16 tokens, ms", "test perplexity"):
        assert len(rows[name]) >= 4
    assert re.search(r"test: help_texts, 5 sequences of 16 tokens, stride 16, 75 tokens scored", text)
    table = [line.split()[:3] for line in text.splitlines() if line.startswith("task ")]
    assert table[1:] == [["task", "dense", "4"], ["task", "pruned", "4"]]
    alone = done(capsys, "evaluate", "pruned", "--tasks", str(task), "--limit", "4")
    assert "give CONFIG" in alone
    assert alone.splitlines()[-1].split() == text.splitlines()[-1].split()


def test_inspect_reads_no_weights(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    loaded = done(capsys, "inspect", "tiny.yaml", "--resources")
    bare = place / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((place / "model" / "config.json").read_bytes())
    text = done(capsys, "inspect", "tiny.yaml", "--set", "model.name=hf:bare")
    assert text.splitlines() == loaded.splitlines()[:-1]
    assert re.fullmatch(r"took \d+\.\d s(, peak memory [\d,]+ MB)?", loaded.splitlines()[-1])
    assert "embeddings 9,600 " in text
    assert "budget: 0.8 of params" in text
    tiny = done(
        capsys, "inspect", "tiny.yaml", "--set", "model.name=tiny_llama", "model.arguments.layers=4"
    )  # fmt: skip
    assert "0-3" in tiny
