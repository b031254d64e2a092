"""The script of docs/architectures.md: what it calls working, its cache, and its page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.scripts import load_script
from rlprune.vision import base_of

script = load_script("architectures")

GOOD: dict[str, Any] = {
    "input": "1x3x64x64", "seconds": 1.0, "groups": 3, "protected": 1, "left": [],
    "lowest": {"macs": 0.1, "params": 0.2}, "macs": 2e6, "params": 3e6, "ratio": 0.5, "macs_equal": True,
    "params_equal": True, "difference": 0.0, "changed": 1.0, "reloaded": True,
}  # fmt: skip


def test_the_list_holds_what_the_page_promises() -> None:
    groups = [entry.group for entry in script.ARCHITECTURES.values()]
    names = list(script.ARCHITECTURES)
    assert sum(name.startswith("timm:") for name in names) >= 60
    assert sum(name.startswith("hf:") for name in names) >= 10
    assert sum(group.startswith("torchvision") for group in groups) >= 40
    for task in ("classification", "segmentation", "detection", "video"):
        assert f"torchvision, {task}" in groups


@pytest.mark.parametrize(
    "name",
    [n for n in script.ARCHITECTURES if not n.startswith("hf:")] + ["hf:vit", "hf:resnet", "hf:segformer"],
)
def test_every_name_of_the_list_is_one_of_a_model(name: str) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    entry = script.ARCHITECTURES[name]
    assert base_of(name, 10, arguments=entry.arguments, side=entry.side)["source"] != "function"


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, "works"),
        ({"difference": 1e-6}, "WRONG"),
        ({"changed": 0.0}, "WRONG"),
        ({"macs_equal": False}, "WRONG"),
        ({"params_equal": False}, "WRONG"),
        ({"reloaded": False}, "WRONG"),
        ({"lowest": {"macs": 0.51, "params": 0.1}}, "in part"),
        ({"lowest": {"macs": 0.5, "params": 0.9}}, "works"),
        ({"left": [["a.b", 0.04, "aten.foo cannot be followed"], ["c", 0.02, "the same"]]}, "in part"),
        ({"left": [["a.b", 0.04, "aten.foo cannot be followed"]]}, "works"),
    ],
)
def test_a_result_follows_from_the_facts(change: dict[str, Any], kind: str) -> None:
    assert script.result(GOOD | change) == kind
    said = script.reason("resnet18", GOOD | change)
    told = kind != "works" or "left" in change
    assert said.startswith(f"- resnet18: {kind}: ") if told else said == ""


@pytest.mark.parametrize(
    ("facts", "kind"),
    [
        ({"refused": "no layer of X can be pruned"}, "refused"),
        ({"refused": "tracing X took more than 120 s; ..."}, "too long"),
        ({"failed": "stopped after 600 s"}, "too long"),
        ({"failed": "MemoryError"}, "failed"),
        ({}, "not run"),
    ],
)
def test_what_gave_no_cut_model_is_told_apart(facts: dict[str, Any], kind: str) -> None:
    assert script.result(facts) == kind
    assert len(script.row("resnet18", facts)) == len(script.HEADER) == len(script.row("resnet18", GOOD))


@pytest.mark.parametrize(
    ("reason", "nature"),
    [
        ("output of the model", True),
        ("3 of 4 channels: input of the model", True),
        ("'a.norm' (LayerNorm) normalises over its channels", True),
        ("a single unit, nothing to choose from", True),
        ("the cut model differs from the masked dense model", False),
        ("'rnn' (LSTM) is not cut", False),
    ],
)
def test_reasons_by_nature(reason: str, nature: bool) -> None:
    assert bool(script.BY_NATURE.search(reason)) == nature


def test_outputs_of_other_shapes_differ_without_end() -> None:
    one, two = torch.tensor([1.0, -4.0]), torch.tensor([1.0])
    assert script.difference([one], [one + torch.tensor([0.0, 1.0])]) == 1.0 / 3.0
    assert script.difference([one], [two]) == script.difference([one], [one, two]) == float("inf")
    assert script.difference([torch.zeros(0)], [torch.zeros(0)]) == 0.0


class Detector(nn.Module):
    """Two boxes whose order is given, and a head in front of them."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.head, self.order = nn.Identity(), order

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        scores = self.head(torch.tensor([0.5, 0.5]))
        return [{"boxes": torch.eye(4)[:2][self.order], "scores": scores} for _ in images]


def test_detectors_are_compared_by_what_their_head_gives() -> None:
    one, other = (script.outputs(Detector(order), [[torch.zeros(3, 4, 4)]]) for order in ([0, 1], [1, 0]))
    assert [t.tolist() for t in one] == [[0.5, 0.5]]
    assert script.difference(one, other) == 0.0


def _line(model: str, code: str, facts: dict[str, Any]) -> str:
    return json.dumps(
        {"model": model, "entry": script.written(script.ARCHITECTURES[model]), "code": code, "facts": facts}
    )


def test_the_cache_counts_lines_of_the_same_code_and_the_same_entry(tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    other_side = json.loads(_line("alexnet", "new", GOOD)) | {"entry": [1000, {}]}
    lines = [
        _line("resnet18", "old", GOOD), _line("resnet34", "new", GOOD), _line("resnet34", "new", GOOD | {"groups": 7}),
        json.dumps(other_side), _line("resnet50", "new", GOOD)[:40],
    ]  # fmt: skip
    cache.write_text("\n".join(lines))
    assert script.known(cache, "new") == {"resnet34": GOOD | {"groups": 7}}
    assert set(script.known(cache, None)) == {"resnet18", "resnet34"}
    assert script.known(tmp_path / "none.jsonl", None) == {}


def test_a_rerun_examines_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, docs, asked = tmp_path / "deep" / "cache.jsonl", tmp_path / "docs", []
    docs.mkdir()

    def examined(name: str) -> dict[str, Any]:
        asked.append(name)
        return GOOD if name != "resnet34" else {"refused": "no layer can be pruned"}

    monkeypatch.setattr(script, "in_own_process", examined)
    monkeypatch.setattr(script, "DOCS", docs)

    def run(*words: str) -> list[str]:
        asked.clear()
        monkeypatch.setattr(sys, "argv", ["architectures.py", "--cache", str(cache), *words])
        assert script.main() == 0
        return sorted(asked)

    assert run("--only", "resnet18", "--only", "resnet34", "--jobs", "2") == ["resnet18", "resnet34"]
    assert run("--only", "resnet*") == ["resnet50"]
    assert run("--only", "resnet18", "--again") == ["resnet18"]
    assert run("--page") == []
    text = (docs / "architectures.md").read_text(encoding="utf-8")
    total = len(script.ARCHITECTURES)
    assert (
        f"- all: {total} models: 2 works ({2 / total:.0%}), 1 refused ({1 / total:.0%}), {total - 3} not run"
        in text
    )
    assert "- resnet34: refused: no layer can be pruned" in text
    monkeypatch.setattr(script, "code_mark", lambda: "other code")
    assert run("--only", "resnet18") == ["resnet18"]


@pytest.mark.slow
def test_a_model_is_examined_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = script.in_own_process("cifar_resnet20")
    assert script.result(facts) == "works"
    assert facts["all_seconds"] > facts["seconds"]
    monkeypatch.setattr(script, "LIMIT_SECONDS", 0.2)
    assert script.result(script.in_own_process("cifar_resnet20")) == "too long"
