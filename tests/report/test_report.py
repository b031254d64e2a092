"""report.html stands alone, shows what the run recorded, and never runs or leaks what a name contains."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from helpers.run_fixture import write_run
from rlprune.errors import ArtifactError
from rlprune.report import comparison, plots, tables, words
from rlprune.report import html as report
from rlprune.report.results import best_rule, learned, learning_curves, read_ledger

PNG = b"\x89PNG"


def test_the_report_is_one_file_with_every_row_and_no_outside_resource(tmp_path: Path) -> None:
    results = write_run(tmp_path / "run")
    page = report.build(tmp_path / "run")
    text = page.read_text(encoding="utf-8")
    assert page == tmp_path / "run" / "report.html" and len(text) < 3_000_000
    assert not re.search(r"https?://|<link|@import|<img|src=|url\(", text)
    assert text.startswith("<!DOCTYPE html>")
    # Each picture in two sizes: quality against two latencies, against two costs, learning, budgets.
    assert text.count("<svg") == 2 * 6 and text.count("<figcaption>") == 6
    table = text.split("Every row, every column")[1].split("Protocol and machine")[0]
    assert table.count("<tr") == 1 + len(results["rows"])
    for column in ("macs (M)", "params (k)", "test loss, fine-tuned", "latency b64 (ms)", "seconds"):
        assert f"<th>{column}</th>" in table
    short = text.split('<table class="short">')[1].split("</table>")[0]
    assert short.count("<tr") == 1 + len(results["rows"])
    assert "budget:\n  target: 0.5" in text and "abc123" in text and "sizes.train" in text


def test_the_browser_runs_the_pages_own_script_and_no_other(tmp_path: Path) -> None:
    write_run(tmp_path)
    text = report.build(tmp_path).read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not re.search(r"\son\w+=", text)


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    results = write_run(tmp_path)
    evil = "<img src=x onerror=alert(1)></script><script>alert(2)</script>\"' autofocus {{ 7 * 7 }}$\\frac{"
    results["workload"]["name"] = results["rows"][-1]["method"] = results["groups"][0]["name"] = evil
    results["rows"][-1]["kind"] = "agent"
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "config.yaml").write_text(evil)
    text = report.build(tmp_path).read_text(encoding="utf-8")
    assert "<img" not in text and "&lt;img src=x" in text and text.count("<script>") == 1
    # Every attribute value ends where the template ends it, and a name is no template.
    tags = re.findall(r"<[a-zA-Z][^>]*>", text.split("</style>")[1].split("<script>")[0])
    assert not any(" autofocus" in re.sub(r'"[^"]*"', "", tag) for tag in tags)
    assert "{{ 7 * 7 }}" in text


def test_a_minimal_run_has_a_report_too(tmp_path: Path) -> None:
    row = {"method": "dense", "seed": 0, "score": float("nan"), "test": None, "cost": 5}
    (tmp_path / "results.json").write_text(json.dumps({"version": 1, "rows": [row]}))
    text = report.build(tmp_path).read_text(encoding="utf-8")
    assert "dense" in text and "nan" not in text.lower().split("<body>")[1].split("<script>")[0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "not found"),
        ("", "damaged"),
        ('{"version": 1, "rows": [', "damaged"),
        ("[]", "not a results file"),
        ('{"version": 2, "rows": []}', "version 2"),
        ('{"version": 1, "rows": []}', "rows"),
        ('{"version": 1, "rows": [3]}', "rows"),
    ],
)
def test_missing_or_damaged_results_are_one_line(tmp_path: Path, content: str | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(ArtifactError, match=reason) as error:
        report.build(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path)
    (tmp_path / "report.html").write_text("old")
    before = set(tmp_path.iterdir())

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="No space left"):
        report.build(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old" and set(tmp_path.iterdir()) == before


def test_learning_curves_hold_the_searches_by_seed_and_survive_a_torn_line(tmp_path: Path) -> None:
    results = write_run(tmp_path, seeds=2, evaluations=10)
    with open(tmp_path / "ledger.jsonl", "a") as file:
        file.write('{"method": "ppo", "seed": 0, "sco')
    curves = learning_curves(results, read_ledger(tmp_path / "ledger.jsonl"))
    assert set(curves) == {"random", "ppo"}
    assert [len(seed) for seed in curves["ppo"]] == [10, 10]
    # Plans of the checkpoints that only train the policy have a task's name.
    rows = read_ledger(tmp_path / "ledger.jsonl")
    others = [row | {"task": "seed1", "score": 0.0} for row in rows]
    assert learning_curves(results, [*rows, *others]) == curves


def test_plans_over_the_budget_count_but_are_never_the_best(tmp_path: Path) -> None:
    results = write_run(tmp_path, seeds=1, evaluations=4)
    rows = read_ledger(tmp_path / "ledger.jsonl")
    for row in rows:
        row["cost"] = results["budget"]["target"]
    over = next(row for row in rows if row["method"] == "ppo")
    over |= {"cost": 1.01 * results["budget"]["target"], "score": 0.0}
    (scores,) = learning_curves(results, rows)["ppo"]
    assert math.isnan(scores[0]) and not any(math.isnan(score) for score in scores[1:])
    line = plots.learning({"ppo": [scores]}, {}).axes[0].lines[0]
    assert max(line.get_ydata()) == max(scores[1:])


def test_best_rule_and_learned_are_told_apart_by_kind_and_score(tmp_path: Path) -> None:
    results = write_run(tmp_path)
    rule, plan = best_rule(results), learned(results)
    assert rule is not None and rule["method"] == "global_taylor"
    best = max(row["score"] for row in results["rows"] if row["method"] == "ppo")
    assert plan is not None and plan["score"] == best


def test_the_headline_averages_over_seeds_and_dense_models(tmp_path: Path) -> None:
    results = write_run(tmp_path)
    dense = next(row for row in results["rows"] if row["method"] == "dense")
    results["rows"].append(dense | {"seed": 1, "checkpoint": 1, "test": dense["test"] - 0.2})
    scores = [row["score"] for row in results["rows"] if row["method"] == "ppo"]
    assert len(set(scores)) > 1
    text = report.headline(results)
    assert f"score {words.number(sum(scores) / len(scores))}" in text
    assert f"test {words.number(dense['test'] - 0.1)}" in text
    # Of several budgets it speaks of the first.
    results["budgets"] = [{"asked": 0.5}, {"asked": 0.3}]
    easier = [row | {"budget": 0.3, "score": 0.0} for row in results["rows"] if row["method"] == "ppo"]
    results["rows"] += easier
    for row in results["rows"]:
        row.setdefault("budget", None if row["method"] == "dense" else 0.5)
    assert report.headline(results) == text


def test_methods_without_a_kind_are_told_apart_by_the_registry(tmp_path: Path) -> None:
    results = write_run(tmp_path)
    for row in results["rows"]:
        del row["kind"]
    rule, plan = best_rule(results), learned(results)
    assert rule is not None and rule["method"] == "global_taylor"
    assert plan is not None and plan["method"] == "ppo"


def test_the_markdown_table_has_a_line_a_row_and_escapes_pipes(tmp_path: Path) -> None:
    results = write_run(tmp_path)
    results["rows"][0]["method"] = "a|b"
    lines = report.markdown(results).splitlines()
    assert len(lines) == 2 + len(results["rows"]) and "a\\|b" in lines[2]
    assert len({line.replace("\\|", "xx").count("|") for line in lines}) == 1


@pytest.mark.parametrize("groups", [1, 12, 60])
def test_every_group_has_its_widths_of_all_three(groups: int, tmp_path: Path) -> None:
    results = write_run(tmp_path, groups=groups)
    rule, plan = best_rule(results), learned(results)
    assert rule is not None and plan is not None
    bars = tables.widths(results, plan)
    assert [bar.dense for bar in bars] == [group["width"] for group in results["groups"]]
    assert [[kept[2] for kept in bar.kept] for bar in bars] == [
        list(pair) for pair in zip(rule["widths"], plan["widths"], strict=True)
    ]
    assert all(0 < kept[3] <= 100 for bar in bars for kept in bar.kept)
    text = report.build(tmp_path).read_text(encoding="utf-8")
    assert text.count('<div class="track">') == groups


def test_the_same_numbers_give_the_same_bytes_and_colours_stay_with_their_method(tmp_path: Path) -> None:
    curves = {"random": [[-1.0, -0.5]], "ppo": [[-1.0, float("nan"), -0.2]]}
    assert plots.to_png(plots.learning(curves, {})) == plots.to_png(plots.learning(curves, {}))
    assert plots.to_png(plots.learning(curves, {"uniform": -0.6}), tmp_path / "a.png").startswith(PNG)
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    assert plots.colours(["ppo"])["ppo"] == plots.colours(["random", "lamp", "ppo"])["ppo"]
    assert len(set(plots.colours([*"abcde", "ppo", "random", "uniform"]).values())) == 8


@pytest.mark.parametrize(("evaluations", "first"), [(10**12, 1), (5, -(10**12)), (5, 9), (2.5, 1), ("5", 1)])
def test_a_curve_that_would_fill_the_memory_is_refused(evaluations: Any, first: int) -> None:
    row = {"method": "ppo", "kind": "agent", "evaluations": evaluations, "improvements": [[first, 0.5]]}
    with pytest.raises(ValueError, match=r"^ppo: its improvements do not fit its evaluations$"):
        comparison.curves({"version": 1, "rows": [row]})
