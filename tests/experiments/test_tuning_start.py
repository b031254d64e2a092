"""Where the final fine-tune starts: from the closed form, from statistics alone, or where a few steps say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.small import SMALL_DIGITS
from rlprune.cli.main import main
from rlprune.config import load_config
from rlprune.experiments import prepare_experiment, tuning_start
from rlprune.pruning.surgery import prune
from rlprune.recovery.batch_norm import arrivals, correct_statistics


@pytest.fixture(scope="module")
def experiment():
    return prepare_experiment(load_config("digits", [*SMALL_DIGITS, "finish.epochs=1", "threads=1"]))


def starting(experiment, start: str, **recovery: object):
    config = experiment.config
    changed = replace(
        config,
        finish=replace(config.finish, start=start),
        recovery=replace(config.recovery, **recovery),  # type: ignore[arg-type]
    )
    return replace(experiment, config=changed)


def plan_of(experiment):
    widths = experiment.space.project(np.ones(len(experiment.space.groups)), 0.4)
    return experiment.evaluator.plan(widths)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_statistics_alone_leave_the_weights_that_are_kept(experiment):
    plan = plan_of(experiment)
    recovered = experiment.evaluator.build(plan.widths)
    found, facts = tuning_start.tuning_start(starting(experiment, "statistics"), recovered, plan, 0)
    wanted = prune(experiment.workload.model, plan)
    images = list(experiment.workload.batches("calibration"))
    correct_statistics(wanted, plan, images, arrivals(experiment.workload.model, lambda: images))
    assert same(found, wanted) and not same(found, recovered)
    assert facts == {"start": "statistics"}


def test_by_default_nothing_is_chosen(experiment):
    plan = plan_of(experiment)
    recovered = experiment.evaluator.build(plan.widths)
    assert tuning_start.tuning_start(experiment, recovered, plan, 0) == (recovered, {})
    auto = starting(experiment, "auto", steps=("bn",))
    assert tuning_start.tuning_start(auto, recovered, plan, 0) == (recovered, {})
    assert tuning_start.tuning_start(starting(experiment, "auto"), recovered, None, 0) == (recovered, {})


@pytest.mark.parametrize("better", ["recovered", "statistics"])
def test_the_start_with_the_lower_validation_loss_is_taken(experiment, monkeypatch, better):
    plan = plan_of(experiment)
    recovered = experiment.evaluator.build(plan.widths)
    losses = {"recovered": 1.0, "statistics": 1.0} | {better: 0.5}
    monkeypatch.setattr(tuning_start, "_after_few_steps", lambda e, p, name, seed: losses[name])
    found, facts = tuning_start.tuning_start(starting(experiment, "auto"), recovered, plan, 0)
    assert facts == {"start": better, "start_losses": losses}
    assert (found is recovered) == (better == "recovered")


def test_trials_are_short_and_the_same_seed_gives_the_same_choice(experiment):
    plan, auto = plan_of(experiment), starting(experiment, "auto")
    assert tuning_start.trial_steps(auto) == 10
    first = tuning_start.tuning_start(auto, experiment.evaluator.build(plan.widths), plan, 0)[1]
    again = tuning_start.tuning_start(auto, experiment.evaluator.build(plan.widths), plan, 0)[1]
    assert first == again and set(first["start_losses"]) == {"recovered", "statistics"}


@pytest.mark.parametrize(
    ("config", "words", "says"),
    [
        ("digits", ["finish.start=best"], "finish.start"),
        ("digits", ["finish.start=auto", "recovery.steps=[bn]"], "recovery.steps has no closed form"),
        ("tiny_llama", ["finish.start=auto", "finish.steps=2"], "no batch-norm statistics"),
    ],
)
def test_what_cannot_hold_is_refused(config, words, says, capsys):
    assert main(["train", config, "--set", *words]) == 2
    assert says in capsys.readouterr().err
