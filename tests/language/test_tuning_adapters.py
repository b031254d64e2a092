"""Adapters of the fine-tune: put on, their formulas, merged, taken off after an error."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import rlprune
from helpers.echo import FAMILIES, QUICK, Killed, logits, pruned, same
from helpers.lm import tiny_lm, tokens
from helpers.pruned_lm import plan_of
from rlprune.language.tuning.finetune import METHODS
from rlprune.language.tuning.peft import GROUP_COLUMNS, GroupScale, RowColumn, attached, target_layers


@pytest.mark.parametrize("method", ["lora", "group", "spp"])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt_neox", "falcon-mqa"])
def test_the_merged_model_is_plain_and_equals_the_adapted_one(family: str, method: str) -> None:
    model, ids = tiny_lm(family), tokens(10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds, flags = [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    own = set(vars(model))
    with attached(model, replace(QUICK, method=method, rank=3)) as handle:
        model.eval()  # the dropout of new adapters trains
        torch.testing.assert_close(logits(model, ids), logits(tiny_lm(family), ids))  # starts as it was
        learned = [p for p in model.parameters() if p.requires_grad]
        assert handle.trained == sum(p.numel() for p in learned) > 0
        with torch.no_grad():
            for p in learned:
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        adapted = logits(model, ids)
    torch.testing.assert_close(logits(model, ids), adapted, rtol=1e-5, atol=1e-5)
    assert (adapted - logits(tiny_lm(family), ids)).abs().max() > 1e-2
    after = model.state_dict()
    assert list(after) == list(before)
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    assert [type(m) for m in model.modules()] == kinds
    assert [p.requires_grad for p in model.parameters()] == flags
    assert set(vars(model)) == own
    changed = {n.removesuffix(".weight") for n in after if not torch.equal(after[n], before[n])}
    assert changed == set(target_layers(model))


def test_the_layers_that_are_adapted() -> None:
    llama = {name.split(".")[-1] for name in target_layers(tiny_lm("llama-mha-tied"))}
    assert llama == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {n.split(".")[-1] for n in target_layers(tiny_lm("gpt2"))} == {"c_attn", "c_proj", "c_fc"}
    assert {n.split(".")[-1] for n in target_layers(tiny_lm("phi3"))} == {
        "qkv_proj", "o_proj", "gate_up_proj", "down_proj"
    }  # fmt: skip
    assert not [n for n in target_layers(tiny_lm("opt-project")) if "project" in n]


def test_queries_and_values_alone() -> None:
    model, before = tiny_lm("llama"), dict(tiny_lm("llama").state_dict())
    with attached(model, replace(QUICK, method="lora", adapters="query_value")):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
    changed = {n.split(".")[-2] for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert changed == {"q_proj", "v_proj"}
    # Where they are fused with the keys, the layer that holds them.
    for family, layer in {"gpt2": "c_attn", "phi3": "qkv_proj"}.items():
        assert {n.split(".")[-1] for n in target_layers(tiny_lm(family), "query_value")} == {layer}


def test_dropped_layers_are_left_out() -> None:
    dense = tiny_lm("llama-mha-tied")
    space = rlprune.trace(dense, tokens(), drop=True, verify=False)
    widths = np.where([g.name == "model.layers.1.mlp" for g in space.groups], 0, space.widths)
    model = rlprune.prune(dense, plan_of(space, widths))
    for method in ("lora", "group", "spp"):
        with attached(model, replace(QUICK, method=method)):
            assert not [n for n in target_layers(model) if n.startswith("model.layers.1.mlp")]


def test_the_adapters_are_taken_off_after_an_error() -> None:
    for method in METHODS:
        model = pruned()
        with pytest.raises(Killed), attached(model, replace(QUICK, method=method)):
            raise Killed
        assert same(model, pruned())
        assert [type(m) for m in model.modules()] == [type(m) for m in pruned().modules()]


def test_group_scales_and_row_column_factors_are_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns, rank = 7, GROUP_COLUMNS + 5, 3
    weight = torch.randn(rows, columns, generator=generator)
    weight[2, 4] = 0.0
    group, factors = GroupScale(rows, columns, rank, 6.0, False), RowColumn(rows, columns, rank, 6.0, False)
    for module in (group, factors):
        for parameter in module.parameters():
            nn.init.normal_(parameter, generator=generator)
    scaled, multiplied = group(weight).detach(), factors(weight).detach()
    runs = [0, 0, 0, 1, 1, 2, 2]
    for i in range(rows):
        for j in range(columns):
            low = 2.0 * float((group.b[i] @ group.a[:, j]).detach())
            wanted = float(weight[i, j]) * (1 + float(group.scale.detach()[i, j // GROUP_COLUMNS])) + low
            assert float(scaled[i, j]) == pytest.approx(wanted, abs=1e-4)
            factor = float((factors.row[i, 0] * factors.column[runs[i], j]).detach())
            assert float(multiplied[i, j]) == pytest.approx(
                float(weight[i, j]) * (1 + 2.0 * factor), abs=1e-4
            )
    assert float(multiplied[2, 4]) == 0.0
    turned = RowColumn(rows, columns, rank, 6.0, True)
    turned.load_state_dict(factors.state_dict())
    torch.testing.assert_close(turned(weight.T.contiguous()), multiplied.T)
