"""What is said about a language model: compressed tables, costs with their denominators, decoding speed."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.lm import tiny_lm
from rlprune.api import trace
from rlprune.language import describe as figures
from rlprune.pruning.plan import make_plan
from rlprune.pruning.surgery import prune

IDS = torch.zeros(1, 16, dtype=torch.long)


@given(st.sets(st.integers(0, 40)))
def test_ranges_name_each_number_once(numbers: set[int]) -> None:
    text = figures.ranges(numbers)
    read: list[int] = []
    for part in text.split(",") if numbers else []:
        first, _, last = part.partition("-")
        read += range(int(first), int(last or first) + 1)
    assert read == sorted(numbers)
    assert numbers or text == "-"


def test_equal_blocks_take_one_line_a_kind() -> None:
    config: dict[str, Any] = {"num_hidden_layers": 30}
    space = trace(tiny_lm("llama", **config), IDS, verify=False)
    lines = figures.group_lines(space)
    assert [line.split()[:4] for line in lines[1:]] == [
        ["model.layers.*.self_attn", "attention", "0-29", "3"],
        ["model.layers.*.mlp", "ffn", "0-29", "40"],
    ]
    shares = [float(line.split()[-1].rstrip("%")) / 100 for line in lines[1:]]
    # All that heads and neurons hold, the norms and embeddings left out.
    model = tiny_lm("llama", **config)
    for share, part in zip(shares, ("self_attn", "mlp"), strict=True):
        inside = sum(p.numel() for name, p in model.named_parameters() if part in name)
        assert share == pytest.approx(inside / sum(p.numel() for p in model.parameters()), abs=6e-4)


def test_unequal_blocks_take_lines_of_their_own() -> None:
    model = tiny_lm("llama", num_hidden_layers=6)
    space = trace(model, IDS, ignore=("model.layers.2.mlp",), verify=False)
    lines = figures.group_lines(space)
    assert [line.split()[2] for line in lines[1:]] == ["0-5", "0-1,3-5"]
    protected = figures.protected_lines(space.protected)
    assert any(line.startswith("protected: model.layers.*.mlp: ignored") for line in protected)
    widths = space.widths.copy()
    widths[[g.name == "model.layers.4.mlp" for g in space.groups]] = 16
    slim = prune(
        model, make_plan(space, importance=[np.arange(g.width) for g in space.groups], widths=widths)
    )
    again = figures.group_lines(trace(slim, IDS, verify=False))
    assert [line.split()[2:4] for line in again[1:]] == [["0-5", "3"], ["0-3,5", "40"], ["4", "16"]]


@pytest.mark.parametrize("name", ["llama", "llama-mha-tied", "gpt2", "opt"])
def test_the_shares_add_up(name: str) -> None:
    model: Any = tiny_lm(name)
    text = "\n".join(figures.cost_lines(trace(model, IDS, verify=False), model))
    total = sum(p.numel() for p in model.parameters())
    assert f"params: dense {total:,} (all of the model, tied ones once)" in text
    assert "macs: dense" in text and "(one sequence of 16 tokens)" in text
    found = re.search(r"embeddings ([\d,]+) .* blocks ([\d,]+) .* other ([\d,]+)", text)
    assert found is not None
    counts = [int(part.replace(",", "")) for part in found.groups()]
    assert sum(counts) == total
    tables = {id(p): p.numel() for p in (model.get_input_embeddings().weight, model.lm_head.weight)}
    assert counts[0] == sum(tables.values())
    assert "at the context length of 128 tokens" in text


def test_a_model_on_meta_gives_the_same_lines() -> None:
    with torch.device("meta"):
        empty = type(tiny_lm("llama-mha-tied"))(tiny_lm("llama-mha-tied").config)
    texts = []
    for model in (tiny_lm("llama-mha-tied"), empty.eval()):
        space = trace(model, IDS)
        texts.append([*figures.group_lines(space), *figures.cost_lines(space, model)])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("context", [None, 8, 16, 128, 8192])
def test_decoding_stays_inside_the_context(context: int | None) -> None:
    for length in (1, 8, 128, 4096):
        prompt, tokens, rounds = figures.decoding_plan(length, context)
        assert min(prompt, tokens, rounds) >= 1
        assert prompt <= length
        assert prompt + tokens * (rounds + 1) <= (context or 2048)


def test_decoding_speed_decodes_greedily() -> None:
    model: Any = tiny_lm("llama")
    ids = torch.tensor([[5, 9, 2]])
    decoder = figures._Decoder(model, ids)
    with torch.no_grad():
        wanted = model.generate(ids, max_new_tokens=7, do_sample=False)[0, 3:]
    got = [int(decoder._next)]
    for _ in range(6):
        assert decoder.decode(1) > 0
        got.append(int(decoder._next))
    assert got == wanted.tolist()
    speeds = figures.decoding_speed({"dense": model, "pruned": model}, ids, tokens=2, rounds=3)
    assert set(speeds) == {"dense", "pruned"} and min(speeds.values()) > 0


def test_comparison_shows_the_ratio() -> None:
    lines = figures.comparison([("params", 200.0, 50.0, ",.0f"), ("kv", 0.0, 0.0, ",.1f")])
    assert lines[1].split() == ["params", "200", "50", "0.2500"]
    assert lines[2].split() == ["kv", "0.0", "0.0", "-"]
