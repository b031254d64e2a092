"""Pruned language models are saved in the format of their checkpoint, and the commands say how large both are."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import rlprune
from helpers.lm import tiny_lm
from helpers.lm_folder import write_config, write_folder
from rlprune.cli.main import main
from rlprune.errors import ConfigError
from rlprune.language.stored import Stored, saved_dtype

PRUNE = ["--rule", "uniform", "--set", "prune.importance=l1", "recovery.steps=[none]"]


def dense_folder(path: Path, dtype: torch.dtype) -> Path:
    """A tiny Llama stored in a format; its weights are numbers of that format."""
    from transformers import AutoModelForCausalLM

    write_folder(path, initializer_range=0.3)
    AutoModelForCausalLM.from_pretrained(path).to(dtype).save_pretrained(path)
    return path


def prune(tmp_path: Path, model: Path, *more: str) -> Path:
    out = tmp_path / "pruned"
    config = write_config(tmp_path / "tiny.yaml", model)
    assert main(["prune", str(config), *PRUNE, *more, "--out", str(out)]) == 0
    return out


def dtype_of(folder: Path) -> torch.dtype:
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(rlprune.load(folder).dtype)[6:]
    return rlprune.load(folder).dtype


@pytest.mark.parametrize(
    ("stored", "more", "saved"),
    [
        (torch.bfloat16, [], torch.bfloat16),
        (torch.float16, [], torch.float16),
        pytest.param(torch.float32, [], torch.float32, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, ["finish.dtype=float32"], torch.float32, marks=pytest.mark.slow),
        (torch.float32, ["finish.dtype=bfloat16"], torch.bfloat16),
    ],
)
def test_prune_keeps_the_format_and_says_sizes(tmp_path, capsys, stored, more, saved):
    out = prune(tmp_path, dense_folder(tmp_path / "dense", stored), *more)
    assert dtype_of(out) == saved
    said = capsys.readouterr().out
    assert re.search(rf"^dense weights: dense, 0\.\d MB \({str(stored)[6:]}\)$", said, re.M)
    assert re.search(rf"^pruned weights: .*pruned, 0\.\d MB \({str(saved)[6:]}\)$", said, re.M)
    assert "--to gguf" not in said


def test_a_quantised_file_becomes_bfloat16_and_the_way_back_is_said(tmp_path, capsys):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from rlprune.language.files.gguf_file import write_gguf

    folder = write_folder(tmp_path / "dense", num_attention_heads=2, num_key_value_heads=2)
    from transformers import AutoModelForCausalLM

    source: Any = AutoModelForCausalLM.from_pretrained(folder)
    model = write_gguf(source, tmp_path / "dense.gguf", "q8_0", folder).path
    out = prune(tmp_path, model)
    assert dtype_of(out) == torch.bfloat16
    said = capsys.readouterr().out
    assert re.search(r"^dense weights: dense\.gguf, 0\.\d MB \(Q8_0\)$", said, re.M)
    command = re.search(r"Q8_0 is not written again; .* MB, by: (rlprune export .*)", said)
    assert command is not None
    assert main(shlex.split(command[1])[1:]) == 0
    assert "vocabulary copied from dense.gguf" in capsys.readouterr().out


def test_a_run_measures_what_it_saves(tmp_path, capsys):
    """The row of the agent in results.json is that of the folder, computed in float32."""
    config = write_config(tmp_path / "tiny.yaml", dense_folder(tmp_path / "dense", torch.bfloat16))
    assert (
        main(["train", str(config), "--out", str(tmp_path / "run"), "--set", "search.ppo.surrogate_steps=64"])
        == 0
    )
    said = capsys.readouterr().out
    assert re.search(r"^dense weights: .*bfloat16\)\npruned weights: .*bfloat16\)$", said, re.M)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [line.split(":")[0] for line in results["saved"]] == ["dense weights", "pruned weights"]
    row = next(row for row in results["rows"] if row["kind"] == "agent")
    workload = rlprune.build_workload(rlprune.load_config(config))
    with workload.test_opened():
        found = workload.evaluate(rlprune.load(tmp_path / "run" / "pruned").float(), "test")
    assert row["test_loss"] == pytest.approx(found.loss, rel=1e-6)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run" / "pruned"), str(config)]) == 0
    assert "weights are bfloat16; both models were computed in float32" in capsys.readouterr().out


class TestChoice:
    def test_what_float16_cannot_hold(self):
        model = tiny_lm("llama")
        half = Stored(Path("x"), "float16", torch.float16, False, 1)
        assert saved_dtype(half, model, "auto") == torch.float16
        with torch.no_grad():
            model.get_parameter("lm_head.weight")[0, 0] = 1e5
        assert saved_dtype(half, model, "auto") == torch.bfloat16
        with pytest.raises(
            ConfigError, match="float16 cannot hold 'lm_head.weight'; use bfloat16 or float32"
        ):
            saved_dtype(half, model, "float16")

    def test_a_model_of_the_users_own_stays_as_it_is(self):
        assert saved_dtype(None, tiny_lm("llama"), "auto") == torch.float32
        assert saved_dtype(None, tiny_lm("llama", dtype=torch.bfloat16), "auto") == torch.bfloat16

    def test_no_wider_than_the_model_was_loaded(self):
        whole = Stored(Path("x"), "float32", torch.float32, False, 1)
        assert saved_dtype(whole, tiny_lm("llama", dtype=torch.bfloat16), "auto") == torch.bfloat16


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("export x CONFIG --to hf --set finish.dtype=bfloat16", "saves no pruned model"),
        ("inspect CONFIG --set finish.dtype=bfloat16", "saves no pruned model"),
        ("prune digits --rule uniform --set finish.dtype=bfloat16", "finish.dtype: only for language models"),
        (
            "prune CONFIG --rule uniform --set finish.dtype=bf16",
            "is not one of auto, float32, bfloat16, float16",
        ),
    ],
)
def test_wrong_settings(tmp_path, capsys, monkeypatch, command, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    config = write_config(tmp_path / "tiny.yaml", tmp_path)
    name, *rest = command.split()
    options = [str(config) if part == "CONFIG" else part for part in rest]
    assert main([name, *options]) == 2
    assert words in capsys.readouterr().err
