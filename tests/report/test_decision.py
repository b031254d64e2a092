"""The decision: intervals against scipy and against their own level, sentences, and who is as good and cheaper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from helpers.run_fixture import write_run
from rlprune.report import html as report
from rlprune.report import words
from rlprune.report.decision import as_plain, change_words, decide, rival_words, sentence
from rlprune.report.paired import paired, proportions, read_outcomes, unpaired
from rlprune.report.results import OUTCOMES_FILE
from rlprune.utils.files import write_tensors_atomic


def stacked(values: Any, sizes: Any = 1.0) -> Any:
    values = np.asarray(values, dtype=float)
    return np.stack([values, np.broadcast_to(np.asarray(sizes, dtype=float), values.shape)])


def test_paired_differences_of_losses_have_scipys_interval() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(1.0, 0.3, 50), rng.normal(1.1, 0.3, 50)
    found = paired(stacked(a), stacked(b))
    wanted = ttest_rel(a, b).confidence_interval(0.95)
    assert found is not None and found.count == 50
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-12)
    # Sequences of twice the tokens and twice the loss say the same.
    doubled = paired(stacked(2 * a, 2.0), stacked(2 * b, 2.0))
    assert doubled is not None and (doubled.low, doubled.high) == pytest.approx((found.low, found.high))


def test_right_and_wrong_answers_have_the_published_interval() -> None:
    """Bonett and Price's interval for the airways of 21 children (1 and 7 discordant pairs): -0.508 to -0.013."""
    found = proportions(1, 7, 21)
    assert found.mean == pytest.approx(-6 / 21)
    assert (round(found.low, 3), round(found.high, 3)) == (-0.508, -0.013)
    ours = stacked([1] * 2 + [0] * 7 + [1] * 12)
    theirs = stacked([0] + [1] + [1] * 7 + [1] * 12)
    assert paired(ours, theirs) == found


def test_the_interval_of_paired_answers_holds_its_level() -> None:
    rng, hits = np.random.default_rng(1), 0
    for _ in range(400):
        base = rng.random(100) < 0.9
        other = np.where(rng.random(100) < 0.08, ~base, base)
        found = paired(stacked(other), stacked(base))
        assert found is not None
        hits += found.low <= 0.08 * (0.1 - 0.9) <= found.high
    assert hits / 400 >= 0.93


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_the_interval_of_answers_is_within_reach_and_never_a_point(pairs: list[tuple[bool, bool]]) -> None:
    ours, theirs = (stacked(column) for column in zip(*pairs, strict=True))
    there, back = paired(ours, theirs), paired(theirs, ours)
    assert there is not None and back is not None
    assert -1 <= there.low < there.high <= 1
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low))
    loose = unpaired(float(ours[0].mean()), float(theirs[0].mean()), len(pairs))
    assert loose.mean == pytest.approx(there.mean)


def test_models_of_other_samples_are_not_compared() -> None:
    assert paired(stacked([1, 0]), stacked([1, 0, 1])) is None
    assert paired(stacked([1, 0]), stacked([1, 0], [1, 2])) is None
    assert paired(stacked([1, np.nan]), stacked([1, 0])) is None


