"""Registered recovery steps: where they run, what they get, and what is refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rlprune
from helpers.nets import Residual
from helpers.registries import forgotten
from helpers.workloads import Images
from rlprune.cli import main as cli
from rlprune.config.config import Config
from rlprune.config.training import RecoveryConfig
from rlprune.errors import ConfigError
from rlprune.evaluation.evaluator import Evaluator


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with forgotten():
        yield


def evaluator_of(*steps: str) -> Evaluator:
    torch.manual_seed(0)
    return Evaluator(Images(Residual().eval()), importance="l2", recovery=RecoveryConfig(steps=steps))


def test_steps_run_in_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each notes what the batch norms say when it runs: only what comes after `bn` sees them recomputed."""
    seen: dict[str, list[float]] = {}

    def noting(name: str, after: str | None) -> None:
        def prepare(context: rlprune.RecoveryContext) -> Any:
            assert context.space is not None and len(context.importance or ()) == len(context.space.groups)

            def repair(slim: nn.Module, plan: rlprune.Plan) -> None:
                seen.setdefault(name, []).append(_mean(slim))

            return repair

        rlprune.recovery_step("notes", after=after, name=name)(prepare)

    for name, after in (("late", "finetune"), ("second", "bn"), ("third", "bn"), ("first", None)):
        noting(name, after)
    steps = RecoveryConfig(steps=("third", "bn", "late", "second", "first")).steps
    assert steps == ("first", "bn", "second", "third", "late")
    evaluator = evaluator_of(*steps)
    model = evaluator.build(evaluator.space.widths // 2)
    assert list(seen) == ["first", "second", "third", "late"]
    assert seen["first"] != seen["second"] == seen["third"] == seen["late"] == [_mean(model)]


def _mean(model: nn.Module) -> float:
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    return float(sum(norm.running_mean.sum() for norm in norms if norm.running_mean is not None))


def test_a_step_is_prepared_once_and_may_change_every_tensor() -> None:
    made: list[rlprune.RecoveryContext] = []

    @rlprune.recovery_step("adds one to every tensor")
    def shifted(context: rlprune.RecoveryContext) -> Any:
        made.append(context)

        def repair(slim: nn.Module, plan: rlprune.Plan) -> None:
            with torch.no_grad():
                for tensor in slim.parameters():
                    tensor.add_(1)

        return repair

    evaluator, plain = evaluator_of("shifted"), evaluator_of("none")
    before = {n: t.clone() for n, t in evaluator.workload.model.state_dict().items()}
    halves = evaluator.space.widths // 2
    for scoring in (False, True, True):
        ours, theirs = (e.build(halves, scoring=scoring) for e in (evaluator, plain))
        pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
        assert all(torch.equal(a, b + 1) for a, b in pairs)
    assert len(made) == 1 and made[0].model is evaluator.workload.model
    assert sum(len(x) for x, _ in made[0].batches()) == evaluator.workload.size("calibration")
    assert all(torch.equal(before[n], t) for n, t in evaluator.workload.model.state_dict().items())


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"recovery_step 'odd': must return a function repair\(slim, plan\), got NoneType"),
        (lambda slim, plan: 1 / 0, "recovery_step 'odd': ZeroDivisionError: division by zero"),
    ],
)
def test_what_a_step_does_wrong_names_it(returned: object, message: str) -> None:
    rlprune.recovery_step("odd", name="odd")(lambda context: returned)
    with pytest.raises(ConfigError, match=message):
        evaluator_of("odd").evaluate(np.array([2] * len(evaluator_of().space.groups)))


def test_a_step_of_another_wing_is_refused_before_anything_is_trained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rlprune.recovery_step("for text", wing="language", name="texty")(lambda context: lambda slim, plan: None)
    rlprune.recovery_step("for all", name="any_step")(lambda context: lambda slim, plan: None)
    words = ["prune", "digits", "--rule", "uniform", "--budget", "50%", "--set", "recovery.steps=[texty]"]
    assert cli.main(words) == 2
    line = (
        "recovery.steps: 'texty' is for language models only; allowed here: none, reconstruct, bn, finetune"
    )
    assert capsys.readouterr().err == f"rlprune: error: {line}, any_step\n"


def test_its_settings_may_be_given() -> None:
    """A step of somebody's may read the ridge; without one, nothing would."""
    from rlprune.experiments.usage import check_usage

    rlprune.recovery_step("reads the ridge", name="ridged")(lambda context: lambda slim, plan: None)
    given = {"model": {"name": "cifar_resnet20"}, "data": {"name": "digits"}}
    settings = ["recovery.steps=[bn]", "recovery.ridge=0.1", "prune.importance=l2"]
    config = Config.from_dict(given).override(settings)
    with pytest.raises(ConfigError, match=r"recovery\.ridge: recovery\.steps is without reconstruct"):
        check_usage(config, "train")
    check_usage(config.override(["recovery.steps=[bn,ridged]"]), "train")
