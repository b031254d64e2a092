"""Wrong inputs of the language side, through the real command line: exit 2, one line, nothing half-written."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.lm_folder import write_config, write_folder
from helpers.small import SMALL_DIGITS
from rlprune.cli import main as cli

DIGITS = ["digits", *(word for override in SMALL_DIGITS for word in ("--set", override))]
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("lm") / "model")


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """A pruned model of the folder."""
    config = write_config(folder.parent / "tiny.yaml", folder)
    out = folder.parent / "pruned"
    assert cli.main(["prune", str(config), "--rule", "uniform", "--out", str(out)]) == 0
    return out


@pytest.fixture
def config(place: Path, folder: Path) -> Path:
    return write_config(place / "tiny.yaml", folder)


@pytest.fixture
def train(config: Path, refused: Refused) -> Refused:
    """`train` with settings that must be refused."""

    def run(*overrides: str) -> str:
        sets = [word for override in overrides for word in ("--set", override)]
        return refused("train", "tiny.yaml", *sets, "--out", "run")

    return run


def config_only(path: Path, **fields: Any) -> Path:
    """A model folder that holds a config and nothing else."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return path


def write_gguf(path: Path) -> bytes:
    """A GGUF file with a little metadata and one tensor."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_tensor("token_embd.weight", np.zeros((300, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file as copies: those of the file itself are mapped, and the file will be damaged."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


# Models


@pytest.mark.parametrize("share", [0.002, 0.5])
def test_a_truncated_gguf_file(share: float, place: Path, train: Refused) -> None:
    whole = write_gguf(place / "model.gguf")
    (place / "model.gguf").write_bytes(whole[: int(len(whole) * share)])
    assert "truncated or unknown GGUF file" in train("model.name=hf:model.gguf")


def test_a_file_that_is_no_gguf(place: Path, train: Refused) -> None:
    (place / "model.gguf").write_text("a text")
    assert "hf:model.gguf': not a GGUF file" in train("model.name=hf:model.gguf")
    assert "hf:absent.gguf': no such file" in train("model.name=hf:absent.gguf")
    (place / "model.bin").write_text("a text")
    assert "give the folder with config.json" in train("model.name=hf:model.bin")


def test_a_tokenizer_that_does_not_fit(place: Path, train: Refused) -> None:
    write_folder(place / "other", vocab_size=280)
    line = train("model.name=hf:other")
    assert "the tokenizer does not fit: it gives the id 299" in line
    assert "280 tokens" in line


def test_a_missing_tokenizer(place: Path, folder: Path, train: Refused) -> None:
    shutil.copytree(folder, place / "bare", ignore=shutil.ignore_patterns("token*"))
    assert "hf:bare': its tokenizer cannot be read" in train("model.name=hf:bare")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "BertForMaskedLM (bert) is not a causal",
        ),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            "is not a causal language model",
        ),
        (
            {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
            "MambaForCausalLM: no softmax attention and no feed-forward part of a known shape in 'backbone.layers.0'",
        ),
        ({"model_type": "lama", "architectures": ["LamaForCausalLM"]}, "its config cannot be read"),
        ({"architectures": ["LlamaForCausalLM"]}, "its config cannot be read"),
    ],
    ids=["encoder", "encoder-decoder", "no-part", "unknown-type", "no-type"],
)
def test_models_that_cannot_be_pruned(
    fields: dict[str, Any],
    expected: str,
    place: Path,
    train: Refused,
    refused: Refused,
) -> None:
    config_only(place / "other", **fields)
    line = train("model.name=hf:other")
    assert "model.name 'hf:other': " in line
    assert expected in line
    assert line == refused("inspect", "tiny.yaml", "--set", "model.name=hf:other")


def test_folders_that_are_none(place: Path, folder: Path, train: Refused) -> None:
    (place / "empty").mkdir()
    assert "hf:empty': the folder has no config.json" in train("model.name=hf:empty")
    assert "no such folder" in train("model.name=hf:./absent")
    shutil.copytree(folder, place / "damaged")
    (place / "damaged" / "config.json").write_text('{"model_type": "ll')
    assert "hf:damaged': its config cannot be read" in train("model.name=hf:damaged")


def test_weights_that_are_damaged(place: Path, folder: Path, train: Refused) -> None:
    shutil.copytree(folder, place / "damaged")
    weights = place / "damaged" / "model.safetensors"
    tensors = read(weights)
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "its weights cannot be read" in train("model.name=hf:damaged")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, weights, {"format": "pt"})
    assert f"lack 1 of the model's tensors, {name!r}" in train("model.name=hf:damaged")
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, weights, {"format": "pt"})
    assert f"{name!r} holds NaN" in train("model.name=hf:damaged")


def test_arguments_of_a_model(train: Refused) -> None:
    assert "model.arguments: only 'tiny_llama' takes any" in train("model.arguments.layers=2")
    assert "did you mean 'layers'" in train("model.name=tiny_llama", "model.arguments.layer=2")
    assert "model.dtype: " in train("model.dtype=float8")
    assert "model.weights: not for language models" in train("model.weights=DEFAULT")


def test_images_and_text_do_not_mix(train: Refused, refused: Refused) -> None:
    assert "data.name 'digits': holds images" in train("data.name=digits")
    assert "holds text" in refused("train", *DIGITS, "--set", "data.name=help_texts", "--out", "run")


# Text


def test_texts_that_are_none(place: Path, train: Refused) -> None:
    def text(content: bytes, name: str = "text.txt") -> str:
        (place / name).write_bytes(content)
        return train("data.name=text", f"data.files={{train: {name}, test: {name}}}")

    assert "text.txt: " in text(b"")
    assert "text.txt: " in text(b" \n\t\n")
    assert "has only 13 tokens" in text(b"a few words only")
    assert "text.txt: " in text(bytes(range(256)) * 40)
    assert "lines.jsonl: line 2" in text(b'{"text": "good"}\n{"text": "bad\n', "lines.jsonl")
    assert "'text'" in text(b'{"texts": "good"}\n' * 30, "lines.jsonl")
    assert "no such file" in train("data.name=text", "data.files={train: absent.txt, test: absent.txt}")


def test_settings_of_a_text(train: Refused) -> None:
    assert "data.sequence_length: 65 is longer than the model's 64 positions" in train(
        "data.sequence_length=65"
    )
    assert "data.test_length: 80 is longer than the model's 64 positions" in train("data.test_length=80")
    assert "data.stride: " in train("data.stride=17")
    assert "data.sequence_length: must be at least 8" in train("data.sequence_length=4")
    assert "did you mean 'help_texts'" in train("data.name=help_text")
    assert "data.download" in train("data.name=hub:some/where")
    assert "data.files: only data.name 'text' reads files" in train("data.files={train: a.txt}")
    assert "calibration" in train("data.calibration=100000000")


# Budgets and settings


def test_a_budget_below_what_the_embeddings_cost(train: Refused, refused: Refused) -> None:
    # 9,600 of the 30,000 parameters are embeddings, which no plan cuts.
    line = train("budget.target=0.2")
    assert "below the feasible minimum" in line
    assert "feasible: " in line
    assert "below the feasible minimum" in refused("inspect", "tiny.yaml", "--set", "budget.target=9000")
    assert "below the feasible minimum" in train("budget.metric=kv_cache", "budget.target=0.3")


def test_rounding_larger_than_the_layer(train: Refused, refused: Refused) -> None:
    line = train("prune.round_to=64")
    assert "prune.round_to: 64 is larger than the 48 " in line
    assert line == refused("inspect", "tiny.yaml", "--set", "prune.round_to=64")


def test_unknown_names_and_kinds(train: Refused, refused: Refused) -> None:
    assert "score.kind: " in train("score.kind=perplexity")
    assert "score.kind: 'accuracy' is for classifiers" in train("score.kind=accuracy")
    assert "budget.metric: " in train("budget.metric=kv_cash")
    assert "did you mean 'wanda_sp'" in train("prune.importance=wanda")
    assert "finish.method: " in train("finish.method=qlora")
    assert "recovery.steps" in train("recovery.steps=[biass]")
    assert "did you mean 'flap'" in refused("prune", "tiny.yaml", "--rule", "flapp", "--out", "pruned")
    assert "no layer matches 'model.layers.9'" in train("prune.ignore=[model.layers.9]")


def test_what_only_language_models_have(refused: Refused) -> None:
    def digits(*words: str) -> str:
        return refused("prune", *DIGITS, *words, "--out", "pruned")

    uniform = ("--rule", "uniform", "--set")
    for setting in ("prune.drop", "prune.hidden"):
        line = digits(*uniform, f"{setting}=true")
        assert f"{setting}: only for language models" in line
        assert line == refused("inspect", "digits", "--set", f"{setting}=true")
    assert "kv_cache" in digits(*uniform, "budget.metric=kv_cache")
    assert "flap" in digits(*uniform, "prune.importance=flap")
    assert "recovery.steps" in digits(*uniform, "recovery.steps=[bias]")
    assert "flap" in digits("--rule", "flap")


def test_packages_that_are_not_installed(
    train: Refused,
    refused: Refused,
    finished: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "rlprune[language]" in train("finish.steps=2", "finish.method=lora")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    question = "Please choose the correct answer to the question: Why?\n\nAnswer1: a Answer2: b\n\n"
    entry = {"instruction": question + "Answer format: answer1/answer2", "answer": "answer1"}
    (place / "task.json").write_text(json.dumps([entry]))
    assert "rlprune[zeroshot]" in refused("evaluate", str(finished), "--tasks", "task.json")


# Saved models and tasks


def test_task_files(place: Path, finished: Path, refused: Refused) -> None:
    assert "absent.json: no such file" in refused("evaluate", str(finished), "--tasks", "absent.json")
    (place / "task.json").write_text('[{"instruction": "Why?", "answer": "a"}]')
    assert "task.json: question 1: " in refused("evaluate", str(finished), "--tasks", "task.json")
    assert "--limit" in refused("evaluate", str(finished), "--limit", "3")
    assert "different names" in refused("evaluate", str(finished), "--tasks", "a.json,a.json")


EDITS: list[tuple[str, str, Callable[[dict[str, Any]], None], str]] = [
    ("sizes", "config.json", lambda c: c["per_layer_config"]["0"].update(intermediate_size=47), "intermediate_size"),
    ("layer", "config.json", lambda c: c["per_layer_config"].update({"7": {}}), "per_layer_config.7"),
    ("depth", "config.json", lambda c: c.update(num_hidden_layers=2), "num_hidden_layers"),
    ("vocabulary", "config.json", lambda c: c.update(vocab_size=301), "vocab_size"),
    ("type", "config.json", lambda c: c.update(model_type="mixtral"), "model_type"),
    ("kept", "plan.json", lambda p: p["groups"][1]["kept"].pop(), "keeps"),
    ("order", "plan.json", lambda p: p["groups"][1]["kept"].reverse(), "ascending"),
    ("width", "plan.json", lambda p: p["widths"].__setitem__(0, 99), "width is 99"),
    ("fingerprint", "plan.json", lambda p: p.update(fingerprint="0" * 32), "another architecture"),
    ("newer", "plan.json", lambda p: p.update(version=99), "newer"),
    ("base", "plan.json", lambda p: p["base"]["config"].update(hidden_size=64), "hidden_size"),
    ("tensors", "plan.json", lambda p: p["tensors"].popitem(), "does not list"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "edit", "expected"), [e[1:] for e in EDITS], ids=[e[0] for e in EDITS])
def test_a_pruned_folder_edited_by_hand(
    file: str, edit: Callable[[dict[str, Any]], None], expected: str, finished: Path, place: Path,
    refused: Refused,
) -> None:  # fmt: skip
    shutil.copytree(finished, place / "pruned")
    path = place / "pruned" / file
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    line = refused("evaluate", "pruned")
    # Which of the two files is wrong cannot be known: one of them is named.
    assert line.startswith("rlprune: error: pruned")
    assert expected in line


def test_a_pruned_folder_with_damaged_files(
    finished: Path,
    place: Path,
    config: Path,
    refused: Refused,
) -> None:
    shutil.copytree(finished, place / "pruned")
    weights = place / "pruned" / "model.safetensors"
    whole, tensors = weights.read_bytes(), read(weights)
    weights.write_bytes(whole[: len(whole) // 2])
    assert "truncated" in refused("evaluate", "pruned", "tiny.yaml")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name] * torch.nan}, weights, {"format": "pt"})
    assert f"{name!r} holds NaN" in refused("evaluate", "pruned")
    save_file(tensors | {name: tensors[name][:, 1:].contiguous()}, weights, {"format": "pt"})
    assert name in refused("evaluate", "pruned")
    assert name in refused("export", "pruned", "--to", "hf", "--out", "out")
    weights.unlink()
    assert "no such file" in refused("evaluate", "pruned")
    weights.write_bytes(whole)
    (place / "pruned" / "config.json").unlink()
    assert "config.json" in refused("evaluate", "pruned")


def test_a_pruned_model_of_another_model(
    finished: Path,
    place: Path,
    config: Path,
    refused: Refused,
) -> None:
    write_folder(place / "other", num_hidden_layers=2)
    other = ("tiny.yaml", "--set", "model.name=hf:other")
    assert "another architecture" in refused("evaluate", str(finished), *other)
    assert "another architecture" in refused("apply", str(finished), *other, "--out", "out")
    none = ("--set", "recovery.steps=[none]")
    assert "another architecture" in refused("apply", str(finished), *other, *none, "--out", "out")
    assert "language model" in refused("export", str(finished), "--to", "torch-export", "--out", "out")


def test_tasks_for_a_classifier(place: Path, refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prune", *DIGITS, "--rule", "uniform", "--out", "classifier"]) == 0
    capsys.readouterr()
    assert "--tasks: needs a language model" in refused("evaluate", "classifier", "--tasks", "task.json")
