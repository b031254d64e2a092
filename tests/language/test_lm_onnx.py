"""Language models as ONNX: run by onnxruntime with and without a past, beside transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rlprune
from helpers.lm import tiny_lm, tokens
from helpers.pruned_lm import plan_of
from rlprune.cli import main as cli
from rlprune.errors import ArtifactError
from rlprune.language.files.onnx import OnnxLanguageModel, export_onnx, greedy_tokens

pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")


def cut(name: str, widths: dict[int, int], drop: bool = True) -> tuple[Any, rlprune.Plan]:
    """A variant cut to some widths, by the group's number; the others lose a unit where they can."""
    model = tiny_lm(name)
    space = rlprune.trace(model, tokens(), drop=drop, verify=False)
    kept = [widths.get(i, max(g.width - 1, min(g.width, 1))) for i, g in enumerate(space.groups)]
    plan = plan_of(space, np.array(kept))
    return rlprune.prune(model, plan), plan


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, str]:
    """A Llama without its first attention and its second feed-forward part, with 1 and 2 key-value heads, exported by
    the command."""
    folder = tmp_path_factory.mktemp("onnx")
    slim, plan = cut("llama", {0: 0, 2: 1, 3: 0, 4: 2})
    rlprune.save(slim, plan, folder / "pruned")
    target = folder / "out" / "m.onnx"
    assert cli.main(["export", str(folder / "pruned"), "--to", "onnx", "--out", str(target)]) == 0
    return rlprune.load(folder / "pruned"), target, ""


def test_names_and_shapes_are_those_of_optimum(made: tuple[Any, Path, str]) -> None:
    session = ort.InferenceSession(made[1])
    inputs = {entry.name: (entry.shape, entry.type) for entry in session.get_inputs()}
    assert inputs == {
        "input_ids": (["batch_size", "sequence_length"], "tensor(int64)"),
        "attention_mask": (["batch_size", "total_sequence_length"], "tensor(int64)"),
        "position_ids": (["batch_size", "sequence_length"], "tensor(int64)"),
        **{
            f"past_key_values.{block}.{side}": (
                ["batch_size", heads, "past_sequence_length", 8],
                "tensor(float)",
            )
            for block, heads in ((1, 1), (2, 2))
            for side in ("key", "value")
        },
    }
    assert [entry.name for entry in session.get_outputs()] == [
        "logits", "present.1.key", "present.1.value", "present.2.key", "present.2.value",
    ]  # fmt: skip
    assert [path.name for path in made[1].parent.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize(("batch", "length", "before"), [(1, 1, 0), (4, 17, 0), (1, 1, 31), (3, 5, 9)])
def test_logits_are_those_of_transformers_cache(
    made: tuple[Any, Path, str], batch: int, length: int, before: int
) -> None:
    """The oracle is transformers' own cache, which the check of the export does not use."""
    slim, path, _ = made
    model = OnnxLanguageModel(path, threads=1)
    ids = tokens(before + length, batch, seed=3)
    past, cache = None, None
    with torch.no_grad():
        if before:
            _, past = model(ids[:, :before])
            cache = slim(ids[:, :before], use_cache=True)
            name = "cache" if "cache" in cache else "past_key_values"
            cache = {name: cache[name]}
        wanted = slim(ids[:, before:], use_cache=True, **(cache or {})).logits
    found, present = model(ids[:, before:], past)
    assert float((found - wanted).abs().max()) < 1e-4
    assert [t.shape[2] for t in present] == [before + length] * 4


def test_greedy_tokens_are_those_of_generate(made: tuple[Any, Path, str]) -> None:
    slim, path, _ = made
    ids = tokens(6, 1, seed=5)
    wanted = slim.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)[0, 6:]
    assert OnnxLanguageModel(path).greedy(ids, 12).tolist() == wanted.tolist()
    assert greedy_tokens(slim, ids, 12).tolist() == wanted.tolist()


def test_large_weights_lie_beside_the_file(tmp_path: Path) -> None:
    slim, _ = cut("llama-mha-tied", {0: 3, 2: 2, 4: 1}, drop=False)
    checked = export_onnx(slim, tmp_path / "m.onnx", one_file=1000)
    assert checked.files == ("m.onnx", "m.onnx.data") and "m.onnx.data next to it" in str(checked)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    found, _ = OnnxLanguageModel(tmp_path / "m.onnx")(tokens(5, 2))
    assert float((found - slim(tokens(5, 2)).logits.detach()).abs().max()) < 1e-4


def test_what_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slim, _ = cut("llama", {}, drop=False)
    monkeypatch.setattr(
        "rlprune.language.files.onnx._write", lambda model, path, external: path.write_bytes(b"x")
    )
    with pytest.raises(ArtifactError, match="LlamaForCausalLM cannot be exported") as caught:
        export_onnx(slim, tmp_path / "m.onnx")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_weights_of_somebody_else_are_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slim, plan = cut("llama", {}, drop=False)
    rlprune.save(slim, plan, tmp_path / "pruned")
    (tmp_path / "m.onnx.data").write_text("a thesis")
    assert (
        cli.main(["export", str(tmp_path / "pruned"), "--to", "onnx", "--out", str(tmp_path / "m.onnx")]) == 2
    )
    assert "m.onnx.data: is there already and rlprune did not write it" in capsys.readouterr().err
    assert (tmp_path / "m.onnx.data").read_text() == "a thesis"


FAMILIES = (
    "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi3", "phi", "opt", "gpt_neox", "gpt2", "gptj", "bloom",
    "falcon", "granite", "smollm3", "olmo", "olmo2", "cohere", "cohere2", "stablelm", "starcoder2", "nemotron", "glm",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, tmp_path: Path) -> None:
    slim, _ = cut(name, {}, drop=False)
    checked = export_onnx(slim, tmp_path / "m.onnx")
    assert checked.difference < 1e-4
    # Longer than the windows of those that have some.
    found, _ = OnnxLanguageModel(tmp_path / "m.onnx")(tokens(40, 2, seed=1))
    assert float((found - slim(tokens(40, 2, seed=1)).logits).abs().max()) < 1e-3
