"""Language models through the finish, incremental pruning with training, and the tuning of a saved folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rlprune
from helpers.lm import tiny_lm
from rlprune.api import trace
from rlprune.config.config import Config
from rlprune.errors import ArtifactError, BudgetError, ConfigError
from rlprune.evaluation.evaluator import Evaluator
from rlprune.evaluation.ledger import EvaluationLog
from rlprune.experiments import tune
from rlprune.experiments.finish import add_latency, finish
from rlprune.experiments.incremental import incremental
from rlprune.experiments.methods import MethodResult, run_agent, score_rule
from rlprune.experiments.prepare import Experiment
from rlprune.language.text import TextData, TextSplit
from rlprune.language.tuning import trainer as tuning_trainer
from rlprune.language.workload import LanguageWorkload
from rlprune.pruning.plan import Plan
from rlprune.workloads import Workload

LENGTH = 12


pytestmark = pytest.mark.usefixtures("short_collections")


def echo(config: Any = None) -> LanguageWorkload:
    """A tiny Llama and sequences in which every token comes twice."""
    drawn = torch.randint(2, 30, (44 * LENGTH,), generator=torch.Generator().manual_seed(0))
    stream = drawn.repeat_interleave(2)

    def part(start: int, count: int) -> TextSplit:
        return TextSplit(
            "echo", stream, tuple(range(start * LENGTH, (start + count) * LENGTH, LENGTH)), LENGTH, 0
        )

    splits = {
        "train": part(0, 48),
        "calibration": part(48, 8),
        "validation": part(56, 8),
        "test": part(64, 8),
    }
    return LanguageWorkload(tiny_lm("llama-mha-tied", seed=7), None, TextData("echo", splits), name="echo")


SETTINGS: dict[str, Any] = {
    "workload": f"{__name__}:echo",
    "budget": {"target": 0.7, "metric": "block_params"},
    "prune": {"importance": "wanda_sp"},
    "recovery": {"steps": ["reconstruct"]},
    "score": {"dtype": "float32"},
    "finish": {"method": "full", "lr": 3e-3, "steps": 6, "batch_size": 4, "distill": False},
    "device": "cpu",
}


def make_experiment(**sections: dict[str, Any]) -> Experiment:
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in SETTINGS.items()}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    config = Config.from_dict(values)
    workload = echo()
    evaluator = Evaluator(
        workload,
        trace(workload.model, workload.example_inputs),
        importance=config.prune.importance,
        recovery=config.recovery,
        score=config.score,
        metric=config.budget.metric,
    )
    return Experiment(config, workload, evaluator)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(m == n and torch.equal(x, y) for (m, x), (n, y) in pairs)


class Killed(Exception):
    pass


def dying_after(calls_allowed: int) -> Any:
    calls = 0

    def forward(self: Any, input_ids: Tensor) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls > calls_allowed:
            raise Killed
        return {"loss": self.loss(input_ids)}

    return forward


# The finish


def test_a_language_model_is_finished_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = make_experiment()
    found = score_rule(experiment, "uniform", EvaluationLog())
    agent = dataclasses.replace(found, kind="agent")
    whole = finish(experiment, agent, seed=0)
    row = whole.row
    assert row["tokens"] == {"length": LENGTH, "stride": LENGTH, "count": 8 * (LENGTH - 1)}
    assert row["finish"] == {"method": "full", "steps": 6}
    assert row["test"] == pytest.approx(np.exp(row["test_loss"]))
    assert row["test_loss_finetuned"] < row["test_loss"]
    assert row["params"] == sum(p.numel() for p in whole.model.parameters())
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tuning_trainer.Student, "forward", dying_after(4))
        finish(experiment, agent, seed=0, state=tmp_path)
    assert list(tmp_path.glob("finish-*-0.state/checkpoint-*"))
    resumed = finish(experiment, agent, seed=0, state=tmp_path)
    assert same(whole.model, resumed.model)
    assert all(path.is_file() for path in tmp_path.iterdir())  # the fine-tune's own state is gone
    with monkeypatch.context() as patch:
        patch.setattr(Workload, "fine_tune", None)  # not done again
        again = finish(experiment, agent, seed=0, state=tmp_path)
    assert same(again.model, whole.model) and again.row["test"] == row["test"]


def test_only_the_dense_model_and_the_agents_are_kept_and_timed() -> None:
    experiment = make_experiment(finish={"steps": 0})
    rule = score_rule(experiment, "uniform", EvaluationLog())
    finished = [finish(experiment, f, seed=0) for f in (None, rule, dataclasses.replace(rule, kind="agent"))]
    add_latency(finished, experiment, budget_seconds=0.1)
    assert [f.model is None for f in finished] == [False, True, False]
    assert [list(f.row.get("latency_ms", {})) for f in finished] == [["1"], [], ["1"]]
    assert all(f.row["test_finetuned"] == f.row["test"] for f in finished)


def test_a_bias_that_the_recovery_added_is_no_mistake() -> None:
    experiment = make_experiment(recovery={"steps": ["bias"]}, finish={"method": "lora", "steps": 2})
    done = finish(
        experiment,
        dataclasses.replace(score_rule(experiment, "uniform", EvaluationLog()), kind="agent"),
        seed=0,
    )
    added = {n for n, _ in done.model.named_parameters()} - {
        n for n, _ in experiment.workload.model.named_parameters()
    }
    assert added and all(name.endswith(".bias") for name in added)


# Incremental pruning


def test_rounds_cut_along_a_line_and_end_in_a_plan() -> None:
    experiment = make_experiment()
    done = incremental(experiment, "adapt_pruner", stages=3)
    space, metric = experiment.space, experiment.metric
    dense, target = space.dense_cost(metric), experiment.target
    widths = np.array(done.history)
    assert (np.diff(widths, axis=0) <= 0).all()
    for t, now in enumerate(widths, start=1):
        allowed = dense - t / 3 * (dense - target)
        unit = float(space.unit_costs(now, metric).max())
        assert allowed - unit < space.cost(now, metric) <= allowed
    assert done.plan.widths.tolist() == list(done.history[-1])
    assert [len(k) for k in done.plan.kept] == list(done.history[-1])
    expected = rlprune.prune(experiment.workload.model, Plan(space, done.plan.widths, done.plan.kept))
    assert {n: t.shape for n, t in done.model.state_dict().items()} == {
        n: t.shape for n, t in expected.state_dict().items()
    }
    assert len(done.rounds) == 3 and done.rounds[-1]["cost"] == space.cost(done.plan.widths, metric)


def test_training_between_the_cuts_pays() -> None:
    experiment = make_experiment()
    plain = incremental(experiment, "uniform", stages=2)
    trained = incremental(experiment, "uniform", stages=2, steps=10)
    given = incremental(experiment, plain.history, steps=0)
    assert same(plain.model, given.model) and given.history == plain.history
    assert trained.rounds[-1]["loss"] < plain.rounds[-1]["loss"] - 0.1


def test_killed_rounds_are_resumed_bit_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = make_experiment()
    whole = incremental(experiment, "uniform", stages=3, steps=4)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tuning_trainer.Student, "forward", dying_after(6))  # in the second round
        incremental(experiment, "uniform", stages=3, steps=4, out=tmp_path)
    resumed = incremental(make_experiment(), "uniform", stages=3, steps=4, out=tmp_path)
    assert same(whole.model, resumed.model)
    assert resumed.history == whole.history and resumed.rounds == whole.rounds
    assert all(a.tolist() == b.tolist() for a, b in zip(resumed.plan.kept, whole.plan.kept, strict=True))
    again = incremental(make_experiment(), "uniform", stages=3, steps=4, out=tmp_path)
    assert same(whole.model, again.model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-3.safetensors", "rounds.json"]
    with pytest.raises(ArtifactError, match="other settings"):
        incremental(experiment, "uniform", stages=3, steps=5, out=tmp_path)


def test_wrong_rounds() -> None:
    experiment = make_experiment()
    with pytest.raises(ConfigError, match="did you mean 'adapt_pruner'"):
        incremental(experiment, "adapt_prune", stages=2)
    with pytest.raises(ConfigError, match="at least 1 stage"):
        incremental(experiment, "uniform", stages=0)
    wider = experiment.space.widths + 1
    with pytest.raises(BudgetError):
        incremental(experiment, [wider.tolist()])


def test_the_evaluator_trains_between_stages_and_ppo_chooses_them() -> None:
    steps = {"steps": ["reconstruct", "finetune"], "finetune_steps": 6, "finetune_lr": 3e-3, "distill": False}
    experiment = make_experiment(
        recovery=steps,
        search={
            "mode": "direct",
            "stages": 2,
            "evaluations": 6,
            "base_rule": "uniform",
            "ppo": {"n_steps": 4},
        },
    )
    plain = make_experiment()
    history = (
        tuple(experiment.space.widths - [0, 4, 0, 4, 0, 4]),
        tuple(experiment.space.widths - [1, 8, 1, 8, 1, 8]),
    )
    trained = experiment.evaluator.evaluate_staged(history)
    assert trained.loss < plain.evaluator.evaluate_staged(history).loss - 0.1
    fresh = make_experiment(recovery=steps).evaluator.evaluate_staged(history)
    assert fresh.score == trained.score
    found: MethodResult = run_agent("ppo", [experiment], EvaluationLog(), seed=0)
    assert found.account.spent <= 6
    assert experiment.space.cost(np.array(found.history[-1]), experiment.metric) <= experiment.target


# A saved folder


def test_a_saved_model_is_tuned_and_saved_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = make_experiment()
    widths = experiment.rule_widths("uniform")
    slim, plan = experiment.evaluator.build(widths), experiment.evaluator.plan(widths)
    rlprune.save(slim, plan, tmp_path / "pruned")
    config = tmp_path / "echo.yaml"
    config.write_text(experiment.config.to_yaml(), encoding="utf-8")
    arguments = [str(tmp_path / "pruned"), str(config), "--out", str(tmp_path / "tuned")]
    assert tune.main([*arguments, "--set", "finish.steps=8"]) == 0
    assert "8 steps of full" in capsys.readouterr().out
    tuned = rlprune.load(tmp_path / "tuned")
    before = experiment.workload.evaluate(slim, "validation").loss
    assert experiment.workload.evaluate(tuned, "validation").loss < before
    assert not (tmp_path / "tuned.state").exists()
    assert tune.main([*arguments, "--set", "finish.steps=0"]) == 2
    assert capsys.readouterr().err.startswith("finish.steps:")
