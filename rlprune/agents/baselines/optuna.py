"""CMA-ES, TPE and Gaussian-process optimisation by optuna's samplers (Akiba et al. 2019, arXiv 1907.10902).

All three search the environment's actions: for each group the logarithm of a multiplier on the base
distribution, so that 0 is the best rule's plan. What a sampler asks for is projected onto the budget, and
it is told the score of the plan that comes out. Their boxes are half as wide as the policies' (``bound``):
in the whole box most plans are far worse than the rules', and hundreds of evaluations find few others.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...config.search import SearchConfig
from ...envs.task import ACTION_SCALE, BASE_FLOOR, Task
from ...errors import ConfigError
from ...evaluation.candidate import Scored
from ...pruning.history import History, all_final_widths, as_history
from ...surrogates.proposals import fresh, random_plans
from ...utils.arrays import Floats, Ints
from ..base import TrialRecorder
from .gradient_free import PATIENCE, GradientFree

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.trial import Trial

# After this many asks in a row without a new plan a random one is scored, and the sampler is told of it.
_STUCK = 3
# Plans of a batch where successive halving compares them.
_HALVED = 16


class OptunaSearch(GradientFree):
    """Ask the sampler, project, score, tell; the starts are told first, as finished trials."""

    # Libraries that the sampler imports apart from optuna.
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, settings: SearchConfig | None = None) -> None:
        super().__init__(settings)
        self.optuna = _optuna(self.name, *self.needs)

    @property
    @abstractmethod
    def bound(self) -> float:
        """Half of the box's width, in actions."""

    @abstractmethod
    def sampler(self, seed: int) -> Any:
        """A new sampler of optuna's."""

    def value(self, candidate: Scored, dense: Scored) -> float:
        """What the sampler is told of a candidate; higher is better."""
        return candidate.score

    def spend(self, task: Task, recorder: TrialRecorder, seed: Sequence[int]) -> None:
        """See :class:`GradientFree`."""
        generator = np.random.default_rng(seed)
        with warnings.catch_warnings():  # optuna calls its older parts experimental, its newer ones too
            warnings.simplefilter("ignore")
            study = _Study(self, task, recorder, self.sampler(int(generator.integers(2**31))))
            size = _HALVED if recorder.halves else self.settings.environments
            idle = 0
            while recorder.account.left > 0:
                before = recorder.account.spent
                if idle < _STUCK:
                    study.step(min(size, recorder.account.left))
                else:
                    plans = random_plans(task, task.highest_budget, PATIENCE, generator)
                    plans = fresh(plans, recorder.known)[:1]
                    if not len(plans):
                        return  # the space is exhausted
                    recorder.evaluate_batch(plans)
                    study.add(plans)
                idle = 0 if recorder.account.spent > before else idle + 1


class _Study:
    """An optuna study in memory whose trials are actions of a task."""

    def __init__(
        self, agent: OptunaSearch, task: Task, recorder: TrialRecorder, sampler: BaseSampler
    ) -> None:
        self._agent, self._task, self._recorder = agent, task, recorder
        self._optuna = agent.optuna
        self._study = self._optuna.create_study(direction="maximize", sampler=sampler)
        width = len(str(len(task.space.groups)))  # optuna sorts the names
        self._box = {
            f"group{g:0{width}}": self._optuna.distributions.FloatDistribution(-agent.bound, agent.bound)
            for g in range(len(task.space.groups))
        }
        # Probes of a rule keep more than the budget allows: no action stands for them.
        known = [plan for plan in recorder.within(task, task.highest_budget) if len(plan) == 1]
        self.add(all_final_widths(known))

    def add(self, plans: Ints) -> None:
        """Tell the sampler of plans (N, G) that it did not ask for."""
        trial = self._optuna.trial
        for plan in plans:
            candidate = self._recorder.scores.get(as_history(plan))
            if candidate is not None:
                params = dict(
                    zip(self._box, action_of(self._task, plan, self._agent.bound).tolist(), strict=True)
                )
                value = self._agent.value(candidate, self._task.evaluator.dense)
                self._study.add_trial(trial.create_trial(params=params, distributions=self._box, value=value))

    def step(self, count: int) -> None:
        """Ask for plans, score them, tell."""
        trials = [self._study.ask(self._box) for _ in range(count)]
        actions = np.array([[trial.params[name] for name in self._box] for trial in trials])
        plans = self._task.widths(actions, self._task.highest_budget)
        self._recorder.evaluate_batch(plans)
        for trial, plan in zip(trials, plans, strict=True):
            self._tell(trial, as_history(plan))

    def _tell(self, trial: Trial, plan: History) -> None:
        dense = self._task.evaluator.dense
        if plan in self._recorder.scores:
            self._study.tell(trial, self._agent.value(self._recorder.scores[plan], dense))
            return
        # Dropped by successive halving: what optuna calls pruned, with the score on fewer samples.
        dropped = self._recorder.account.dropped[plan]
        trial.report(self._agent.value(dropped, dense), step=dropped.samples)
        self._study.tell(trial, state=self._optuna.trial.TrialState.PRUNED)


