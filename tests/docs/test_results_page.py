"""docs/scripts/results.py: from a run's results to the page, and the same page from what is committed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers.run_fixture import write_run
from helpers.scripts import load_script
from rlprune.benchmarks.benchmark import summarise
from rlprune.config.config import load_config

DOCS = Path(__file__).parents[2] / "docs"
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("results")


def test_few_seeds_or_evaluations_leave_a_workload_open(script: ModuleType) -> None:
    wanted = script.Wanted("digits", ("0.5", "0.3"), 5)
    taken = {"protocol": {"seeds": 5, "evaluations": 100}, "budgets": [{"asked": 0.5}]}
    assert wanted.missing({}) == ["0.5", "0.3"] and wanted.missing(taken) == ["0.3"]
    assert wanted.missing(taken | {"protocol": {"seeds": 4, "evaluations": 100}}) == ["0.5", "0.3"]
    assert wanted.missing(taken | {"protocol": {"seeds": 5, "evaluations": 60}}) == ["0.5", "0.3"]
    assert wanted.missing(taken | {"commit": script.STALE}) == ["0.5", "0.3"]
    assert wanted.missing(taken | {"commit": "abc1234"}) == ["0.3"]
    assert (
        wanted.command(["0.3"])
        == "rlprune benchmark digits --budgets 0.3 --evaluations 100 --seeds 5 --out runs/digits"
    )


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory, script: ModuleType) -> tuple[Path, dict[str, Any]]:
    """The page of a made-up run of two budgets."""
    run, docs = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("docs")
    results = write_run(run)
    dense, *others = results["rows"]
    rows, summary, budgets = [dense | {"budget": None}], [], []
    for asked in (0.5, 0.3):
        ours = [
            row | {"budget": asked, "samples": 100, "finish_seconds": 1.0, "test_loss": 0.1 - row["score"]}
            for row in others
        ]
        curves = {(row["method"], row["seed"]): [row["score"] - 1, row["score"]] for row in ours}
        for row in ours:
            row |= {"improvements": [[1, row["score"] - 1], [2, row["score"]]], "evaluations": 2}
        rows += ours
        summary += [{"budget": asked} | entry for entry in summarise(ours, curves, 2)]
        budgets.append({"asked": asked, "metric": "macs", "target": asked * 40.55e6, "dense": 40.55e6})
    protocol = {"seeds": 3, "evaluations": 2, "jobs": 2, "methods": ["uniform", "ppo"], "failed": {}}
    results |= {"rows": rows, "summary": summary, "budgets": budgets, "score": "kl"}
    results["protocol"] = protocol | {"left_out": {"owl": "for language models only"}}
    results["workload"]["metric"] = "accuracy"
    results["hardware"] |= {"processor": "slide rule", "libraries": {"torch": "2.15.0"}}
    (run / "results.json").write_text(json.dumps(results))
    (run / "config.yaml").write_text(load_config("digits", ["finish.epochs=7"]).to_yaml())
    assert script.main(["--take", str(run), "--commit", "abc1234", "--docs", str(docs)]) == 0
    return docs, results | {"commit": "abc1234"}


def test_the_page_says_what_was_run_and_what_came_out(taken: tuple[Path, dict[str, Any]]) -> None:
    docs, results = taken
    text = (docs / "results.md").read_text()
    assert "torch 2.15.0; code of commit abc1234." in text
    assert "rlprune benchmark digits --methods uniform,ppo --budgets 0.5 0.3 --seeds 3" in text
    assert (
        "finish.epochs=7" in text
        and "slide rule" in text
        and "Left out (for language models only): owl" in text
    )
    assert "### 50% of the macs" in text and "### 30% of the macs" in text
    loss = next(e for e in results["summary"] if e["method"] == "ppo")["test_loss"]["mean"]
    assert f"ppo's mean test loss before the fine-tune is {loss:.4f}" in text
    assert "below that of 4 of 4 methods" in text
    assert "| ppo minus | test loss" in text
    for kind in ("benchmark", "score", "learning"):
        assert f"(results/digits-30-{kind}.png)" in text
        assert (docs / "results" / f"digits-30-{kind}.png").read_bytes().startswith(PNG)


def test_several_dense_models_are_said_and_averaged(
    taken: tuple[Path, dict[str, Any]], script: ModuleType, tmp_path: Path
) -> None:
    _, results = taken
    dense = results["rows"][0]
    rows = [dense | {"seed": 1, "test_loss": dense["test_loss"] + 2.0}, *results["rows"]]
    text = script.section(
        "digits",
        results | {"rows": rows, "settings": {}, "protocol": results["protocol"] | {"checkpoints": 2}},
        tmp_path,
    )
    assert "--jobs 2 --checkpoints 2" in text and "3 seeds, 2 dense models, each of its own" in text
    assert f"Dense: test loss {dense['test_loss'] + 1.0:.4f}" in text


def test_the_committed_results_give_the_same_page(
    taken: tuple[Path, dict[str, Any]], script: ModuleType
) -> None:
    docs, results = taken
    before = {path.name: path.read_bytes() for path in [docs / "results.md", *docs.glob("results/*")]}
    kept = json.loads((docs / "results" / "digits.json").read_text())
    assert kept["rows"] == results["rows"] and kept["settings"] == {"finish.epochs": 7}
    assert script.main(["--docs", str(docs)]) == 0
    assert before == {path.name: path.read_bytes() for path in [docs / "results.md", *docs.glob("results/*")]}


def test_another_model_under_a_shipped_config_has_a_name_of_its_own(
    taken: tuple[Path, dict[str, Any]], script: ModuleType, tmp_path: Path
) -> None:
    _, results = taken
    run, docs = tmp_path / "run", tmp_path / "docs"
    run.mkdir()
    (run / "results.json").write_text(json.dumps(results))
    settings = ["model.name=mobilenet_v2", "model.arguments={width_mult: 0.25}", "finish.lr=null"]
    (run / "config.yaml").write_text(load_config("digits", settings).to_yaml())
    with pytest.raises(SystemExit, match="--variant"):
        script.take(run, docs)
    assert not docs.exists()
    assert script.main(["--take", str(run), "--variant", "digits_mobilenet", "--docs", str(docs)]) == 0
    text = (docs / "results.md").read_text()
    assert "rlprune benchmark digits --methods" in text
    words = shlex.split(
        next(line for line in text.splitlines() if line.startswith("rlprune benchmark digits"))
    )
    given = words[words.index("--set") + 1 :]
    assert load_config("digits", given) == load_config("digits", settings)
    wanted = script.Wanted("digits", ("0.5",), 5, variant="digits_mobilenet")
    assert f"--out runs/{wanted.name}" in wanted.command(["0.5"]) and wanted.name == "digits_mobilenet"


def test_a_method_that_is_not_beaten_is_said(script: ModuleType) -> None:
    losses = {"ppo": 0.3, "random": 0.2, "lamp": 0.4}
    rows = [
        {
            "method": name,
            "kind": "rule" if name == "lamp" else "agent",
            "seed": seed,
            "score": -loss,
            "test_loss": loss,
        }
        for name, loss in losses.items()
        for seed in (0, 1)
    ]
    curves = {("random", 0): [-0.2], ("random", 1): [-0.2], ("ppo", 0): [-0.3, -0.2], ("ppo", 1): [-0.3]}
    results = {"summary": summarise(rows, curves, 2), "protocol": {"evaluations": 2}}
    text = "\n".join(script.verdict(results))
    assert "below that of 1 of 2 methods; **not** below random" in text
    assert "minus that of random search is +0.1000 [+0.1000, +0.1000], lower on 0 of 2" in text
    assert "never, on 1 of 2 seeds" in text


@pytest.mark.skipif(not (DOCS / "results.md").exists(), reason="no results have been committed yet")
def test_the_page_in_the_docs_is_what_the_script_writes(tmp_path: Path, script: ModuleType) -> None:
    (tmp_path / "results").mkdir()
    for path in (DOCS / "results").glob("*.json"):
        (tmp_path / "results" / path.name).write_bytes(path.read_bytes())
    assert script.main(["--docs", str(tmp_path)]) == 0
    assert (tmp_path / "results.md").read_text() == (DOCS / "results.md").read_text()
