"""Which plan wins: the best score, or the best on validation once the finalists have been fine-tuned."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from helpers.small import SMALL_DIGITS, SMALL_LLAMA
from rlprune.benchmarks import benchmark
from rlprune.cli.main import main
from rlprune.config import load_config
from rlprune.evaluation import EvaluationLog
from rlprune.experiments import choose, prepare_experiment, run_agent, score_rule
from rlprune.experiments.fine_tunes import WORST, FineTune
from rlprune.experiments.finish import finish
from rlprune.experiments.methods import finalists
from rlprune.report.results import read_results
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
    assert all(fact["seconds"] > 0 for fact in chosen.trained)
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
        assert row["finish_seconds"] > sum(fact["seconds"] for fact in chosen.trained)
    assert choose(experiment, searched, state=tmp_path).history == chosen.history and len(trained) == 4
    assert len([*tmp_path.glob("finish-*.safetensors")]) == 1  # those of the others are not kept
    # Other settings of the fine-tune are another fine-tune.
    choose(with_finish(experiment, lr=0.01), searched, state=tmp_path)
    assert len(trained) == 7


def test_a_damaged_file_of_a_fine_tune_is_trained_again(experiment, searched, trained, tmp_path):
    chosen = choose(experiment, searched, state=tmp_path)
    (weights,) = tmp_path.glob("finish-*.safetensors")
    weights.write_bytes(b"not weights")
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
    own = {h[-1] for h in finalists(experiment, searched.account, 3)}
    assert {tuple(fact["widths"]) for fact in without.trained} == own | {best.history[-1]}


def test_a_metric_that_is_the_score_decides_after_the_fine_tune(experiment, searched):
    accuracy = prepare_experiment(
        load_config("digits", [*SEARCH, "finish.choice=tuned", "score.kind=accuracy"])
    )
    tune = FineTune(accuracy, 0, finalists(experiment, searched.account, 1)[0])
    model = accuracy.evaluator.build(tune.history)
    accuracy.workload.fine_tune(model, accuracy.config.finish, TuneJob(0))
    wanted = accuracy.workload.evaluate(model, "validation").metric
    assert tune.quality(Callback(), "trial").value == pytest.approx(wanted)


def test_a_training_that_ends_in_nan_loses_and_stops_nothing(experiment, searched, monkeypatch, tmp_path):
    fine_tune, widths = Workload.fine_tune, finalists(experiment, searched.account, 3)[0][-1]
    ours = sum(p.numel() for p in experiment.evaluator.build(widths).parameters())

    def diverging(self, model, settings, job):
        tuned = fine_tune(self, model, settings, job)
        if sum(p.numel() for p in model.parameters()) == ours:
            with torch.no_grad():
                next(model.parameters()).fill_(torch.nan)
        return tuned

    monkeypatch.setattr(Workload, "fine_tune", diverging)
    for state in (None, tmp_path):
        chosen = choose(experiment, searched, state=state)
        assert chosen.trained[0]["tuned"] == WORST < chosen.trained[1]["tuned"]
        assert chosen.history[-1] != widths
    row = finish(experiment, dataclasses.replace(chosen, history=(widths,)), seed=0, state=tmp_path).row
    again = finish(experiment, dataclasses.replace(chosen, history=(widths,)), seed=0, state=tmp_path).row
    assert np.isnan(row["test_loss_finetuned"]) and again["test_loss_finetuned"] is None
    assert row["test_loss"] == again["test_loss"]


RUN = (*SEARCH, "finish.choice=tuned", "finish.rules=false", "search.agent=random", "search.baselines=[]")


def rows_of(folder):
    dropped = ("seconds", "finish_seconds", "latency_ms")
    rows = read_results(folder)["rows"]
    for row in rows:
        for fact in row.get("finalists", ()):
            del fact["seconds"]
    return [{k: v for k, v in row.items() if k not in dropped} for row in rows]


def test_a_run_that_is_stopped_inside_a_finalist_ends_alike(trained, tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    words = ["train", "digits", "--set", *RUN, "--out"]
    assert main(["--progress", "lines", *words, str(whole)]) == 0
    finalists_trained = [phase for phase in trained if phase.startswith("random, finalist")]
    assert len(finalists_trained) >= 3 and len(trained) == len(finalists_trained) + 1  # and the dense model
    lines = capsys.readouterr().err.splitlines()
    assert "[4/5] finalists of random" in lines
    shares = [int(line.partition("run ")[2].partition("%")[0]) for line in lines if ", run " in line]
    assert shares == sorted(shares) and shares[-1] == 100

    def dying(self, model, settings, job):
        if job.phase.startswith("random, finalist 2"):
            raise KeyboardInterrupt
        return counted(self, model, settings, job)

    with monkeypatch.context() as patch:
        counted = Workload.fine_tune
        patch.setattr(Workload, "fine_tune", dying)
        assert main([*words, str(stopped)]) == 130
    del trained[:]
    assert main([*words, str(stopped), "--resume"]) == 0
    assert "random, finalist 2 of" in trained[0]  # the first one is kept
    assert rows_of(stopped) == rows_of(whole)
    assert not list((stopped / "state").glob("finish-*"))


def test_a_benchmark_chooses_so_for_every_search(trained, tmp_path):
    results = benchmark.run(
        load_config("digits", [*SEARCH, "finish.choice=tuned"]),
        ["random", "uniform"],
        1,
        12,
        tmp_path / "out",
    )
    rows = {row["method"]: row for row in results["rows"]}
    assert len(rows["random"]["finalists"]) == 3 and len(rows["uniform"]["finalists"]) == 1
    assert len(trained) == 3 + 1 + 1  # of each method, and the dense model
    best = max(rows["random"]["finalists"], key=lambda fact: fact["tuned"])
    assert rows["random"]["widths"] == best["widths"]


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
