"""The fine-tune of language models: it learns, is deterministic, resumes, and refuses what cannot run."""

from __future__ import annotations

import copy
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.echo import FAMILIES, QUICK, Echo, Killed, pruned, same
from helpers.lm import tiny_lm
from rlprune.errors import ArtifactError, ConfigError, DataError
from rlprune.language.tuning import finetune as tuning
from rlprune.language.tuning import trainer as tuning_trainer
from rlprune.language.tuning.finetune import METHODS, learning_rate, tune
from rlprune.language.tuning.loss import TokenLoss, full_precision
from rlprune.language.tuning.trainer import share_batch

pytestmark = pytest.mark.usefixtures("short_collections")


# The fine-tune


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls_and_the_model_stays_plain(family: str, method: str) -> None:
    workload, model = Echo(family), pruned(family)
    names = list(model.state_dict())
    before = workload.evaluate_loss(model)
    lr = {"full": 3e-3, "spp": 6e-2}.get(method, 2e-2)  # half of SPP's factors begin at zero
    result = tune(workload, model, replace(QUICK, method=method, steps=25, lr=lr, distill=False), seed=0)
    assert result.steps == 25 and result.tokens == 25 * 4 * 12
    assert workload.evaluate_loss(model) < before - 0.2
    assert list(model.state_dict()) == names and not model.training
    if "tied" in family:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert all(p.grad is None for p in [*workload.model.parameters(), *model.parameters()])


def test_distillation_brings_the_student_to_the_teacher() -> None:
    workload, model = Echo(), tiny_lm("llama-mha-tied", seed=7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    whole = TokenLoss(model, workload.model, soft=1.0)
    before = float(whole(workload.rows).detach())
    tune(workload, model, replace(QUICK, method="full", lr=2e-3, steps=30), seed=0)
    assert float(whole(workload.rows).detach()) < 0.7 * before


def test_the_seed_decides_the_result_whatever_the_global_state() -> None:
    settings = replace(QUICK, steps=4)
    first, again, other = pruned(), pruned(), pruned()
    tune(Echo(), first, settings, seed=3)
    random.seed(1), np.random.seed(1), torch.manual_seed(999)
    kept = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    tune(Echo(), again, settings, seed=3)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == kept[:2]
    assert torch.equal(torch.get_rng_state(), kept[2])
    tune(Echo(), other, settings, seed=4)
    assert same(first, again)
    assert not same(first, other)


def test_accumulated_passes_are_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(QUICK, method="full", dropout=0.0, steps=3, batch_size=8, lr=1e-3)
    whole, parts = pruned(), pruned()
    tune(Echo(), whole, settings, seed=0)
    monkeypatch.setitem(tuning_trainer._TOKENS_AT_ONCE, "cpu", 24)
    assert share_batch(8, 12, torch.device("cpu")) == (2, 4)
    tune(Echo(), parts, settings, seed=0)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_no_steps_change_nothing() -> None:
    model = pruned()
    assert tune(Echo(), model, replace(QUICK, steps=0), seed=0).steps == 0
    assert same(model, pruned())


def test_weights_of_16_bits_are_trained_in_32() -> None:
    model = pruned().to(torch.bfloat16)
    for method in METHODS:
        before = copy.deepcopy(model)
        tune(Echo(), model, replace(QUICK, method=method, steps=3, distill=False), seed=0)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert not same(model, before)
    with full_precision(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}


# A killed run


@pytest.mark.parametrize(
    ("method", "kill_at"), [("lora", 1), ("lora", 4), ("lora", 7), ("full", 4), ("group", 4), ("spp", 4)]
)
def test_killed_and_resumed_is_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, kill_at: int
) -> None:
    settings = replace(QUICK, method=method, steps=7)
    whole = pruned()
    expected = tune(Echo(), whole, settings, seed=0, save_steps=2)
    calls = 0

    def dying(self: Any, input_ids: Tensor) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls > kill_at:
            raise Killed
        return {"loss": self.loss(input_ids)}

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tuning_trainer.Student, "forward", dying)
        if kill_at == 7:  # after the last step, before the merge
            patch.setattr(tuning.TuneResult, "__init__", _killed)
        tune(Echo(), pruned(), settings, seed=0, out=tmp_path / "state", save_steps=2)
    resumed, steps = pruned(), []
    result = tune(
        Echo(), resumed, settings, seed=0, out=tmp_path / "state", save_steps=2,
        progress=lambda phase, done, total, values: steps.append(done),
    )  # fmt: skip
    assert same(whole, resumed)
    assert result.loss == expected.loss


def _killed(*args: Any, **kwargs: Any) -> None:
    raise Killed


def test_a_checkpoint_written_halfway_is_ignored_and_a_foreign_one_refused(tmp_path: Path) -> None:
    settings = replace(QUICK, steps=4)
    whole, model = pruned(), pruned()
    tune(Echo(), whole, settings, seed=0)
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "model.safetensors").write_bytes(b"torn")
    tune(Echo(), model, settings, seed=0, out=tmp_path)
    assert same(whole, model)
    with pytest.raises(ArtifactError, match="other settings"):
        tune(Echo(), pruned(), replace(settings, rank=2), seed=0, out=tmp_path)


def test_a_diverged_run_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shown = pruned(), []
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    result = tune(
        Echo(), model, QUICK, seed=0, progress=lambda phase, done, total, values: shown.append(done)
    )
    assert result.loss != result.loss


# Errors


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ConfigError, match=r"finish.method: 'lora' needs the package peft.*rlprune\[language\]"
    ):
        tune(Echo(), pruned(), QUICK, seed=0)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ConfigError, match=r"accelerate.*rlprune\[language\]"):
        tune(Echo(), pruned(), replace(QUICK, method="full"), seed=0)


def test_wrong_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(QUICK)
    object.__setattr__(settings, "method", "loora")
    with pytest.raises(ConfigError, match="did you mean 'lora'"):
        tune(Echo(), pruned(), settings, seed=0)
    empty = Echo()
    empty.rows = empty.rows[:0]
    with pytest.raises(DataError, match="'train' is empty"):
        tune(empty, pruned(), QUICK, seed=0)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="multiple of 3"):
        share_batch(4, 12, torch.device("cpu"))


def test_the_learning_rate_fits_the_method() -> None:
    assert learning_rate(None, "full") < learning_rate(None, "lora")
    assert learning_rate(0.5, "spp") == 0.5
