"""One number of neurons for all blocks: within the budget, the largest that fits, and plain for other tools."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import rlprune
from helpers.lm import tiny_lm, tokens
from helpers.lm_folder import VOCABULARY, write_config, write_folder
from rlprune.cli import main as cli
from rlprune.errors import BudgetError
from rlprune.language.files.uniform import equal_widths, plain_obstacle


@functools.cache
def space_of(name: str = "llama", round_to: int = 1, **options: Any) -> rlprune.PruningSpace:
    model = tiny_lm(name, num_hidden_layers=4) if name == "llama" else tiny_lm(name)
    return rlprune.trace(model, tokens(), verify=False, round_to=round_to, **({"drop": True} | options))


def neurons(space: rlprune.PruningSpace, dropped: set[int]) -> np.ndarray:
    return np.array([g.kind == "ffn" and g.block not in dropped for g in space.groups])


@given(
    step=st.sampled_from([1, 3, 8, 16]),
    dropped=st.sets(st.integers(0, 3), max_size=3),
    metric=st.sampled_from(["params", "macs", "block_params"]),
    budget=st.floats(0.05, 1.0),
    hidden=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_the_largest_equal_widths_within_the_budget(
    step: int, dropped: set[int], metric: str, budget: float, hidden: bool
) -> None:
    space = space_of(round_to=step, hidden=hidden)
    kept, low = neurons(space, dropped), space.feasible(metric)[0]
    assume(budget * space.dense_cost(metric) >= low)
    base = np.where([g.block in dropped for g in space.groups], 0, space.widths)
    # Every number of neurons that is allowed, tried one after the other.
    allowed = sorted({*range(step, 41, step), 40})
    costs = {n: space.cost(np.where(kept, n, base), metric) for n in allowed}
    fitting = [n for n in allowed if costs[n] <= budget * space.dense_cost(metric)]
    if not fitting:
        with pytest.raises(BudgetError, match="more dropped blocks save more"):
            equal_widths(space, budget, metric, sorted(dropped))
        return
    widths = equal_widths(space, budget, metric, sorted(dropped))
    assert widths.dtype == np.int64
    assert set(widths[kept]) == {max(fitting)}
    assert np.array_equal(widths[~kept], base[~kept]), "heads and hidden size stay, dropped blocks go whole"


def test_budgets_that_equal_widths_do_not_reach() -> None:
    space = space_of()
    low = space.cost(np.where(neurons(space, set()), 1, space.widths), "block_params")
    with pytest.raises(
        BudgetError, match=f"feasible: {low:.6g} to .* 0 blocks dropped|0 blocks dropped; feas"
    ):
        equal_widths(space, 0.2, "block_params")
    with pytest.raises(BudgetError, match="below what equal widths reach"):
        equal_widths(space, 0.5, "kv_cache")  # neurons hold no cache
    assert set(equal_widths(space, 0.5, "kv_cache", [0, 3])[neurons(space, {0, 3})]) == {40}
    with pytest.raises(BudgetError, match="not a budget"):
        equal_widths(space, 1.5, "params")


def test_spaces_whose_blocks_cannot_be_alike() -> None:
    with pytest.raises(BudgetError, match=r"layers\.1\.self_attn' may not be dropped; set prune\.drop=true"):
        equal_widths(space_of(drop=False), 0.9, "params", [1])
    for block in (1, 3):  # the last one has no group that would show that it exists
        space = space_of(ignore=(f"model.layers.{block}.mlp",))
        with pytest.raises(BudgetError, match=rf"layers\.{block}\.mlp' stays as it is \(ignored"):
            equal_widths(space, 0.9, "params")
    space = space_of(ignore=("model.layers.1.self_attn",))
    assert equal_widths(space, 0.9, "params").shape == (7,)
    with pytest.raises(BudgetError, match=r"layers\.1\.self_attn' stays as it is"):
        equal_widths(space, 0.9, "params", [1])
    with pytest.raises(BudgetError, match="no block 4"):
        equal_widths(space_of(), 0.9, "params", [4])
    with pytest.raises(BudgetError, match="no block with a feed-forward part"):
        equal_widths(space_of(), 0.9, "params", range(4))


@pytest.mark.parametrize(
    ("name", "dropped", "obstacle"),
    [
        ("gpt2", (), ""),
        ("opt", (), ""),
        ("qwen2", (1,), ""),
        ("opt", (1,), "leaves the bias of"),
        ("bloom", (), "4h"),
    ],
)
def test_obstacles_are_told(name: str, dropped: tuple[int, ...], obstacle: str) -> None:
    space = space_of(name)
    widths = equal_widths(space, 0.8, "block_params", dropped)
    kept = tuple(np.arange(w) for w in widths)
    slim = rlprune.prune(tiny_lm(name), rlprune.Plan(space, widths, kept))
    found = plain_obstacle(slim)
    assert bool(found) == bool(obstacle) and (obstacle in found or name == "bloom")


# Through the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("same") / "model", num_hidden_layers=4)


@pytest.mark.parametrize("drop", [None, 1, 2])
def test_from_the_command_line_to_plain_transformers(
    drop: int | None, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = write_config(tmp_path / "tiny.yaml", folder)
    words = ["prune", str(config), "--same-widths", "--budget", "70%", "--out", str(tmp_path / "pruned")]
    if drop is not None:
        words += ["--drop-blocks", str(drop), "--set", "prune.drop=true", "prune.round_to=4"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "\nuniform " in text and "\nsame_widths " in text and "no plain" not in text
    origin = json.loads((tmp_path / "pruned" / "plan.json").read_text())["origin"]
    dropped = origin["dropped_blocks"]
    assert origin["method"] == "same_widths" and len(dropped) == (drop or 0)
    assert f"blocks dropped: {', '.join(map(str, dropped)) or 'none'}" in text

    assert cli.main(["export", str(tmp_path / "pruned"), "--to", "hf", "--out", str(tmp_path / "plain")]) == 0
    assert not {"auto_map", "per_layer_config"} & set(
        json.loads((tmp_path / "plain/config.json").read_text())
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.config.num_hidden_layers == 4 - (drop or 0)
    slim = rlprune.load(tmp_path / "pruned")
    ids = torch.randint(VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, slim(ids).logits)
    dense = AutoModelForCausalLM.from_pretrained(folder)
    count = [sum(p.numel() for p in m.parameters()) for m in (plain, dense)]
    assert count[0] <= 0.7 * count[1]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "plain")) == VOCABULARY
    if dropped:
        assert dropped == least_changing(dense, drop or 0, config)


def least_changing(model: Any, count: int, config: Path) -> list[int]:
    """The blocks whose input and output are most alike on the calibration split, by the model's own hidden states."""
    from rlprune.config.config import load_config
    from rlprune.experiments.build import build_workload

    states: list[list[torch.Tensor]] = []
    handles = [
        layer.register_forward_hook(
            lambda m, i, o: states[-1].append((i[0], o if torch.is_tensor(o) else o[0]))
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        for ids, _ in build_workload(load_config(str(config))).batches("calibration"):
            states.append([])
            model(ids)
    for handle in handles:
        handle.remove()
    cosines = [
        torch.cat([torch.cosine_similarity(a, b, dim=-1).flatten() for a, b in layer]).mean()
        for layer in zip(*states, strict=True)
    ]
    return sorted(np.argsort([-float(c) for c in cosines])[:count].tolist())


def test_wrong_options(place: Path, folder: Path, refused: Any) -> None:
    write_config(place / "tiny.yaml", folder)

    def wrong(*words: str) -> str:
        return str(refused("prune", "tiny.yaml", *words, "--out", "pruned"))

    assert "required: --rule NAME, --same-widths" in wrong()
    assert "--rule: not together with --same-widths" in wrong("--same-widths", "--rule", "uniform")
    assert "--stages: not together" in wrong("--same-widths", "--stages", "2")
    assert "--steps: not together" in wrong("--same-widths", "--steps", "0")
    assert "--drop-blocks: only with --same-widths" in wrong("--rule", "uniform", "--drop-blocks", "1")
    assert "prune.drop=true" in wrong("--same-widths", "--drop-blocks", "1")
    assert "--drop-blocks: must be a whole number" in wrong("--same-widths", "--drop-blocks", "-1")
    drop = ("--set", "prune.drop=true", "--same-widths", "--drop-blocks")
    assert "4 blocks, 4 leave none; allowed: 0 to 3" in wrong(*drop, "4")
    assert "below what equal widths reach with 1 blocks" in wrong(*drop, "1", "--budget", "35%")
    assert "language models only" in refused("prune", "digits", "--same-widths", "--out", "pruned")
