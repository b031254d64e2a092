"""The training loop: schedule, distillation, determinism, resuming."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlprune.errors import ArtifactError, RlpruneError
from rlprune.recovery.finetune import DistillTargets, FitResult, Schedule, Watch, fit

INPUTS = torch.rand(64, 6, generator=torch.Generator().manual_seed(1))
TARGETS = (INPUTS[:, 0] > INPUTS[:, 1]).long()


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))


def batches(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    for index in torch.randperm(64, generator=generator).split(16):
        yield INPUTS[index] + 0.01 * torch.randn(16, 6, generator=generator), TARGETS[index]


def run(model: nn.Module, seed: int = 3, source=batches, **options) -> FitResult:
    own = {f.name: options.pop(f.name) for f in dataclasses.fields(Schedule) if f.name in options}
    watch = {f.name: options.pop(f.name) for f in dataclasses.fields(Watch) if f.name in options}
    return fit(
        model,
        source,
        F.cross_entropy,
        Schedule(**({"steps": 22, "lr": 0.05} | own)),
        generator=torch.Generator().manual_seed(seed),
        watch=Watch(**watch),
        **options,
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_it_learns_and_leaves_eval_mode() -> None:
    model = make_model()
    result = run(model, steps=240)
    assert result.steps == 240
    assert result.loss < 0.2
    assert not model.training
    assert (model(INPUTS).argmax(1) == TARGETS).float().mean() > 0.95


def test_the_seed_decides_the_result_whatever_the_global_state() -> None:
    first, again, other = make_model(), make_model(), make_model()
    run(first)
    torch.manual_seed(999)
    before = torch.get_rng_state()
    run(again)
    assert torch.equal(before, torch.get_rng_state())
    run(other, seed=4)
    assert same(first, again)
    assert not same(first, other)


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at", [1, 4, 5, 8, 13, 21])
@pytest.mark.parametrize("every_step", [True, False])
def test_killed_and_resumed_is_bit_equal(tmp_path: Path, kill_at: int, every_step: bool) -> None:
    whole = make_model()
    expected = run(whole)
    state = tmp_path / "state" / "fit.pt"
    count = 0

    def dying(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal count
        for batch in batches(generator):
            count += 1
            if count > kill_at:
                raise Killed
            yield batch

    seconds = 0.0 if every_step else 1e9
    with pytest.raises(Killed):
        run(make_model(), source=dying, checkpoint=state, save_seconds=seconds)
    assert state.is_file() == every_step
    resumed = make_model(seed=77)  # its weights come from the state
    if not every_step:
        resumed = make_model()
    result = run(resumed, checkpoint=state, save_seconds=seconds)
    assert same(whole, resumed)
    assert result.loss == expected.loss
    # Finished: a further call does nothing but load.
    third = make_model(seed=78)
    assert run(third, source=dying, checkpoint=state).steps == 22
    assert same(whole, third)


def test_a_foreign_or_broken_state_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "fit.pt"
    run(make_model(), checkpoint=state)
    with pytest.raises(ArtifactError, match="other settings"):
        run(make_model(), checkpoint=state, lr=0.01)
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="truncated"):
        run(make_model(), checkpoint=state)


def test_schedule_warms_up_and_ends_at_zero() -> None:
    schedule = Schedule(steps=100, lr=1.0, momentum=0.9, weight_decay=0.0, warmup=0.1)
    rates = [schedule.rate(i) for i in range(100)]
    assert max(rates) == rates[10] == 1.0
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[0] < 0.1
    assert 0 < rates[-1] < 0.001


def test_distillation_with_cached_logits_equals_the_teacher() -> None:
    teacher = make_model(seed=5).eval()
    teacher.requires_grad_(False)
    plain, module, cached = make_model(), make_model(), make_model()

    def with_logits(generator: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
        for inputs, targets in batches(generator):
            yield inputs, targets, teacher(inputs)

    run(plain)
    run(module, distill=DistillTargets(teacher, soft=0.5))
    run(cached, source=with_logits, distill=DistillTargets(soft=0.5))
    assert same(module, cached)
    assert not same(module, plain)
    hard = make_model()
    run(hard, distill=DistillTargets(teacher, soft=0.0))
    assert same(hard, plain)


def test_full_distillation_copies_the_teacher() -> None:
    teacher = make_model(seed=5).eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student[4].weight[0] += 1.0
    target = DistillTargets(teacher, soft=1.0)

    def distance(model: nn.Module) -> float:
        with torch.no_grad():
            return float(target.loss(model(INPUTS), teacher(INPUTS)))

    before = distance(student)
    assert distance(teacher) == pytest.approx(0.0, abs=1e-6)
    assert before > 0.1
    run(student, steps=200, distill=target, weight_decay=0.0)
    assert distance(student) < 0.3 * before


def test_temperature_scaling_matches_the_formula() -> None:
    outputs, logits = torch.randn(5, 3), torch.randn(5, 3)
    student, teacher = (outputs / 4).softmax(1), (logits / 4).softmax(1)
    expected = 16 * (teacher * (teacher / student).log()).sum(1).mean()
    assert DistillTargets(temperature=4.0).loss(outputs, logits) == pytest.approx(float(expected), rel=1e-4)


def test_no_weight_decay_on_biases_and_norms() -> None:
    model = make_model()
    for parameter in model.parameters():
        parameter.data.fill_(1.0)

    def zero_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.0 * outputs.sum()

    fit(model, batches, zero_loss, Schedule(5, 0.1, weight_decay=0.5))
    assert float(model[0].weight.detach().max()) < 0.99
    assert torch.equal(model[0].bias.data, torch.ones(16))
    assert torch.equal(model[1].weight.data, torch.ones(16))


def test_divergence_is_reported_and_stops_early() -> None:
    model = make_model()

    def slow(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, targets in batches(generator):
            yield inputs * float("nan"), targets

    result = run(model, source=slow, steps=5)
    assert result.loss != result.loss


def test_wrong_calls() -> None:
    with pytest.raises(RlpruneError, match="no batch"):
        run(make_model(), source=lambda generator: [])
    with pytest.raises(RlpruneError, match="third part"):
        run(make_model(), distill=DistillTargets())
    with pytest.raises(RlpruneError, match="at least one step"):
        run(make_model(), steps=0)
    with pytest.raises(RlpruneError, match="no parameters"):
        run(nn.ReLU())


def test_progress_ends_at_the_total() -> None:
    calls: list[tuple] = []
    run(make_model(), progress=lambda *values: calls.append(values), phase="dense training")
    phase, done, total, values = calls[-1]
    assert (phase, done, total) == ("dense training", 22, 22)
    assert values["loss"] > 0
