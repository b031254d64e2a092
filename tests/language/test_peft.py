"""PEFT on pruned language models with unequal widths and dropped parts; wrapped models are refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rlprune
from helpers.lm import tiny_lm, tokens
from helpers.pruned_lm import error_of, logits, plan_of, pruned
from helpers.transformers_quiet import quiet_transformers
from rlprune.errors import GraphError

peft = pytest.importorskip("peft")
MERGE = "merge first: model = model.merge_and_unload()"


def trained(model: Any, **settings: Any) -> tuple[Any, list[float]]:
    """A LoRA around a model after four steps on one batch, and the losses."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", **settings))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(4):
        ids = tokens(16, 4)
        loss = wrapped(input_ids=ids, labels=ids).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return wrapped, losses


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3"])
def test_lora_trains_merges_and_saves(name: str, tmp_path: Path) -> None:
    slim, plan = pruned(name, 3)
    folder = rlprune.save(slim, plan, tmp_path / "a")
    model: Any = rlprune.load(folder)
    sizes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    with quiet_transformers():
        wrapped, losses = trained(model, task_type="CAUSAL_LM")
        assert losses[-1] < losses[0]
        with torch.no_grad():
            wanted = wrapped.eval()(input_ids=tokens(10, 2)).logits
        merged = wrapped.merge_and_unload()
        assert {n: tuple(p.shape) for n, p in merged.named_parameters()} == sizes
        merged.save_pretrained(tmp_path / "b")
    found = logits(rlprune.load(tmp_path / "b"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, logits(slim))


@pytest.mark.parametrize("how", ["wrapped", "injected"])
def test_a_wrapped_model_is_refused(how: str, tmp_path: Path) -> None:
    dense: Any = tiny_lm("llama")
    space = rlprune.trace(dense, tokens(), verify=False)
    plan = plan_of(space, space.widths // 2 + 1)
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    if how == "wrapped":
        model: Any = peft.get_peft_model(dense, config)
    else:
        model = peft.inject_adapter_in_model(config, dense)

    class Mine(rlprune.Workload):
        def __init__(self) -> None:
            self.model, self.example_inputs = model, tokens()

        def batches(self, split: str, limit: int | None = None) -> Any:
            yield tokens(), tokens()

    for action in (
        lambda: rlprune.trace(model, tokens()),
        lambda: rlprune.prune(model, plan),
        lambda: rlprune.save(model, plan, tmp_path / "a"),
        lambda: Mine().adapter,
    ):
        assert MERGE in error_of(action, GraphError)
    if how == "wrapped":
        assert rlprune.trace(model.merge_and_unload(), tokens()).groups
