"""The benchmark: one fair door, cells that survive a stop, and sums that can be checked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlprune import benchmark
from rlprune.config import Config
from rlprune.errors import ArtifactError, ConfigError

METHODS = ["uniform", "lamp", "random", "ppo"]


def _timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if "seconds" not in k and k != "latency_ms"} for row in rows]


@pytest.fixture(scope="module")
def done(small_digits: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A small benchmark of two rules and two agents under one seed."""
    out = tmp_path_factory.mktemp("benchmark") / "run"
    return out, benchmark.run(small_digits, METHODS, 1, 6, out)


def test_every_method_has_a_row_with_what_the_table_needs(done: tuple[Path, dict[str, Any]]) -> None:
    out, results = done
    assert json.loads((out / "results.json").read_text()) == results
    rows = results["rows"]
    assert [row["method"] for row in rows] == ["dense", *METHODS]
    wanted = {"seed", "evaluations", "cost", "params", "score", "validation", "test", "test_loss"}
    wanted |= {"test_finetuned", "test_loss_finetuned", "seconds", "latency_ms", "widths", "kind"}
    assert all(wanted <= set(row) for row in rows)
    assert all(row["cost"] <= results["budget"]["target"] for row in rows[1:])
    assert [row["kind"] for row in rows] == ["dense", "rule", "rule", "baseline", "agent"]
    assert [row["evaluations"] for row in rows] == [0, 1, 1, 6, 6]
    for name in ("benchmark.md", "benchmark.png", "report.html", "ledger.jsonl", "config.yaml"):
        assert (out / name).stat().st_size > 100


def test_the_merged_ledger_holds_every_scored_plan_once(done: tuple[Path, dict[str, Any]]) -> None:
    out, _ = done
    lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(len(lines)))
    counts = {name: sum(line["method"] == name for line in lines) for name in METHODS}
    assert counts == {"uniform": 1, "lamp": 1, "random": 6, "ppo": 6}


def test_agents_start_from_the_rules(done: tuple[Path, dict[str, Any]]) -> None:
    _, results = done
    scores = {row["method"]: row["score"] for row in results["rows"]}
    assert min(scores["random"], scores["ppo"]) >= max(scores["uniform"], scores["lamp"])


def test_a_finished_cell_is_not_computed_again(
    done: tuple[Path, dict[str, Any]], small_digits: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = done

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    for name in ("search", "score_rule", "finish"):
        monkeypatch.setattr(benchmark, name, never)
    again = benchmark.run(small_digits, METHODS, 1, 6, out)
    assert _timeless(again["rows"]) == _timeless(results["rows"])


def test_a_benchmark_stopped_inside_a_search_ends_with_the_same_rows(
    done: tuple[Path, dict[str, Any]], small_digits: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, results = done
    spent = 0
    append = benchmark.Ledger.append

    def stop(self: Any, row: dict[str, Any]) -> None:
        nonlocal spent
        spent += 1
        if spent == 5:  # in the middle of the random search
            raise KeyboardInterrupt
        append(self, row)

    monkeypatch.setattr(benchmark.Ledger, "append", stop)
    with pytest.raises(KeyboardInterrupt):
        benchmark.run(small_digits, METHODS, 1, 6, tmp_path / "run")
    monkeypatch.setattr(benchmark.Ledger, "append", append)
    again = benchmark.run(small_digits, METHODS, 1, 6, tmp_path / "run")
    assert _timeless(again["rows"]) == _timeless(results["rows"])


def test_a_damaged_cell_is_computed_again(done: tuple[Path, dict[str, Any]], small_digits: Config) -> None:
    out, results = done
    cell = next((out / "cells").glob("uniform-*.json"))
    cell.write_text(cell.read_text()[:50])
    again = benchmark.run(small_digits, METHODS, 1, 6, out)
    assert _timeless(again["rows"]) == _timeless(results["rows"])


def test_a_cell_is_named_by_everything_that_determines_it(small_digits: Config) -> None:
    key = benchmark.cell_key(small_digits, "ppo", 0)
    assert key == benchmark.cell_key(small_digits.override(["threads=1", "name=other"]), "ppo", 0)
    changed = [
        "budget.target=0.3",
        "search.evaluations=7",
        "finish.lr=0.1",
        "model.seed=1",
        "search.ppo.n_steps=8",
    ]
    keys = [benchmark.cell_key(small_digits.override([text]), "ppo", 0) for text in changed]
    keys += [benchmark.cell_key(small_digits, "ppo", 1), benchmark.cell_key(small_digits, "random", 0)]
    assert len({key, *keys}) == 1 + len(keys)
    more = small_digits.override(["search.evaluations=7"])
    assert benchmark.cell_key(more, "lamp", 0) == benchmark.cell_key(small_digits, "lamp", 0)


def test_the_summary_pairs_seeds(tmp_path: Path) -> None:
    scores = {"uniform": [-3.0, -3.0], "lamp": [-2.0, -2.0], "random": [-1.9, -2.3], "ppo": [-1.0, -1.5]}
    kinds = {"uniform": "rule", "lamp": "rule", "random": "baseline", "ppo": "agent"}
    rows = [
        {"method": name, "kind": kinds[name], "seed": seed, "score": score, "test": None}
        for name, values in scores.items()
        for seed, score in enumerate(values)
    ]
    summary = benchmark.summarise([*rows, {"method": "dense", "kind": "dense", "seed": 0, "score": 0.0}])
    assert [entry["method"] for entry in summary] == ["ppo", "lamp", "random", "uniform"]
    ppo, lamp = summary[0], summary[1]
    assert (ppo["score"]["mean"], ppo["score"]["min"], ppo["score"]["max"]) == (-1.25, -1.5, -1.0)
    assert ppo["score"]["low"] <= -1.25 <= ppo["score"]["high"]
    assert lamp["best_rule"]
    assert "best rule" not in lamp["against"]
    against = {label: (round(d["mean"], 9), d["wins"]) for label, d in ppo["against"].items()}
    assert against == {"uniform": (1.75, 2), "best rule": (0.75, 2), "random": (0.85, 2)}
    assert summary[2]["against"]["best rule"]["wins"] == 1
    assert ppo["test"]["mean"] is None
    text = benchmark.markdown({"summary": summary})
    assert "+0.7500 (2/2)" in text and "lamp (best rule)" in text


def test_the_bootstrap_interval_covers_the_mean_of_a_sample() -> None:
    sample = np.random.default_rng(1).normal(size=50)
    low, high = benchmark.bootstrap(lambda index: float(sample[index].mean()), 50)
    error = sample.std() / np.sqrt(50)
    assert low == pytest.approx(sample.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(sample.mean() + 1.96 * error, abs=0.3 * error)


@pytest.mark.parametrize(
    ("methods", "seeds", "evaluations", "message"),
    [
        (["lamb"], 1, 5, "did you mean 'lamp'"),
        (["ppo"], 0, 5, "--seeds 0"),
        (["ppo"], 1, 0, "--evaluations 0"),
    ],
)
def test_wrong_arguments_are_one_line_and_write_nothing(
    small_digits: Config, tmp_path: Path, methods: list[str], seeds: int, evaluations: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        benchmark.run(small_digits, methods, seeds, evaluations, tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_folder_of_others_is_refused(small_digits: Config, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="thesis"):
        benchmark.run(small_digits, ["uniform"], 1, 5, tmp_path)
