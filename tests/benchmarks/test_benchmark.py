"""The benchmark: one fair door, cells that survive a stop, and sums that can be checked by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlprune.agents import AGENTS
from rlprune.benchmarks import benchmark, outcome
from rlprune.benchmarks.benchmark import Cell, cell_key
from rlprune.benchmarks.cells import finished
from rlprune.config.config import Config
from rlprune.errors import ArtifactError, BudgetError, ConfigError, RunError
from rlprune.evaluation.ledger import EvaluationLog
from rlprune.experiments.prepare import prepare_experiment
from rlprune.report import comparison
from rlprune.utils.progress import Console

METHODS = ["uniform", "lamp", "random", "ppo"]


def _timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if "seconds" not in k and k != "latency_ms"} for row in rows]


@pytest.fixture(scope="module", autouse=True)
def _brief_latency() -> Iterator[None]:
    """Latencies are in the rows, but nothing here looks at how exact they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcome, "LATENCY_SECONDS", 0.1)
        yield


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

    monkeypatch.setattr(benchmark, "compute", never)
    again = benchmark.run(small_digits, METHODS, 1, 6, out)
    assert _timeless(again["rows"]) == _timeless(results["rows"])


def test_a_benchmark_stopped_inside_a_search_ends_with_the_same_rows(
    done: tuple[Path, dict[str, Any]], small_digits: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, results = done
    spent = 0
    append = EvaluationLog.append

    def stop(self: Any, row: dict[str, Any]) -> None:
        nonlocal spent
        spent += 1
        if spent == 5:  # in the middle of the random search
            raise KeyboardInterrupt
        append(self, row)

    monkeypatch.setattr(EvaluationLog, "append", stop)
    with pytest.raises(KeyboardInterrupt):
        benchmark.run(small_digits, METHODS, 1, 6, tmp_path / "run")
    monkeypatch.setattr(EvaluationLog, "append", append)
    again = benchmark.run(small_digits, METHODS, 1, 6, tmp_path / "run")
    assert _timeless(again["rows"]) == _timeless(results["rows"])


def test_a_damaged_cell_is_computed_again(done: tuple[Path, dict[str, Any]], small_digits: Config) -> None:
    out, results = done
    cell = next((out / "cells").glob("uniform-*.json"))
    cell.write_text(cell.read_text()[:50])
    again = benchmark.run(small_digits, METHODS, 1, 6, out)
    assert _timeless(again["rows"]) == _timeless(results["rows"])


def test_a_cell_is_named_by_everything_that_determines_it(small_digits: Config) -> None:
    cell = Cell("ppo", 0, 0.5)
    key = cell_key(small_digits, cell)
    assert key == cell_key(small_digits.override(["threads=1", "name=other", "search.baselines=[]"]), cell)
    # The budget of a cell is its own; that of the settings stands for the others.
    assert key == cell_key(small_digits.override(["budget.target=0.3"]), cell)
    changed = ["search.evaluations=7", "finish.lr=0.1", "model.seed=1", "search.ppo.n_steps=8", "seed=1"]
    keys = [cell_key(small_digits.override([text]), cell) for text in changed]
    others: list[dict[str, Any]] = [{"seed": 1}, {"budget": 0.3}, {"method": "random"}]
    keys += [cell_key(small_digits, replace(cell, **other)) for other in others]
    assert len({key, *keys}) == 1 + len(keys)
    more = small_digits.override(["search.evaluations=7"])
    for method in ("lamp", "dense"):
        same = replace(cell, method=method)
        assert cell_key(more, same) == cell_key(small_digits, same)
    # Another agent's settings do not matter, and the dense model has no budget.
    tuned, other_agent = small_digits.override(["search.ppo.n_steps=8"]), replace(cell, method="random")
    assert cell_key(tuned, other_agent) == cell_key(small_digits, other_agent)
    assert cell_key(small_digits, Cell("dense", 0, 0.3)) == cell_key(small_digits, Cell("dense", 0, 0.5))


def test_a_cell_from_before_a_setting_existed_counts_where_that_has_its_default(
    done: tuple[Path, dict[str, Any]], small_digits: Config, tmp_path: Path
) -> None:
    out, _ = done
    content = json.loads(next((out / "cells").glob("random-0-*.json")).read_text())
    cell, console = Cell("random", 0, 0.5), Console(False)
    assert finished(out / "cells", small_digits, cell, console) is not None
    del content["determinants"]["finish.candidates"], content["determinants"]["score.samples"]
    old = tmp_path / "random-0-0123456789abcdef.json"
    old.write_text(json.dumps(content))
    assert finished(tmp_path, small_digits, cell, console) is None  # finish.candidates is not at its default
    default = small_digits.override(["finish.candidates=5"])
    assert finished(tmp_path, default, cell, console) is not None
    assert finished(tmp_path, default.override(["score.samples=50"]), cell, console) is None
    content["determinants"]["gone"] = 1  # a setting that this version does not know any more
    old.write_text(json.dumps(content))
    assert finished(tmp_path, default, cell, console) is None


def test_more_methods_seeds_and_budgets_reuse_what_is_there(
    done: tuple[Path, dict[str, Any]], small_digits: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = done
    computed: list[str] = []
    compute = benchmark.compute

    def recorded(experiment: Any, cell: Cell, *rest: Any) -> None:
        computed.append(str(cell))
        compute(experiment, cell, *rest)

    monkeypatch.setattr(benchmark, "compute", recorded)
    more = benchmark.run(small_digits, ["uniform", "erk"], 2, 6, out, budgets=[0.5, "40%"])
    new = [("uniform", 1, "0.5"), ("erk", 0, "0.5"), ("erk", 1, "0.5")]
    new += [(m, s, "40%") for m in ("uniform", "erk") for s in (0, 1)]
    assert sorted(computed) == sorted(f"{m}, seed {s}, budget {b}" for m, s, b in new)
    assert [(r["method"], r["seed"], r["budget"]) for r in more["rows"]] == [
        ("dense", 0, None),
        *((m, s, b) for b in (0.5, "40%") for m in ("uniform", "erk") for s in (0, 1)),
    ]
    first = next(row for row in results["rows"] if row["method"] == "uniform")
    assert _timeless([more["rows"][1]]) == _timeless([first])
    targets = [budget["target"] for budget in more["budgets"]]
    assert targets[1] / targets[0] == pytest.approx(0.8)
    assert all(r["cost"] <= targets[r["budget"] == "40%"] for r in more["rows"] if r["budget"])
    half, less = comparison.per_budget(more)
    assert [r["method"] for r in half["rows"]] == ["dense", "uniform", "uniform", "erk", "erk"]
    assert {e["budget"] for e in half["summary"]} == {0.5} and {e["budget"] for e in less["summary"]} == {
        "40%"
    }
    for mark in ("50", "40"):
        assert (out / f"benchmark-{mark}.png").stat().st_size > 1000
    text = (out / "benchmark.md").read_text()
    assert "## 50% of the macs" in text and "## 40% of the macs" in text


def test_one_process_prepares_each_dense_model(small_digits: Config, tmp_path: Path) -> None:
    results = benchmark.run(small_digits, ["uniform"], 3, 6, tmp_path / "run", checkpoints=2)
    found = [(row["method"], row["seed"], row["checkpoint"]) for row in results["rows"]]
    assert found == [
        ("dense", 0, 0),
        ("dense", 1, 1),
        ("uniform", 0, 0),
        ("uniform", 1, 1),
        ("uniform", 2, 0),
    ]
    losses = [row["test_loss"] for row in results["rows"][2:]]
    assert losses[0] == losses[2] != losses[1]
    lines = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert [line["checkpoint"] for line in lines] == [0, 1, 0]
    assert results["protocol"]["checkpoints"] == 2


def test_a_workload_of_ones_own_has_one_dense_model(small_digits: Config, tmp_path: Path) -> None:
    own = replace(small_digits, workload="helpers.nets:build")
    with pytest.raises(ConfigError, match="--checkpoints 2: only 1, since .*the workload is your own"):
        benchmark.run(own, ["uniform"], 2, 6, tmp_path / "run", checkpoints=2)


def test_a_failing_cell_is_said_and_the_others_are_finished(
    small_digits: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compute = benchmark.compute

    def failing(experiment: Any, cell: Cell, *rest: Any) -> None:
        if cell == Cell("lamp", 1, 0.5):
            raise ZeroDivisionError("no luck")
        compute(experiment, cell, *rest)

    monkeypatch.setattr(benchmark, "compute", failing)
    with pytest.raises(RunError, match="1 of 5 cells failed.*lamp, seed 1, budget 0.5: Zero") as error:
        benchmark.run(small_digits, ["uniform", "lamp"], 2, 6, tmp_path / "run", callback=Console(True))
    assert "\n" not in str(error.value)
    assert "lamp, seed 1, budget 0.5: FAILED: ZeroDivisionError: no luck" in capsys.readouterr().err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["rows"]) == 4 and len(results["protocol"]["failed"]) == 1
    assert "no luck" in (tmp_path / "run" / "benchmark.md").read_text()
    computed: list[str] = []
    monkeypatch.setattr(benchmark, "compute", lambda *a: computed.append(str(a[1])) or compute(*a))
    again = benchmark.run(small_digits, ["uniform", "lamp"], 2, 6, tmp_path / "run")
    assert computed == ["lamp, seed 1, budget 0.5"]
    assert len(again["rows"]) == 5 and not again["protocol"]["failed"]


def test_methods_that_cannot_run_here_are_left_out_or_refused(
    small_digits: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Needy:
        on_request = False
        wing = None

        def load(self) -> Any:
            import no_such_library  # type: ignore[import-not-found]

            return no_such_library

    space = prepare_experiment(small_digits).space
    monkeypatch.setitem(AGENTS, "needy", Needy())
    unable = benchmark.unable_agents(None, small_digits.search)
    assert "No module named 'no_such_library'" in unable["needy"] and "ppo" not in unable
    assert "the same as sac" in unable["sb3"] and "sac" not in unable
    other = small_digits.override(["search.sb3.algorithm=TD3"])
    assert "sb3" not in benchmark.unable_agents(None, other.search)
    names, left_out = benchmark.applicable(None, space, unable)
    assert left_out["owl"] == "for language models only" and "needy" in left_out
    assert {"ppo", "random", "uniform"} <= set(names) and not set(names) & set(left_out)
    assert benchmark.unable_agents(["ppo", "lamp"], small_digits.search) == {}
    assert benchmark.applicable(["ppo", "lamp"], space, {}) == (["ppo", "lamp"], {})
    for name in ("needy", "owl"):
        with pytest.raises(ConfigError, match=f"--methods: '{name}' cannot run here"):
            benchmark.run(small_digits, [name], 1, 6, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_method_pays_in_seconds_for_what_others_have_scored(small_digits: Config) -> None:
    evaluator = prepare_experiment(small_digits).evaluator
    widths = evaluator.space.project(np.ones(len(evaluator.space.groups)), 0.5)
    first, second = evaluator.fork(), evaluator.fork()
    one, two = first.evaluate(widths), second.evaluate(widths)
    assert one is two and first.reused == 0.0 and second.reused == one.seconds > 0
    second.evaluate(widths)  # a repeat of its own is free
    assert second.reused == one.seconds


@pytest.mark.parametrize("budgets", [["0.5", "50%"], ["0.0001"]])
def test_budgets_that_are_the_same_or_not_feasible_are_refused(
    small_digits: Config, tmp_path: Path, budgets: list[str]
) -> None:
    with pytest.raises((ConfigError, BudgetError), match="0.5 and 50% are the same|feasible"):
        benchmark.run(small_digits, ["uniform"], 1, 5, tmp_path / "run", budgets=budgets)
    assert not (tmp_path / "run").exists()


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
