"""Which rules a search starts from, and which of them its actions deviate from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helpers.small import SMALL_LLAMA, small_experiments
from rlprune.config import load_config
from rlprune.evaluation import EvaluationLog
from rlprune.experiments import Experiment, prepare_experiment, run_agent
from rlprune.experiments.methods import best_start_rule
from rlprune.rules import RULES

PROBING = ("fisher_probed", "sensitivity")


@pytest.fixture(scope="module")
def experiments() -> dict[str, Experiment]:
    return small_experiments()


def allowed(experiment: Experiment, evaluations: int) -> Experiment:
    return replace(experiment, config=experiment.config.override([f"search.evaluations={evaluations}"]))


@pytest.mark.parametrize(("ranking", "probing"), [("obs_fisher", "fisher_probed"), ("taylor", "sensitivity")])
def test_one_rule_that_probes_is_among_them_where_its_probes_leave_enough(
    experiments: dict[str, Experiment], ranking: str, probing: str
) -> None:
    experiment = experiments[ranking]
    count = RULES[probing].probe_count(experiment.space)
    names = allowed(experiment, 3 * count).start_rules()
    assert [name for name in names if name in PROBING] == [probing]
    assert names[0] == "uniform"
    assert not set(PROBING) & set(allowed(experiment, 12).start_rules())


def test_the_cheaper_one_stands_in_where_the_other_costs_too_much(experiments: dict[str, Experiment]) -> None:
    experiment = experiments["obs_fisher"]
    cheap, dear = (RULES[n].probe_count(experiment.space) for n in ("sensitivity", "fisher_probed"))
    assert cheap < dear
    names = allowed(experiment, 3 * cheap).start_rules()
    assert [name for name in names if name in PROBING] == ["sensitivity"]


def test_language_models_start_from_it_too() -> None:
    """Rules that read the calibration split dozens of times are no starts there, unless the ranking has measured it."""
    settings = [*SMALL_LLAMA, "prune.importance=obs_fisher", "threads=1"]
    experiment = prepare_experiment(load_config("tiny_llama", settings))
    names = allowed(experiment, 1000).start_rules()
    assert [name for name in names if name in PROBING] == ["fisher_probed"]
    taylor = prepare_experiment(load_config("tiny_llama", [*settings, "prune.importance=taylor"]))
    names = allowed(taylor, 1000).start_rules()
    assert [name for name in names if name in PROBING] == ["sensitivity"]


def test_further_budgets_start_from_what_costs_a_score_a_plan(experiments: dict[str, Experiment]) -> None:
    experiment = allowed(experiments["obs_fisher"], 1000)
    free = experiment.free_start_rules()
    own, more = experiment.starts(), experiment.starts((0.5, 0.4, 0.3))
    assert len(more) == len(own) + 2 * len(free)
    assert set(PROBING) & set(experiment.start_rules())
    assert not set(PROBING) & set(free)


def test_every_probe_of_a_start_is_charged(experiments: dict[str, Experiment]) -> None:
    experiment = allowed(
        experiments["obs_fisher"], 3 * RULES["fisher_probed"].probe_count(experiments["obs_fisher"].space)
    )
    starts = experiment.starts()
    singles = [w for w in starts if (w != experiment.space.widths).sum() == 1]
    assert singles
    ledger = EvaluationLog()
    found = run_agent("random", [experiment], ledger, seed=0)
    charged = {tuple(h[-1]) for h in found.account.plans}
    assert {tuple(int(v) for v in w) for w in starts} <= charged


def test_the_automatic_base_rule_never_probes(experiments: dict[str, Experiment]) -> None:
    experiment = allowed(experiments["obs_fisher"], 1000)
    probed = experiment.evaluator.evaluate(experiment.rule_widths("fisher_probed")).score
    base = best_start_rule([experiment])
    assert not RULES[base].probes
    # A rule that probes may well be ahead: it is left out nevertheless.
    assert probed >= experiment.evaluator.evaluate(experiment.rule_widths("fisher")).score
