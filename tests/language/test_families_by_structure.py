"""Families that no adapter is written for: found by shape, proved, cut, saved and read again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rlprune
from helpers.lm_types import HYBRIDS, type_model
from rlprune import masked
from rlprune.errors import ArtifactError, GraphError
from rlprune.language import families, random_plan
from rlprune.language.proof import generates_alike

IDS = torch.arange(2, 14)[None]
# The families whose parts have Llama's names, and shapes of other kinds: gates, sinks, fused and interleaved rows.
ALIKE = (
    "arcee", "apertus", "ernie4_5", "helium", "ministral3", "cwm", "internlm3", "exaone", "iquestcoder", "hyperclovax",
    "vaultgemma", "jais2",
)  # fmt: skip
OTHERS = ("nanochat", "persimmon", "granite_swa")
WHOLE_ATTENTION = ("olmo_hybrid",)
"""Its queries and keys are normalised over all heads: attention is dropped whole, or stays."""
QUICK = ("jais2", "granite_swa", "lfm2")
ALL = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in (*ALIKE, *OTHERS, *HYBRIDS)
]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What one test finds is not known to the next."""
    yield
    for kind in tuple(families.FOUND):
        families.unregister(kind)


def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**(inputs or {"input_ids": IDS}), use_cache=False).logits
    return found


@pytest.mark.parametrize("kind", ALL)
def test_what_is_found_is_exact_and_comes_back_from_a_folder(kind: str, tmp_path: Path) -> None:
    model = type_model(kind, torch.float64)
    assert kind not in families.FAMILIES
    space = rlprune.trace(model, IDS, drop=True)
    kinds = {"ffn"} if kind in WHOLE_ATTENTION else {"attention", "ffn"}
    assert {group.kind for group in space.groups if group.width > 1} == kinds
    for seed in range(3):
        plan = random_plan(space, np.random.default_rng(seed))
        slim: Any = rlprune.prune(model, plan)
        wanted = logits(masked(model, plan))
        assert float((logits(slim) - wanted).abs().max()) < 1e-6 * float(wanted.abs().max())
        assert not torch.allclose(wanted, logits(model), rtol=1e-3)
        assert sum(p.numel() for p in slim.parameters()) == space.cost(plan.widths, "params")
        with torch.no_grad():
            options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
            cached, plain = (slim.generate(IDS, use_cache=use, **options) for use in (True, False))
        assert torch.equal(cached, plain)
    rlprune.save(slim, plan, tmp_path / "pruned")
    families.unregister(kind)
    assert torch.equal(logits(rlprune.load(tmp_path / "pruned")), logits(slim))


@pytest.mark.slow
def test_a_folder_needs_neither_rlprune_nor_the_search_for_its_parts(tmp_path: Path) -> None:
    model = type_model("jais2")
    space = rlprune.trace(model, IDS, drop=True)
    slim = rlprune.prune(model, plan := random_plan(space, np.random.default_rng(1)))
    rlprune.save(slim, plan, tmp_path / "pruned")
    torch.save(logits(slim), tmp_path / "wanted.pt")
    code = """
import sys; sys.modules["rlprune"] = None
import torch
from transformers import AutoModelForCausalLM
def check(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    found = model(input_ids=torch.arange(2, 14)[None], use_cache=False).logits
    assert torch.equal(found, torch.load("wanted.pt")), folder
    return model
check("pruned").save_pretrained("again")
check("again")
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("x", "must be a table of names"),
        ({"blocks": 3}, "pruned_family.blocks"),
        ({"code": "x"}, "pruned_family.code"),
    ],
)
def test_an_adapter_in_a_folder_is_names_and_nothing_else(content: object, line: str, tmp_path: Path) -> None:
    model = type_model("jais2")
    space = rlprune.trace(model, IDS)
    plan = random_plan(space, np.random.default_rng(1))
    rlprune.save(rlprune.prune(model, plan), plan, tmp_path)
    families.unregister("jais2")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pruned_family": content}))
    with pytest.raises(ArtifactError, match=line) as caught:
        rlprune.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_part_whose_cut_is_not_exact_stays_with_its_reason() -> None:
    """Differential attention splits the values along the heads: no head can go alone."""
    space = rlprune.trace(type_model("diffllama"), IDS, drop=True)
    assert {group.kind for group in space.groups} == {"ffn"}
    assert "a cut one cannot run" in space.protected["model.layers.0.self_attn"]


@pytest.mark.parametrize(("kind", "words"), [("mamba", "backbone.layers.0"), ("jais2", "is no causal")])
def test_a_refusal_is_one_line_and_names_the_module(kind: str, words: str) -> None:
    model = type_model(kind)
    with pytest.raises(GraphError) as caught:
        rlprune.trace(model if kind == "mamba" else model.base_model, IDS)
    assert "\n" not in str(caught.value) and words in str(caught.value)
    assert kind not in families.FAMILIES


def test_equal_tokens_are_no_equal_generation() -> None:
    """Beyond its window a Moshi attends farther without its cache than with it, whatever was cut."""
    model = type_model("moshi", torch.float64)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = [model.generate(IDS[:, :6], use_cache=use, **options) for use in (True, False)]
    assert torch.equal(*tokens) and not generates_alike(model, IDS[:, :6])
    assert generates_alike(type_model("jais2", torch.float64), IDS[:, :6])


def test_an_unknown_type_is_told_where_the_known_ones_are_listed() -> None:
    class Config:
        model_type = "lama"

    with pytest.raises(families.UnsupportedModel, match=r"near: llama.*rlprune list families") as caught:
        families.family_of(Config())
    assert len(str(caught.value)) < 200


def test_the_residual_width_is_refused_where_parts_were_found_by_structure() -> None:
    with pytest.raises(GraphError, match=r"prune.hidden: not for Jais2ForCausalLM"):
        rlprune.trace(type_model("jais2"), IDS, hidden=True)


def test_a_block_without_a_part_says_nothing_of_its_size() -> None:
    from rlprune.language.sizes import layer_sizes

    model = type_model("nemotron_h")
    space = rlprune.trace(model, IDS, drop=True)
    assert [sorted(layer) for layer in layer_sizes(model)] == [
        [], ["num_attention_heads", "num_key_value_heads"], ["intermediate_size"]
    ]  # fmt: skip
    assert "neither softmax attention nor" in space.protected["model.layers.0.mixer"]
