"""Torch-Pruning as an independent oracle of the language models' groups, and the trap that it falls into."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import rlprune
from helpers.lm import VARIANTS, tiny_lm, tokens
from rlprune.language import families
from rlprune.pruning.space import PruningSpace

tp = pytest.importorskip("torch_pruning")
# GPT-2's Conv1D is no layer for it.
UNSEEN = {"gpt2"}


def tp_group(
    model: nn.Module, inputs: torch.Tensor, root: str, rows: list[int], **options: Any
) -> dict[tuple[str, str], set[int]]:
    """Torch-Pruning's own group from ``rows`` of a linear layer: {(layer, "out" or "in"): channels}."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(model, inputs, **options)
        group = graph.get_pruning_group(model.get_submodule(root), tp.prune_linear_out_channels, idxs=rows)
    found: dict[tuple[str, str], set[int]] = {}
    for item in group:
        if isinstance(item.dep.target.module, nn.Linear):
            side = "in" if "in_channels" in item.dep.handler.__name__ else "out"
            found[item.dep.target.name.split(" ")[0], side] = {int(i) for i in item.idxs}
    return found


def our_group(space: PruningSpace, group: int, units: list[int]) -> dict[tuple[str, str], set[int]]:
    """The same for units of one of our groups, weights of linear layers only."""
    numbers = {int(space.offsets[group]) + u for u in units}
    found = {}
    for cut in space.cuts:
        slots = space.axes[cut.axis].slots
        rows = {i for i, s in enumerate(slots.tolist()) if s in numbers}
        if rows and cut.tensor.endswith(".weight"):
            found[cut.tensor.removesuffix(".weight"), "in" if cut.consumer else "out"] = rows
    return found


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - UNSEEN))
def test_ffn_groups_are_those_of_torch_pruning(name: str) -> None:
    model = tiny_lm(name, attention="eager", num_hidden_layers=2)
    model.config.use_cache = False  # its tracing may not end otherwise
    space = rlprune.trace(model, tokens(8), verify=False)
    number = [i for i, g in enumerate(space.groups) if g.kind == "ffn"][-1]
    root = space.groups[number].members[0].module
    theirs = tp_group(model, tokens(8), root, [1, 5], output_transform=lambda o: o.logits)
    assert theirs == our_group(space, number, [1, 5])


class Lonely(nn.Module):
    """A stock Llama attention between two linear layers, without the rotary product: with it the search for a
    group does not end (torch-pruning 1.6.1)."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.before = nn.Linear(48, 48)
        self.attn = tiny_lm("llama", attention=attention).model.layers[0].self_attn
        self.after = nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> Any:
        return self.after(self.attn(self.before(x), position_embeddings=(None, None), attention_mask=None)[0])


@pytest.fixture
def without_rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))


def our_head(head: int) -> dict[tuple[str, str], set[int]]:
    space = rlprune.trace(tiny_lm("llama"), tokens(8), verify=False)
    found = our_group(space, 0, [head])
    return {
        (n.removeprefix("model.layers.0.self_").removeprefix("attn."), s): r for (n, s), r in found.items()
    }


def named(found: dict[tuple[str, str], set[int]]) -> dict[tuple[str, str], set[int]]:
    return {(n.removeprefix("attn."), s): rows for (n, s), rows in found.items()}


@pytest.mark.usefixtures("without_rotary")
def test_grouped_query_heads_agree_from_an_eager_query_root() -> None:
    theirs = tp_group(Lonely("eager"), torch.randn(1, 6, 48), "attn.q_proj", list(range(16, 32)))
    assert named(theirs) == our_head(1)


@pytest.mark.usefixtures("without_rotary")
def test_grouped_query_heads_are_mapped_wrongly_under_sdpa() -> None:
    """Two query heads (of 8) share a key-value head: the second one is read by queries 16 to 31, not by 8 to 15."""
    theirs = named(tp_group(Lonely("sdpa"), torch.randn(1, 6, 48), "attn.k_proj", list(range(8, 16))))
    assert theirs["q_proj", "out"] == theirs["o_proj", "in"] == set(range(8, 16))
    ours = our_head(1)
    assert ours["k_proj", "out"] == set(range(8, 16))
    assert ours["q_proj", "out"] == ours["o_proj", "in"] == set(range(16, 32))
    # Which of the two is right: zero the value rows of that head, and see which output columns go silent.
    attention = Lonely("sdpa").attn.double()
    seen: list[torch.Tensor] = []
    attention.o_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        attention.v_proj.weight[8:16] = 0.0
        x = torch.randn(1, 6, 48, dtype=torch.float64)
        attention(x, position_embeddings=(None, None), attention_mask=None)
    silent = {int(i) for i in (seen[0].abs().amax(dim=(0, 1)) == 0).nonzero()}
    assert silent == ours["o_proj", "in"] != theirs["o_proj", "in"]


@pytest.mark.usefixtures("without_rotary")
def test_a_key_root_under_eager_attention_gives_only_itself() -> None:
    theirs = tp_group(Lonely("eager"), torch.randn(1, 6, 48), "attn.k_proj", list(range(8, 16)))
    assert set(named(theirs)) == {("k_proj", "out")}


@pytest.mark.parametrize("name", sorted(UNSEEN))
def test_what_the_oracle_cannot_follow(name: str) -> None:
    model = tiny_lm(name, attention="eager", num_hidden_layers=1)
    model.config.use_cache = False
    root = families.blocks_of(model)[0].up[0]
    with pytest.raises(ValueError, match="not in the dependency graph"):
        tp_group(model, tokens(8), root, [1], output_transform=lambda o: o.logits)
