"""Pruning in rounds (section `rounds`): a search, a cut and a training each, on the model as the last round left it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..agents import Memory, Round
from ..errors import ConfigError
from ..evaluation.evaluator import Evaluator
from ..evaluation.ledger import EvaluationLog
from ..pruning.history import as_history, final_widths
from ..utils.progress import Callback
from .fine_tunes import FineTune
from .finish import FinalModel, finish_model
from .incremental import Choose, Chosen, Now, incremental
from .methods import run_agent
from .prepare import Experiment


def check_rounds(experiment: Experiment) -> None:
    """Refuse settings that several rounds cannot have; raises ConfigError."""
    search = experiment.config.search
    wrong = {
        "search.starts": search.starts != "none",
        "search.baselines": bool(search.baselines),
        "search.budget_range": bool(search.budget_range),
        "search.checkpoints": bool(search.checkpoints or search.model_seeds),
    }
    for setting, given in wrong.items():
        if given:
            allowed = "none" if setting == "search.starts" else "nothing"
            raise ConfigError(f"rounds.count: with several rounds {setting} has to be {allowed}")


def in_rounds(experiment: Experiment, folder: Path, callback: Callback) -> FinalModel:
    """Prune, train and prune again, then the final fine-tune: the model, its plan in units of the dense one, its row.

    Each round lowers the cost by an equal part. The agent searches on the model as it stands: units are ranked on it,
    candidates are cut from it, scores stay those against the dense model. What the agent chooses is cut and trained. A
    killed run goes on with the round that it was in; its evaluations lie in the run's ledger, a task for each round.

    Raises ConfigError for settings that several rounds cannot have.
    """
    check_rounds(experiment)
    config, settings = experiment.config, experiment.config.rounds
    search, state = config.search, folder / "state"
    steps = settings.steps or settings.epochs * experiment.workload.train_steps(config.finish.batch_size)
    started = time.perf_counter()
    callback.stage(search.agent)
    # The plan of a rule needs no search, and may be asked for in small cuts.
    alone = search.agent == "rule" and search.base_rule != "auto"
    done = incremental(
        experiment,
        search.base_rule
        if alone
        else _searches(experiment, EvaluationLog(folder / "ledger.jsonl"), callback),
        stages=settings.count,
        steps=steps,
        seed=config.seed,
        out=state / "rounds",
        callback=callback,
        part=settings.cut,
        whole=settings.schedule == "whole",
    )
    quality = experiment.workload.evaluate(done.model, "validation")
    head: dict[str, Any] = {"method": search.agent, "kind": "agent", "seed": config.seed}
    head |= {"evaluations": int(done.rounds[-1]["memory"].get("evaluations", settings.count))}
    head |= {"seconds": round(time.perf_counter() - started, 2), "rounds": settings.count}
    head |= {"score": experiment.evaluator.score_of(done.model)}
    head |= {"validation": quality.metric, "validation_loss": quality.loss}
    callback.stage("finish", 1, 2)
    tune = FineTune(experiment, config.seed, as_history(done.plan.widths), state)
    return finish_model(tune, done.model, done.plan, head, callback=callback)


def _searches(experiment: Experiment, ledger: EvaluationLog, callback: Callback) -> Choose:
    """The agent's search of each round."""
    config = experiment.config
    dense = {metric: experiment.space.dense_cost(metric) for metric in experiment.space.costs}

    def choose(now: Now, stage: int, cost: float, memory: Memory) -> Chosen:
        here = _at(experiment, now, cost, f"round {stage}")
        found = run_agent(
            config.search.agent,
            [here],
            ledger,
            seed=config.seed,
            progress=callback.search(config.search.agent),
            at=Round(stage, config.rounds.count, memory.get("agent", {}), dense),
        )
        callback.note(
            f"round {stage}/{config.rounds.count}: score {found.best.score:.4f} after {found.account.spent} evaluations"
        )
        spent = int(memory.get("evaluations", 0)) + found.account.spent
        return final_widths(found.history), {"agent": dict(found.memory), "evaluations": spent}

    return choose


def _at(experiment: Experiment, now: Now, cost: float, name: str) -> Experiment:
    """The experiment of one round: the model as it stands, with an absolute cost as its budget."""
    config = experiment.config
    dense = now.space.dense_cost(config.budget.metric)
    # As a share, so that every metric can say it; a hair more than the cost, which the rounding may have taken.
    share = min(1.0, cost / dense * (1 + 1e-12))
    config = replace(config, budget=replace(config.budget, target=share))
    workload = experiment.workload.around(now.model)
    evaluator = Evaluator(
        workload,
        now.space,
        importance=experiment.importance,
        recovery=config.recovery,
        score=config.score,
        metric=config.budget.metric,
        seed=config.seed,
    )
    return Experiment(config, workload, evaluator, name, experiment.stop)