def decided_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of one seed whose outcomes are known: dense 95%, the chosen plan 94%, the rule `erk` 94.5% of 400."""
    results = write_run(folder, seeds=1)
    results["workload"] |= {"metric": "accuracy", "higher_is_better": True}
    right = {"dense": 380, "ppo": 376, "erk": 378}
    tensors = {}
    for row in results["rows"]:
        count = right.get(row["method"], 300)
        tensors[f"{row['method']}/{row['seed']}"] = torch.stack(
            [(torch.arange(400) < count).double(), torch.ones(400)]
        ).to(torch.uint8)
        row["test"] = row["test_finetuned"] = count / 400
        row["bytes"] = 1_000_000 if row["method"] == "dense" else 500_000
        row |= changes.get(row["method"], {})
    results["outcomes"] = "metric"
    write_tensors_atomic(folder / OUTCOMES_FILE, tensors)
    (folder / "results.json").write_text(json.dumps(results))
    return results


def test_the_sentence_says_asked_paid_and_bought(tmp_path: Path) -> None:
    results: Any = decided_run(tmp_path, ppo={"latency_ms": {"1": 1.0, "64": 30.0}, "params": 135_000.0})
    decision = decide(results, tmp_path)
    assert decision is not None and decision.change is not None and decision.change.paired
    text = sentence(decision)
    assert text.startswith(
        "Asked for at most 50.0% of the dense MACs, the plan of ppo brings accuracy from 95.0%"
    )
    assert "−1.0 points, 95% interval −2.2 to +0.2 on 400 test samples" in text
    assert "parameters 270 k → 135 k (−50%)" in text and "weights file 1 MB → 500 kB (−50%)" in text
    assert "latency, batch 1 1.23 ms → 1 ms (−19%)" in text
    bought, not_bought = text.split("; not: ")
    assert "latency, batch 64" in not_bought and "latency, batch 64" not in bought
    plain = as_plain(decision)
    assert plain["costs"]["bytes"] == {"dense": 1_000_000.0, "pruned": 500_000.0}
    json.dumps(plain)
    page = report.build(tmp_path).read_text(encoding="utf-8")
    assert text in page.replace("&#39;", "'")


def test_rows_that_are_as_good_and_cheaper_are_marked(tmp_path: Path) -> None:
    results: Any = decided_run(tmp_path, erk={"params": 200_000.0})
    decision = decide(results, tmp_path)
    assert decision is not None
    names = {results["rows"][index]["method"]: why for index, why in decision.rivals.items()}
    assert names == {"erk": "at least as good, and cheaper: parameters −26%"}
    assert "erk (at least as good" in rival_words(decision, results["rows"])
    text = report.build(tmp_path).read_text(encoding="utf-8")
    assert text.count('<span class="badge" title="at least as good, and cheaper: parameters −26%">') == 1
    # A rule that costs more anywhere is none; of the same costs it is cheaper to find.
    for changed, expected in (
        ({"params": 200_000.0, "latency_ms": {"1": 2.0, "64": 22.0}}, set()),
        ({}, {"erk"}),
    ):
        again: Any = decided_run(tmp_path / str(len(str(changed))), erk=changed)
        found = decide(again, tmp_path)
        assert found is not None
        assert {again["rows"][index]["method"] for index in found.rivals} - {"global_taylor"} == expected


def test_a_worse_point_within_the_interval_is_not_told_apart(tmp_path: Path) -> None:
    results: Any = decided_run(tmp_path, erk={"params": 200_000.0})
    tensors = {
        name: torch.from_numpy(array) for name, array in read_outcomes(tmp_path / OUTCOMES_FILE).items()
    }
    tensors["erk/0"][0] = (torch.arange(400) < 375).double()
    tensors["global_taylor/0"][0] = (torch.arange(400) < 340).double()
    write_tensors_atomic(tmp_path / OUTCOMES_FILE, {name: t.to(torch.uint8) for name, t in tensors.items()})
    for row in results["rows"]:
        row["test_finetuned"] = float(tensors[f"{row['method']}/0"][0].mean())
    decision = decide(results, tmp_path)
    assert decision is not None
    found = {results["rows"][index]["method"]: why for index, why in decision.rivals.items()}
    assert found == {"erk": "not told apart, and cheaper: parameters −26%"}


def test_an_older_run_has_a_wider_interval_and_says_so(tmp_path: Path) -> None:
    results: Any = decided_run(tmp_path)
    with_pairs = decide(results, tmp_path)
    (tmp_path / OUTCOMES_FILE).unlink()
    without = decide(results, tmp_path)
    assert with_pairs is not None and without is not None and with_pairs.change and without.change
    assert without.change.high - without.change.low > with_pairs.change.high - with_pairs.change.low
    assert "not paired" in change_words(without) and "not paired" not in change_words(with_pairs)
    results["workload"]["metric"] = "mIoU"
    other = decide(results, tmp_path)
    assert (
        other is not None and other.change is None and "brings mIoU from 0.95 to 0.94 and" in sentence(other)
    )


def test_perplexity_is_lower_and_better(tmp_path: Path) -> None:
    results: Any = decided_run(tmp_path)
    results["workload"] |= {
        "metric": "perplexity",
        "higher_is_better": False,
        "exp_of_loss": True,
        "samples": "sequences",
    }
    results["outcomes"] = "loss"
    loss = torch.full((64,), 2.0, dtype=torch.float64) + torch.linspace(-0.5, 0.5, 64)
    sizes = torch.full((64,), 100.0, dtype=torch.float64)
    tensors = {"dense/0": torch.stack([100 * loss, sizes]), "ppo/0": torch.stack([110 * loss, sizes])}
    write_tensors_atomic(tmp_path / OUTCOMES_FILE, tensors)
    for row in results["rows"]:
        row["test"] = row["test_finetuned"] = {"dense": 7.389, "ppo": 9.025}.get(row["method"], 50.0)
    decision = decide(results, tmp_path)
    assert (
        decision is not None and decision.change is not None and decision.change.mean == pytest.approx(-0.2)
    )
    text = sentence(decision)
    assert "perplexity from 7.389 to 9.025 (+22.1%, 95% interval +" in text and "on 64 test sequences" in text
    assert not decision.tuned and "fine-tune" not in text


def test_amounts_have_units_people_read() -> None:
    values = ((2.5e6, "macs"), (999, "params"), (1.2345, "latency b1"), (5e5, "bytes"))
    assert [words.amount(*value) for value in values] == ["2.5 M", "999", "1.23 ms", "500 kB"]
    assert words.amount(None, "macs") == words.NONE
    assert (words.signed(-0.04, ".1f"), words.signed(0.06, ".1f"), words.signed(-1, ".0f")) == (
        "0.0",
        "+0.1",
        "−1",
    )
