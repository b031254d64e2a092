"""`rlprune fidelity`: sums that can be checked by hand, and measurements that survive a stop."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from rlprune.config.config import Config
from rlprune.errors import ConfigError
from rlprune.experiments import fidelity, fidelity_table
from rlprune.utils.rank import spearman
from rlprune.workloads import Workload
from rlprune.workloads.adapter import adapter_named

TIERS = ["none", "bn", "reconstruct", "reconstruct + bn", "reconstruct + bn + 2 steps"]


@pytest.fixture(scope="module")
def done(small_digits: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """A small study: 4 plans, 2 gradient steps; its folder, its text and its JSON."""
    out = tmp_path_factory.mktemp("fidelity") / "run"
    text = fidelity.run(small_digits, 4, out, steps=2)
    return out, text, json.loads((out / "fidelity.json").read_text())


def timeless(content: dict[str, Any]) -> list[Any]:
    """What was measured, without the seconds."""
    return [
        [
            point["widths"],
            point["loss"],
            point["metric"],
            {n: s["values"] for n, s in point["scores"].items()},
        ]
        for point in content["points"]
    ]


@pytest.mark.parametrize("draw", [lambda r: r.normal(size=9), lambda r: r.integers(3, size=9)])
def test_spearman_is_scipys(draw: Callable[[np.random.Generator], Any]) -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        x, y = draw(rng), draw(rng)
        wanted = scipy.stats.spearmanr(x, y).statistic
        assert spearman(x, y) == pytest.approx(0.0 if np.isnan(wanted) else wanted)
    assert spearman([1.0, 1.0], [1.0, 2.0]) == 0.0


def test_scores_of_one_half_meet_the_losses_of_the_other() -> None:
    up, down = [1.0, 2.0, 3.0], [3.0, 2.0, 1.0]
    scores = np.array([up, down]).T
    assert fidelity_table.fidelity(scores, np.array([up, down]).T) == pytest.approx(1.0)
    assert fidelity_table.fidelity(scores, np.array([up, up]).T) == pytest.approx((-1 + 1) / 2)
    assert fidelity_table.fidelity(scores, np.array([down, up]).T) == pytest.approx(-1.0)
    assert fidelity_table.fidelity(np.array([up, up]).T, np.array([down, down]).T) == pytest.approx(1.0)


def points(noise: dict[str, float], seconds: dict[str, float], plans: int = 40) -> list[dict[str, Any]]:
    """Plans with losses, and scores that are the negated loss and noise."""
    rng = np.random.default_rng(0)
    losses = rng.normal(size=plans)
    return [
        {
            "loss": [loss, loss],
            "scores": {
                name: {
                    "values": {"8": [-loss + rng.normal() * scale, -loss + rng.normal() * scale]},
                    "seconds": seconds[name],
                    "per_sample": 0.25,
                    "reads": 100,
                }
                for name, scale in noise.items()
            },
        }
        for loss in losses
    ]


def test_the_fastest_that_is_not_below_the_best_is_recommended() -> None:
    noise = {"none": 50.0, "bn": 0.2, "reconstruct": 0.15, "slow": 0.1}
    found = fidelity_table.summarise(points(noise, dict(zip(noise, (1, 2, 3, 4), strict=True))), "none", 8)
    rows = {row["recovery"]: row for row in found["rows"]}
    assert found["rows"][0]["recovery"] == found["best"] and found["best"] != "none"
    assert rows["none"]["difference_high"] < 0 and rows["none"]["used"]
    assert rows[found["best"]]["difference_low"] == rows[found["best"]]["difference_high"] == 0
    assert found["recommended"] == min(
        (name for name, row in rows.items() if row["difference_high"] >= 0),
        key=["none", "bn", "reconstruct", "slow"].index,
    )
    assert found["recommended"] != "none"
    assert all(row["low"] <= row["spearman"] <= row["high"] for row in rows.values())
    assert found["ceiling"] == pytest.approx(1.0) and rows["none"]["halves"] < rows["bn"]["halves"] < 1
    assert rows["bn"]["seconds"] == 2 + 8 * 0.25 and rows["bn"]["reads"] == 108


def test_a_tie_goes_to_the_fastest() -> None:
    same = {"slow": 0.0, "fast": 0.0}
    found = fidelity_table.summarise(points(same, {"slow": 2.0, "fast": 1.0}), "slow", 8)
    assert found["recommended"] == "fast"


def test_a_study_has_a_row_for_every_tier(done: tuple[Path, str, dict[str, Any]]) -> None:
    out, text, content = done
    assert sorted(row["recovery"] for row in content["rows"]) == sorted(TIERS)
    assert (
        "reconstruct + bn (in use)" in text and "4 random plans" in text and "50 images of one half" in text
    )
    assert f"Recommended: `{content['recommended']}`" in text
    assert len({tuple(point["widths"]) for point in content["points"]}) == 4
    assert all(np.shape(point["loss"]) == (2,) for point in content["points"])
    assert all(-1 <= row["low"] <= row["high"] <= 1 for row in content["rows"])
    reads = {row["recovery"]: row["reads"] for row in content["rows"]}
    assert [reads[name] for name in TIERS] == [50, 114, 50, 114, 114 + 2 * 64]
    assert list(content["rows"][0]["by_samples"]) == ["6", "12", "25", "50"]
    assert (out / "fidelity.png").stat().st_size > 1000
    assert (out / "fidelity.md").read_text() == text + "\n"
    assert not list(out.glob("*.state"))


def test_the_score_is_that_of_the_evaluator_and_the_test_split_stays_closed(
    done: tuple[Path, str, dict[str, Any]], small_digits: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlprune.experiments.prepare import prepare_experiment

    # Halves of the validation split are compared: training samples have no part in it.
    experiment = prepare_experiment(small_digits.override(["score.unlabelled=0"]))
    point = done[2]["points"][0]
    both = np.mean(point["scores"]["reconstruct + bn"]["values"]["50"])
    assert both == pytest.approx(experiment.evaluator.evaluate(point["widths"]).score, rel=1e-5)


def test_finished_measurements_are_not_made_again(
    done: tuple[Path, str, dict[str, Any]], small_digits: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, text, content = done
    trained: list[str] = []
    scored: list[list[int]] = []
    score = fidelity.TierScorer.measure
    monkeypatch.setattr(Workload, "fine_tune", lambda *args: trained.append(args[-1].phase))
    monkeypatch.setattr(
        fidelity.TierScorer, "measure", lambda self, plan, *a: scored.append(plan) or score(self, plan, *a)
    )
    assert fidelity.run(small_digits.override(["threads=1", "finish.candidates=3"]), 4, out, steps=2) == text
    assert trained == [] and scored == []
    fidelity.run(small_digits, 5, out, steps=2)
    assert trained == ["fine-tune 5/5"] and len(scored) == len(TIERS)
    assert timeless(json.loads((out / "fidelity.json").read_text()))[:4] == timeless(content)
    fidelity.run(small_digits.override(["finish.lr=0.5"]), 4, out, steps=0)
    assert len(trained) == 5 and len(scored) == len(TIERS), "another fine-tune changes no score"


@pytest.mark.parametrize("stop", [3, 22])
def test_a_study_that_is_stopped_ends_with_the_same_table(
    done: tuple[Path, str, dict[str, Any]],
    small_digits: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: int,
) -> None:
    """Among the scores, and among the fine-tunes; the line that was being written is torn."""
    put, out = fidelity._Cells.put, tmp_path / "run"

    def torn(self: Any, key: str, cell: dict[str, Any]) -> None:
        put(self, key, cell)
        if len(self.found) == stop:
            self.path.write_bytes(self.path.read_bytes()[:-9])
            raise KeyboardInterrupt

    monkeypatch.setattr(fidelity._Cells, "put", torn)
    with pytest.raises(KeyboardInterrupt):
        fidelity.run(small_digits, 4, out, steps=2)
    monkeypatch.setattr(fidelity._Cells, "put", put)
    fidelity.run(small_digits, 4, out, steps=2)
    content = json.loads((out / "fidelity.json").read_text())
    assert timeless(content) == timeless(done[2])
    rho = [{row["recovery"]: row["spearman"] for row in c["rows"]} for c in (content, done[2])]
    assert rho[0] == rho[1]


def test_wrong_arguments_are_one_line_and_leave_nothing(small_digits: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match="--candidates"):
        fidelity.run(small_digits, 3, out)
    with pytest.raises(ConfigError, match=r"finish\.epochs"):
        fidelity.run(small_digits.override(["finish.epochs=0"]), 5, out)
    with pytest.raises(ConfigError, match=r"data\.validation: must be at least 4"):
        fidelity.run(small_digits.override(["data.validation=3"]), 5, out)
    assert not out.exists()


def test_the_tiers_are_those_of_the_side() -> None:
    config = Config.from_dict({"model": {"name": "tiny_llama"}, "data": {"name": "help_texts"}})
    words = adapter_named("language").ladder
    language = config.override(["recovery.steps=[reconstruct]", "recovery.shrink=0.2"])
    names = [tier.name for tier in fidelity.tiers(language, words)]
    assert sorted(names) == sorted(["none", "bias", "reconstruct", "bias + reconstruct"])
    assert all(tier.recovery.shrink == 0.2 for tier in fidelity.tiers(language, words))
    assert "reconstruct + 5 steps" in [tier.name for tier in fidelity.tiers(language, words, 5)]
    own = config.override(["recovery.steps=[bn, finetune]", "recovery.finetune_steps=7"])
    found = fidelity.tiers(own, adapter_named("vision").ladder)
    assert found[0] == fidelity.own_tier(own) and found[0].name == "bn + 7 steps"
    assert [tier.name for tier in found[1:]] == [*TIERS[:4], "reconstruct + bn + 20 steps"]
    assert not any(re.search("finetune", tier.name) for tier in found)