class CMAES(OptunaSearch):
    """Covariance matrix adaptation (Hansen and Ostermeier 2001): starts at the base rule's plan.

    The first standard deviation is a sixth of the box (optuna's default).
    """

    name = "cma_es"
    needs = ("cmaes",)

    @property
    def bound(self) -> float:
        return self.settings.cma_es.bound

    def sampler(self, seed: int) -> Any:
        return self.optuna.samplers.CmaEsSampler(
            seed=seed,
            popsize=self.settings.cma_es.population,
            lr_adapt=self.settings.cma_es.lr_adapt,
            consider_pruned_trials=True,
            warn_independent_sampling=False,
        )


class TPE(OptunaSearch):
    """Tree-structured Parzen estimator (Bergstra et al. 2011; Watanabe 2023, arXiv 2304.11127), multivariate."""

    name = "tpe"

    @property
    def bound(self) -> float:
        return self.settings.tpe.bound

    def sampler(self, seed: int) -> Any:
        settings = self.settings.tpe
        return self.optuna.samplers.TPESampler(
            seed=seed,
            multivariate=True,
            n_startup_trials=settings.startup,
            n_ei_candidates=settings.candidates,
            warn_independent_sampling=False,
        )


class GaussianProcess(OptunaSearch):
    """Bayesian optimisation with a Matern 5/2 process and logarithmic expected improvement (arXiv 2310.20708)."""

    name = "gp"

    @property
    def bound(self) -> float:
        return self.settings.gp.bound

    def sampler(self, seed: int) -> Any:
        return self.optuna.samplers.GPSampler(
            seed=seed,
            n_startup_trials=self.settings.gp.startup,
            deterministic_objective=True,
            warn_independent_sampling=False,
        )

    def value(self, candidate: Scored, dense: Scored) -> float:
        """Minus the logarithm of the distance to the dense model.

        Distances span orders of magnitude, and a process of constant smoothness would see nothing but
        the collapsed plans; CMA-ES and TPE compare ranks only.
        """
        if self.settings.gp.transform == "none":
            return candidate.score
        return -float(np.log(max(dense.score - candidate.score, 0.0) + 1e-6))


def action_of(task: Task, widths: Ints, bound: float = 1.0) -> Floats:
    """The action (G,) in [-bound, bound] that comes nearest to what a plan cuts (inverse of ``deviate``)."""
    base = task.base(task.highest_budget)
    base = np.maximum(base, BASE_FLOOR * base.mean())
    cut = np.maximum(1.0 - widths / np.maximum(task.space.widths, 1), 1e-6)
    action = np.log(cut / base) / ACTION_SCALE
    # A shift of all actions changes nothing; the median of what is cut is put to 0.
    clipped: Floats = np.clip(action - np.median(action), -bound, bound)
    return clipped


def _optuna(agent: str, *needs: str) -> Any:
    """optuna with its chatter off; ConfigError naming the extra where it, or what it needs, is missing."""
    try:
        optuna, *_ = [import_module(name) for name in ("optuna", *needs)]
    except ImportError:
        raise ConfigError(f"search.agent: {agent!r} needs `pip install 'rlprune[benchmark]'`") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
