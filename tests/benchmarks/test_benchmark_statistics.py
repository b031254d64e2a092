"""The statistics of a benchmark, against scipy and against sums made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from rlprune.benchmarks.benchmark import bootstrap, summarise
from rlprune.benchmarks.statistics import area, evaluations_to, reached, running_best, spread
from rlprune.evaluation.ledger import charged_scores
from rlprune.report import comparison
from rlprune.report.html import markdown_table

NAN = math.nan


def summary_of(losses: bool = False) -> list[dict]:
    scores = {"uniform": [-3.0, -3.0], "lamp": [-2.0, -2.0], "random": [-1.9, -2.3], "ppo": [-1.0, -1.5]}
    kinds = {"uniform": "rule", "lamp": "rule", "random": "baseline", "ppo": "agent"}
    rows = [
        {"method": name, "kind": kinds[name], "seed": seed, "score": score, "test": None}
        | ({"test_loss": -score, "test_loss_finetuned": 1.0} if losses else {})
        for name, values in scores.items()
        for seed, score in enumerate(values)
    ]
    curves = {
        ("random", 0): [-3.0, -2.0, -1.9, NAN], ("random", 1): [-3.0, -2.0, -2.5, -2.3],
        ("ppo", 0): [NAN, -3.0, -1.0], ("ppo", 1): [-3.0, -2.4, -1.5], ("lamp", 0): [-2.0], ("lamp", 1): [-2.0],
    }  # fmt: skip
    return summarise([*rows, {"method": "dense", "kind": "dense", "seed": 0, "score": 0.0}], curves, 4)


def test_the_summary_pairs_seeds() -> None:
    summary = summary_of()
    assert [entry["method"] for entry in summary] == ["ppo", "lamp", "random", "uniform"]
    ppo, lamp = summary[0], summary[1]
    assert lamp["best_rule"] and not ppo["best_rule"] and ppo["score"]["mean"] == -1.25
    assert ppo["score"]["min"] == -1.5 and ppo["score"]["max"] == -1.0
    against = {label: (round(d["mean"], 9), d["wins"]) for label, d in ppo["against"].items()}
    assert against == {"uniform": (1.75, 2), "best rule": (0.75, 2), "random": (0.85, 2)}
    assert summary[2]["against"]["best rule"]["wins"] == 1
    assert ppo["test"]["mean"] is None and ppo["test_loss"]["mean"] is None


def test_a_lower_test_loss_is_a_win_and_stands_first() -> None:
    summary = summary_of(losses=True)
    assert [entry["method"] for entry in summary] == ["ppo", "lamp", "random", "uniform"]
    difference = summary[0]["against_loss"]["random"]
    assert difference["mean"] == pytest.approx(-0.85) and difference["wins"] == difference["seeds"] == 2
    tie = summary[0]["against_loss_finetuned"]["random"]
    assert tie["mean"] == 0 and tie["wins"] == 0


def test_evaluations_to_random_are_of_the_same_seed() -> None:
    entries = {
        entry["method"]: entry["evaluations_to_random"]
        for entry in summary_of()
        if entry["method"] != "uniform"
    }
    assert entries["random"]["values"] == [3, 2] and entries["ppo"]["values"] == [3, 3]
    assert entries["lamp"]["values"] == [None, 1] and entries["lamp"]["reached"] == 1
    assert entries["lamp"]["median"] is None and entries["ppo"]["median"] == 3
    assert (entries["lamp"]["low"], entries["lamp"]["high"]) == (1, None)


def test_never_is_above_every_number() -> None:
    assert reached([5, None, 7])["median"] == 7
    assert reached([5, None, None])["median"] is None
    assert reached([4, 8])["median"] == 6
    assert reached([])["seeds"] == 0


def test_the_running_best_and_the_area_under_it() -> None:
    scores = [NAN, -3.0, -5.0, -1.0]
    assert running_best(scores) == [-math.inf, -3.0, -3.0, -1.0]
    assert evaluations_to(scores, -3.0) == 2 and evaluations_to(scores, -0.5) is None
    # -3 stands in for the evaluation before there was a plan, -1 for the two that were not used.
    assert area(scores, 6) == pytest.approx((-3 * 3 - 1 * 3) / 6)
    assert area(scores, 2) == -3.0
    assert math.isnan(area([NAN], 3))


def test_charged_scores_leave_out_what_cannot_be_the_best() -> None:
    rows = [
        {"widths": [1], "score": -1.0, "cost": 9.0, "samples": 4},
        {"widths": [2], "score": -2.0, "cost": 5.0, "samples": 2},
        {"widths": [3], "score": -3.0, "cost": 5.0, "samples": 2},
        {"widths": [3], "score": -2.5, "cost": 5.0, "samples": 4},
    ]
    over, dropped, kept = charged_scores(rows, limit=5.0)
    assert math.isnan(over) and math.isnan(dropped) and kept == -2.5
    assert charged_scores(rows)[0] == -1.0 and charged_scores([]) == []


def test_the_bootstrap_interval_is_the_accelerated_one_of_the_observations() -> None:
    sample = np.random.default_rng(1).exponential(size=30)  # skewed: the percentile interval lies elsewhere
    low, high = bootstrap(lambda index: float(sample[index].mean()), 30, resamples=20000)
    theirs, plain = (
        scipy.stats.bootstrap(
            (sample,), np.mean, n_resamples=20000, method=method, rng=np.random.default_rng(2)
        ).confidence_interval
        for method in ("BCa", "percentile")
    )
    assert theirs.high - plain.high > 0.05 * (plain.high - plain.low)
    width = theirs.high - theirs.low
    assert low == pytest.approx(theirs.low, abs=0.03 * width)
    assert high == pytest.approx(theirs.high, abs=0.03 * width)


def test_the_bootstrap_interval_covers_the_mean_of_a_sample() -> None:
    sample = np.random.default_rng(1).normal(size=50)
    low, high = bootstrap(lambda index: float(sample[index].mean()), 50)
    error = sample.std() / np.sqrt(50)
    assert low == pytest.approx(sample.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(sample.mean() + 1.96 * error, abs=0.3 * error)


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5, 0.5]])
def test_observations_that_never_differ_have_an_interval_of_one_point(values: list[float]) -> None:
    found = spread(values)
    assert found["low"] == found["high"] == 0.5


def test_where_the_accelerated_interval_has_no_value_the_percentiles_stand() -> None:
    values = np.array([0.0, 0.0, 0.0, 1.0])
    low, high = bootstrap(lambda index: float(np.median(values[index]) > 2), 4)  # never: all draws are alike
    assert low == high == 0.0


def test_a_spread_with_a_hole_has_no_mean() -> None:
    assert spread([1.0, 3.0])["mean"] == 2.0
    for values in ([1.0, None], [1.0, NAN], []):
        assert spread(values)["mean"] is None


def test_the_tables_say_what_the_summary_says() -> None:
    results = {
        "summary": [entry | {"budget": 0.5} for entry in summary_of(losses=True)],
        "workload": {}, "budget": {"target": 5.0, "dense": 10.0, "metric": "macs"},
        "protocol": {
            "left_out": {"owl": "for language models only", "flap": "for language models only"},
            "failed": {"tpe, seed 0": "out of memory"},
        },
    }  # fmt: skip
    text = markdown_table(*comparison.headline(results)) + markdown_table(*comparison.paired(results))
    assert "lamp (best rule)" in text and "1.2500 [1.0000, 1.5000]" in text and "| 3 (2/2) " in text
    assert "+0.7500 [+0.5000, +1.0000] (2/2)" in text and "never [1, never] (1/2)" in text
    assert "-0.8500 [-0.9000, -0.8000] (2/2)" in text
    assert comparison.notes(results) == [
        "Left out (for language models only): owl, flap.",
        "Failed: tpe, seed 0: out of memory.",
    ]
    assert comparison.share(results) == "50%" and comparison.per_budget(results) == [results]


def timed(method: str, seed: int, seconds: float, improvements: list[list[float]]) -> dict:
    row = {"method": method, "kind": "agent", "seed": seed, "seconds": seconds, "improvements": improvements}
    return row | {"evaluations": 10}


def test_at_equal_seconds_each_search_has_what_the_fastest_one_leaves_time_for() -> None:
    rows = [
        timed("slow", 0, 40.0, [[1, -3.0], [3, -2.0], [10, -0.1]]),  # 4 s each: two by second 10
        timed("fast", 0, 10.0, [[2, -2.5], [10, -1.0]]),
        timed("slow", 1, 20.0, [[1, -5.0], [4, -2.0], [6, -0.3]]),  # 2 s each: four by second 8
        timed("fast", 1, 8.0, [[1, -4.0], [9, -1.0]]),
        {"method": "dense", "kind": "dense", "seed": 0, "seconds": 0.1},
        timed("lamp", 0, 0.1, [[1, -0.5]]) | {"kind": "rule"},
    ]
    _, table = comparison.equal_seconds({"version": 1, "rows": rows})
    assert table == [
        ["fast", "0.90", "10", "-1.0000", "-1.0000"],
        ["slow", "3.00", "3", "-2.5000", "-0.2000"],
    ]


def test_nothing_is_compared_at_equal_seconds_where_they_are_not_known() -> None:
    rows = [timed("slow", 0, 40.0, [[1, -3.0]]), timed("fast", 0, math.nan, [[1, -2.0]])]
    assert comparison.equal_seconds({"version": 1, "rows": rows})[1] == []
    rows[1] = timed("fast", 0, 10.0, [[10, -2.0]])
    rows[0] |= {"improvements": [[3, -2.0]]}  # nothing within the budget before
    assert comparison.equal_seconds({"version": 1, "rows": rows})[1] == []
