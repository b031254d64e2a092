"""The fine-tune of language models: losses, adapters and their merge, determinism, resuming, stages."""

from __future__ import annotations

import copy
import gc
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lm import VOCABULARY, tiny_lm, tokens
from torch import Tensor, nn

from rlprune import tuning, tuning_trainer
from rlprune.config import FinishConfig
from rlprune.errors import ArtifactError, ConfigError, DataError, RlpruneError
from rlprune.pruning.language_training import CHUNK_TOKENS, TokenLoss, full_precision, train_language
from rlprune.tuning import METHODS, learning_rate, tune
from rlprune.tuning_adapters import GROUP_COLUMNS, GroupScale, RowColumn, attached, target_layers
from rlprune.tuning_trainer import share_batch
from rlprune.workloads.base import Batch, Workload

FAMILIES = ["llama-mha-tied", "gpt2", "phi3", "opt"]
QUICK = FinishConfig(method="lora", steps=12, batch_size=4, lr=5e-3, dropout=0.1)


@pytest.fixture(autouse=True, scope="module")
def _short_collections() -> Iterator[None]:
    """The Trainer collects garbage at every start: what the imports left need not be looked at each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Echo(Workload):
    """Sequences in which every token comes twice: half of the tokens can be learned."""

    language = True
    metric_name = "perplexity"
    name = "echo"

    def __init__(self, family: str = "llama-mha-tied", length: int = 12) -> None:
        self.model = tiny_lm(family, seed=7)
        self.example_inputs = tokens(length)
        drawn = torch.randint(2, 30, (48, length // 2), generator=torch.Generator().manual_seed(3))
        self.rows = drawn.repeat_interleave(2, dim=1)

    def batches(self, split: str, limit: int | None = None) -> Iterator[Batch]:
        for rows in self.rows[:limit].split(8):
            yield rows, rows

    def evaluate_loss(self, model: nn.Module) -> float:
        with torch.no_grad():
            return float(model(self.rows, labels=self.rows).loss)

    def train_batches(self, generator: torch.Generator, batch_size: int | None = None) -> Iterator[Batch]:
        order = torch.randperm(len(self.rows), generator=generator)
        for index in order.split(batch_size or 8):
            yield self.rows[index], self.rows[index]


class Killed(Exception):
    pass


def pruned(family: str = "llama-mha-tied") -> nn.Module:
    """A student: some other random model of the family, as if it had been cut."""
    return tiny_lm(family, seed=1)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(m == n and torch.equal(x, y) for (m, x), (n, y) in pairs)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


# The loss


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_neox", "bloom", "cohere", "granite", "opt-project"])
def test_the_loss_is_that_of_transformers(family: str) -> None:
    model, ids = tiny_lm(family), tokens(12, batch=3)
    expected = model(ids, labels=ids).loss
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = TokenLoss(model)(ids)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-5)


def test_the_distillation_is_the_formula_and_leaves_the_teacher_alone() -> None:
    student, teacher = pruned(), tiny_lm("llama-mha-tied", seed=2)
    teacher.train()
    ids, t, soft = tokens(40, batch=9), 3.0, 0.6  # 351 tokens: two chunks
    loss = TokenLoss(student, teacher, t, soft)(ids)
    loss.backward()
    s, d = student(ids).logits[:, :-1].flatten(0, 1), logits(teacher, ids)[:, :-1].flatten(0, 1)
    hard = F.cross_entropy(s, ids[:, 1:].flatten())
    p, q = (d / t).softmax(-1), (s / t).softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean()
    assert float(loss.detach()) == pytest.approx(
        float(((1 - soft) * hard + soft * t * t * kl).detach()), rel=1e-4
    )
    assert all(p.grad is None for p in teacher.parameters())
    assert all(m.training for m in teacher.modules())


def test_logits_exist_for_a_chunk_at_a_time() -> None:
    model, seen = tiny_lm("llama-mha-tied"), []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: seen.append(out.numel() // VOCABULARY))
    TokenLoss(model, tiny_lm("llama-mha-tied"))(tokens(101, batch=8)).backward()
    assert max(seen) == CHUNK_TOKENS
    assert len(seen) >= 2 * 4  # four chunks, each made again in the backward pass


def test_a_model_that_cannot_be_split_is_run_whole() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(20, 8), nn.Linear(8, 20)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.embed(ids))

    model, ids = Plain(), torch.randint(20, (3, 9))
    expected = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(TokenLoss(model)(ids).detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    with pytest.raises(RlpruneError, match="no next token"):
        TokenLoss(model)(ids[:, :1])


# The adapters


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


def test_dropped_layers_are_left_out() -> None:
    model = tiny_lm("llama-mha-tied")
    for name in ("gate_proj", "up_proj"):
        getattr(model.model.layers[1].mlp, name).weight.data = torch.empty(0, 32)
    model.model.layers[1].mlp.down_proj.weight.data = torch.empty(32, 0)
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


# The fine-tune


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls_and_the_model_stays_plain(family: str, method: str) -> None:
    workload, model = Echo(family), pruned(family)
    names = list(model.state_dict())
    before = workload.evaluate_loss(model)
    lr = 3e-3 if method == "full" else 2e-2
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


# The short recovery


def test_the_loop_of_the_recovery_learns_and_repeats() -> None:
    workload = Echo()
    batches = list(workload.batches("train"))
    first, again = pruned("gpt2"), pruned("gpt2")  # GPT-2 has dropout
    before = workload.evaluate_loss(first)
    result = train_language(first, batches, steps=20, lr=3e-3, seed=1)
    torch.manual_seed(5)
    kept = torch.get_rng_state()
    train_language(again, batches, steps=20, lr=3e-3, seed=1)
    assert torch.equal(kept, torch.get_rng_state())
    assert same(first, again) and not first.training and result.steps == 20
    assert workload.evaluate_loss(first) < before - 0.2
    with pytest.raises(RlpruneError, match="no batch"):
        train_language(first, [], steps=1)
