"""Which plan wins: the best score, or the best on validation once the finalists have been fine-tuned."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from helpers.small import SMALL_DIGITS, SMALL_LLAMA
from rlprune.cli.main import main
from rlprune.config import load_config
from rlprune.evaluation import EvaluationLog
from rlprune.experiments import choose, prepare_experiment, run_agent, score_rule
from rlprune.experiments.choice import APART, apart
from rlprune.experiments.fine_tunes import FineTune
from rlprune.experiments.finish import finish
from rlprune.experiments.methods import finalists
from rlprune.pruning.history import final_widths
from rlprune.utils import Callback
from rlprune.workloads import TuneJob, Workload

SEARCH = (*SMALL_DIGITS, "search.evaluations=12", "finish.epochs=1", "finish.candidates=3", "threads=1")


@pytest.fixture(scope="module")
def experiment():
    return prepare_experiment(load_config("digits", [*SEARCH, "finish.choice=tuned"]))


@pytest.fixture(scope="module")
def searched(experiment):
    return run_agent("random", [experiment], EvaluationLog(), seed=0)


@pytest.fixture
def trained(monkeypatch):
    """Phases of the fine-tunes that run."""
    phases, fine_tune = [], Workload.fine_tune

    def counted(self, model, settings, job):
        phases.append(job.phase)
        return fine_tune(self, model, settings, job)

    monkeypatch.setattr(Workload, "fine_tune", counted)
    return phases


def with_finish(experiment, **settings):
    config = experiment.config
    return dataclasses.replace(
        experiment, config=dataclasses.replace(config, finish=dataclasses.replace(config.finish, **settings))
    )


def test_the_finalist_that_is_best_after_its_fine_tune_wins(experiment, searched):
    chosen = choose(experiment, searched)
    losses = {}
    for fact in chosen.trained:
        model = experiment.evaluator.build(fact["widths"])
        experiment.workload.fine_tune(model, experiment.config.finish, TuneJob(0))
        losses[tuple(fact["widths"])] = experiment.workload.evaluate(model, "validation").loss
    assert len(losses) == 3
    assert [-fact["tuned"] for fact in chosen.trained] == pytest.approx(list(losses.values()), abs=1e-5)
    assert chosen.history[-1] == min(losses, key=losses.__getitem__)


def test_by_score_nothing_is_trained(experiment, searched, trained):
    chosen = choose(with_finish(experiment, choice="score"), searched)
    scores = [experiment.evaluator.evaluate_full(h).score for h in finalists(experiment, searched.account, 3)]
    assert experiment.evaluator.evaluate_full(chosen.history).score == max(scores)
    assert not trained and not chosen.trained
    untrained = with_finish(experiment, epochs=0)
    assert choose(untrained, searched).history == chosen.history and not trained


def test_the_test_split_is_not_read_to_choose(experiment, searched, monkeypatch):
    monkeypatch.setattr(Workload, "test_opened", None)
    choose(experiment, searched)
    rule = score_rule(experiment, "uniform", EvaluationLog())
    choose(experiment, searched, [rule])


def test_the_winner_and_plans_that_methods_share_are_trained_once(experiment, searched, trained, tmp_path):
    chosen = choose(experiment, searched, state=tmp_path)
    assert len(trained) == 3
    first = finish(experiment, chosen, seed=0, state=tmp_path)
    again = finish(experiment, dataclasses.replace(chosen, method="other"), seed=0, state=tmp_path)
    assert len(trained) == 3
    alone = finish(experiment, chosen, seed=0)
    for row in (first.row, again.row):
        assert row["test_loss_finetuned"] == alone.row["test_loss_finetuned"]
        assert row["test_loss"] == alone.row["test_loss"]
        assert row["finalists"] == list(chosen.trained) and "tuned" not in row
    assert choose(experiment, searched, state=tmp_path).history == chosen.history and len(trained) == 4
    # Other settings of the fine-tune are another fine-tune.
    choose(with_finish(experiment, lr=0.01), searched, state=tmp_path)
    assert len(trained) == 7


def test_a_damaged_file_of_a_fine_tune_is_trained_again(experiment, searched, trained, tmp_path):
    chosen = choose(experiment, searched, state=tmp_path)
    for path in tmp_path.glob("finish-*.safetensors"):
        path.write_bytes(b"not weights")
    row = finish(experiment, chosen, seed=0, state=tmp_path).row
    assert len(trained) == 4
    assert row["test_loss_finetuned"] == finish(experiment, chosen, seed=0).row["test_loss_finetuned"]
    for path in tmp_path.glob("finish-*.json"):
        path.write_text("{}")
    assert choose(experiment, searched, state=tmp_path).history == chosen.history
    assert len(trained) == 5 + 3


def test_rules_join_that_are_trained_in_any_case(experiment, searched, tmp_path):
    rules = [score_rule(experiment, name, EvaluationLog()) for name in ("uniform", "global_taylor", "lamp")]
    joined = choose(experiment, searched, rules, state=tmp_path)
    plans = {tuple(fact["widths"]) for fact in joined.trained}
    assert {rule.history[-1] for rule in rules} <= plans
    without = choose(with_finish(experiment, rules=False), searched, rules, state=tmp_path)
    best = max(rules, key=lambda rule: rule.best.score)
    own = {h[-1] for h in apart(experiment, finalists(experiment, searched.account, 12), 3)}
    assert {tuple(fact["widths"]) for fact in without.trained} == own | {best.history[-1]}


def test_finalists_differ_from_one_another(experiment):
    space = experiment.space
    near, far = space.widths.copy(), space.widths // 2
    near[0] -= 1
    plans = [(tuple(map(int, widths)),) for widths in (space.widths, near, far)]
    assert apart(experiment, plans, 2) == [plans[0], plans[2]]
    assert apart(experiment, plans, 3) == [plans[0], plans[2], plans[1]]  # there are no more that differ
    assert apart(experiment, plans, 1) == plans[:1]
    ratios = [final_widths(plan) / space.widths for plan in plans]
    assert np.abs(ratios[0] - ratios[1]).mean() < APART <= np.abs(ratios[0] - ratios[2]).mean()


def test_a_metric_that_is_the_score_decides_after_the_fine_tune(experiment, searched):
    accuracy = prepare_experiment(
        load_config("digits", [*SEARCH, "finish.choice=tuned", "score.kind=accuracy"])
    )
    tune = FineTune(accuracy, 0, finalists(experiment, searched.account, 1)[0])
    model = accuracy.evaluator.build(tune.history)
    accuracy.workload.fine_tune(model, accuracy.config.finish, TuneJob(0))
    wanted = accuracy.workload.evaluate(model, "validation").metric
    assert tune.quality(Callback(), "trial") == pytest.approx(wanted)


def test_language_models_are_chosen_so_as_well(trained):
    settings = [*SMALL_LLAMA, "finish.steps=2", "finish.candidates=2", "finish.choice=tuned"]
    experiment = prepare_experiment(load_config("tiny_llama", [*settings, "threads=1"]))
    found = run_agent("random", [experiment], EvaluationLog(), seed=0, evaluations=14)
    chosen = choose(experiment, found)
    assert len(trained) == len(chosen.trained) == 2
    assert chosen.history[-1] == tuple(max(chosen.trained, key=lambda fact: fact["tuned"])["widths"])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("prune digits --rule uniform --out RUN --set finish.choice=tuned", "finish.choice"),
        ("train digits --out RUN --set finish.choice=tuned finish.epochs=0", "has no length"),
        ("train digits --out RUN --set finish.choice=tuned search.starts=none", "own plan is final"),
        ("train digits --out RUN --set finish.candidates=3 search.starts=none", "own plan is final"),
        ("train digits --out RUN --set finish.choice=best", "is not one of score, tuned"),
    ],
)
def test_what_does_nothing_is_refused(command, words, tmp_path, capsys):
    assert main(command.replace("RUN", str(tmp_path / "run")).split()) == 2
    assert words in capsys.readouterr().err
