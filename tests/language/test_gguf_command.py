"""`rlprune export --to gguf` as a person types it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import rlprune
from helpers.gguf_models import fields
from helpers.lm_folder import write_config, write_folder
from rlprune.cli.main import main

gguf = pytest.importorskip("gguf")
from rlprune.experiments.formats.gguf import DTYPES  # noqa: E402
from rlprune.language.files import llama_cpp  # noqa: E402
from rlprune.language.files.gguf_check import run_line  # noqa: E402
from rlprune.language.files.gguf_file import DTYPES as WRITTEN  # noqa: E402
from rlprune.language.files.gguf_file import write_gguf  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Llama of unequal widths, pruned by a rule from the command line."""
    base = tmp_path_factory.mktemp("gguf")
    # Weights large enough that positions matter: else a wrong rotation would hardly show.
    config = write_config(base / "tiny.yaml", write_folder(base / "dense", initializer_range=0.4))
    out = base / "pruned"
    assert main(["prune", str(config), "--rule", "lamp", "--out", str(out), "--set", "prune.round_to=1"]) == 0
    return out


def test_the_formats_name_what_can_be_written():
    assert tuple(WRITTEN) == DTYPES


@pytest.mark.parametrize("dtype", [None, "q8_0"])
def test_a_file_and_what_was_checked(folder, tmp_path, capsys, dtype):
    out = tmp_path / "model.gguf"
    command = ["export", str(folder), "--to", "gguf", "--out", str(out)]
    assert main([*command, *(["--dtype", dtype] if dtype else [])]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"written: {out}" and said[1].startswith(f"  {dtype or 'f16'}, 0.")
    assert "the folder's weights 0." in said[1]
    text = "\n".join(said)
    assert (
        "vocabulary from tokenizer.json (gpt2, gpt-2)" in text
        and "tensors read back by the gguf reader" in text
    )
    assert ("run in llama.cpp" if llama_cpp.is_installed() else "llama.cpp is not installed") in text
    assert ("matrices stay in f16" in text) == (dtype == "q8_0")
    assert fields(out)["rlprune.version"]
    assert main([*command, "--dtype", "f32"]) == 0, "a file of ours is replaced"


def test_where_files_go_by_default(folder, capsys):
    assert main(["export", str(folder), "--to", "gguf", "--dtype", "bf16"]) == 0
    assert (folder / "model-bf16.gguf").is_file()
    (folder / "model-bf16.gguf").unlink()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "gguf", "--dtype", "q8"], "--dtype: gguf has no 'q8'; use one of f32, f16, bf16, q8_0"),
        (
            ["--to", "hf", "--dtype", "f16"],
            "--dtype: hf keeps the folder's number format; only gguf has a choice",
        ),
        (["--to", "ggfu"], "unknown format 'ggfu'"),
    ],
)
def test_wrong_options(folder, capsys, options, words):
    assert main(["export", str(folder), *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_foreign_file_stays(folder, tmp_path, capsys):
    out = tmp_path / "model.gguf"
    out.write_bytes(b"mine")
    assert main(["export", str(folder), "--to", "gguf", "--out", str(out)]) == 2
    assert out.read_bytes() == b"mine" and "--force" in capsys.readouterr().err
    assert main(["export", str(folder), "--to", "gguf", "--out", str(out), "--force"]) == 0


def test_without_llama_cpp_the_command_says_so(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    assert main(["export", str(folder), "--to", "gguf", "--out", str(tmp_path / "m.gguf")]) == 0
    assert "not run: llama.cpp is not installed; pip install llama-cpp-python" in capsys.readouterr().out


@pytest.mark.skipif(not llama_cpp.is_installed(), reason=f"llama.cpp is not installed: {llama_cpp.INSTALL}")
def test_a_file_that_computes_something_else_is_not_left(folder, tmp_path, capsys, monkeypatch):
    from rlprune.language.files import gguf_layout

    monkeypatch.setattr(gguf_layout, "paired_rows", lambda rows, heads: rows)  # the layout of another reader
    out = tmp_path / "m.gguf"
    assert main(["export", str(folder), "--to", "gguf", "--out", str(out)]) == 2
    assert f"{out}: llama.cpp computes other logits than PyTorch" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_in_bfloat16_is_compared_in_float32(folder, tmp_path, monkeypatch):
    """In bfloat16 PyTorch's own rounding was taken for llama.cpp's, and right files were refused."""
    same = llama_cpp.Comparison(3.0, 3.0, 16, 16, 0.0, 20, "0", None)
    seen = []
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: True)
    monkeypatch.setattr(llama_cpp, "compare", lambda slim, *rest: seen.append(slim.dtype) or same)
    model = rlprune.load(folder).bfloat16()

    def check(path, layout):
        return run_line(model, path, "bf16", folder, layout)

    write_gguf(model, tmp_path / "m.gguf", "bf16", folder, check=check)
    assert seen == [torch.float32]


def test_image_models_are_refused(tmp_path, capsys):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 3)).eval()
    space = rlprune.trace(model, torch.zeros(1, 3, 8, 8))
    plan = rlprune.make_plan(space, importance=[np.arange(8.0)], widths=np.array([4]))
    rlprune.save(rlprune.prune(model, plan), plan, tmp_path / "net")
    assert main(["export", str(tmp_path / "net"), "--to", "gguf"]) == 2
    assert "holds no language model" in capsys.readouterr().err
