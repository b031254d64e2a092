"""The fine-tuned models of one run, by plan: each plan is trained once, and a killed training goes on where it was."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ArtifactError
from ..pruning.history import History
from ..pruning.plan import Plan
from ..utils.checkpoints import forget
from ..utils.files import finite, read_json, read_tensors, write_json_atomic, write_tensors_atomic
from ..utils.progress import Callback
from ..workloads.adapter import TuneJob
from .prepare import Experiment
from .saving import round_weights
from .tuning_start import tuning_start

LOSSES = ("kl", "loss")
"""Kinds of score after which the validation loss says how good a trained model is: training may move its outputs away
from the dense model's and make them better."""


WORST = -1e9
"""Of a training that ended in NaN, as for a candidate's score."""


@dataclass(frozen=True)
class Quality:
    """How good a tuned model is on validation, higher is better, and the seconds of its training.

    ``value`` is minus the validation loss; where the score is neither a loss nor a divergence (a metric, a function of
    one's own), the score of the tuned model.
    """

    value: float
    seconds: float


@dataclass(frozen=True)
class FineTune:
    """The final fine-tune of one plan (``history`` None: of the dense model), and what the run's folder keeps of it.

    Neither the training nor its batches depend on the method, so that methods with the same plan share it.
    """

    experiment: Experiment
    seed: int
    history: History | None
    state: Path | None = None

    @property
    def has_length(self) -> bool:
        """Whether the settings train at all."""
        return bool(self.experiment.workload.adapter.fine_tune_length(self.experiment.config.finish)[0])

    def as_saved(self, model: nn.Module) -> None:
        """Give a built or trained model the weights that will be saved; the dense one is not saved."""
        if self.history is not None:
            round_weights(self.experiment.workload, model, self.experiment.config.finish.dtype)

    def train(
        self, model: nn.Module, plan: Plan | None, callback: Callback, phase: str
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The model after the fine-tune, and facts: where it started, seconds.

        ``model`` is rounded and may be changed. ``plan`` is that of a model of one stage, whose fine-tune may start
        elsewhere (`finish.start`). What is kept is not trained again.
        """
        kept = self.load(model)
        if kept is not None:
            callback.training(phase, 1, 1, {})
            return model, kept
        started = time.perf_counter()
        workload, settings = self.experiment.workload, self.experiment.config.finish
        model, facts = tuning_start(self.experiment, model, plan, self.seed)
        workload.fine_tune(
            model, settings, TuneJob(self.seed, None, self._file("state"), callback.training, phase)
        )
        self.as_saved(model)
        facts |= {"finish_seconds": time.perf_counter() - started}
        self.save(facts, model)
        return model, facts

    def quality(self, callback: Callback, phase: str) -> Quality:
        """How good the plan is on validation after the fine-tune; the test split is not read."""
        kept = self._facts("tuned")
        if kept is not None:
            callback.training(phase, 1, 1, {})
            return Quality(float(kept["tuned"]), float(kept["finish_seconds"]))
        assert self.history is not None
        evaluator, workload = self.experiment.evaluator, self.experiment.workload
        model = evaluator.build(self.history)
        self.as_saved(model)
        plan = evaluator.plan(self.history[0]) if len(self.history) == 1 else None
        model, facts = self.train(model, plan, callback, phase)
        if evaluator.score_settings.kind in LOSSES and workload.score_fn is None:
            tuned = -workload.evaluate(model, "validation").loss
        else:
            tuned = evaluator.score_of(model)
        tuned = tuned if math.isfinite(tuned) else WORST
        self.save(facts | {"tuned": tuned}, None)
        return Quality(tuned, facts["finish_seconds"])

    def forget_weights(self) -> None:
        """Keep the facts alone: nobody finishes this plan."""
        weights = self._file("safetensors")
        if weights is not None:
            weights.unlink(missing_ok=True)

    def load(self, model: nn.Module, *, needs: str | None = None) -> dict[str, Any] | None:
        """The kept facts, the trained weights put into ``model``; None where there are none, or without ``needs``."""
        facts, weights = self._facts(needs), self._file("safetensors")
        if facts is None or weights is None:
            return None
        try:
            tensors, own = read_tensors(weights), model.state_dict()
        except ArtifactError:
            return None  # a private file of this run that is not whole: the fine-tune is done again
        if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in own.items()}:
            return None  # looked at before, since what does not fit is said when the rest has been loaded
        model.load_state_dict(tensors)
        forget(self._file("state"))
        return facts

    def _facts(self, needs: str | None = None) -> dict[str, Any] | None:
        path = self._file("json")
        if path is None or not path.exists():
            return None
        try:
            kept = read_json(path)
            facts: dict[str, Any] = kept["facts"]
            return facts if kept["mark"] == self._mark and (needs is None or needs in facts) else None
        except (ArtifactError, KeyError, TypeError):
            return None

    def save(self, facts: Mapping[str, Any], model: nn.Module | None) -> None:
        """Keep facts and the trained model; None where its weights are kept already."""
        where, weights = self._file("json"), self._file("safetensors")
        if where is None or weights is None:
            return
        if model is not None:
            where.unlink(missing_ok=True)
            write_tensors_atomic(weights, {k: v.detach().cpu() for k, v in model.state_dict().items()})
        # A training that ended in NaN has facts that JSON has no numbers for.
        write_json_atomic(where, {"mark": self._mark, "facts": finite(facts)})
        forget(self._file("state"))

    @property
    def _mark(self) -> dict[str, Any]:
        """Only the same plan under the same settings may be taken from an earlier try."""
        stages = None if self.history is None else [list(stage) for stage in self.history]
        return {"stages": stages, "finish": repr(self.experiment.config.finish), "seed": self.seed}

    def _file(self, ending: str) -> Path | None:
        if self.state is None:
            return None
        name = (
            "dense" if self.history is None else hashlib.sha256(repr(self.history).encode()).hexdigest()[:8]
        )
        return self.state / f"finish-{name}-{self.seed}.{ending}"
