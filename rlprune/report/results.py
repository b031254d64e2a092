"""What a run recorded, read and checked: its results, ledger and budgets, its best rule and its learned plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Required, TypedDict, TypeVar, cast

from ..errors import ArtifactError, one_line
from ..evaluation.ledger import charged_scores
from ..utils.reading import parse_json, read_bytes, read_json
from ..utils.values import are_texts, is_finite, show_value

RESULTS_VERSION = 1
OUTCOMES_FILE = "outcomes.safetensors"
"""In a run's folder: the quality of each test sample after the fine-tune, for every row (`experiments.finish`)."""
Row = TypeVar("Row", bound=Mapping[str, Any])


class BudgetFacts(TypedDict, total=False):
    """A budget in results.json: as it was asked for, and the absolute cost next to the dense model's."""

    asked: str | float
    metric: str
    target: float
    dense: float
    range: list[float]


class Results(TypedDict, total=False):
    """The content of results.json. A run has no ``budgets``, ``protocol`` and ``summary``, which a benchmark has."""

    version: Required[int]
    rows: Required[list[dict[str, Any]]]
    """One a method (and seed and budget of a benchmark); which figures stand in one depends on the method."""
    workload: dict[str, Any]
    score: str
    scoring: dict[str, Any]
    """The format that candidates of a run were scored in, and the trial that chose it."""
    budget: BudgetFacts
    budgets: list[BudgetFacts]
    groups: list[dict[str, Any]]
    outcomes: str
    """What OUTCOMES_FILE holds of each test sample: "metric" or "loss"."""
    hardware: dict[str, Any]
    protocol: dict[str, Any]
    saved: list[str]
    """Of a run: size and number format of the dense weights and of the pruned folder, in words."""
    summary: list[dict[str, Any]]
    """One a method and budget: `benchmarks.statistics.summarise`."""


LEARNED = ("ppo",)  # methods whose plan counts as learned when a run does not say `"kind": "agent"`


def read_results(folder: Path) -> Results:
    """RUN/results.json; ArtifactError where it is missing, damaged or newer than this version reads."""
    path = folder / "results.json"
    try:
        if not path.exists():
            raise ArtifactError(f"{path}: not found; a report needs a run that reached its results")
        results = parse_json(read_bytes(path))
    except NotADirectoryError:
        raise ArtifactError(f"{folder}: not a run folder") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: damaged or unreadable ({one_line(error)})") from None
    if not isinstance(results, dict) or "version" not in results:
        raise ArtifactError(f"{path}: not a results file of rlprune (no version)")
    if not isinstance(results["version"], int) or results["version"] > RESULTS_VERSION:
        found = results["version"]
        raise ArtifactError(f"{path}: version {found!r}; this rlprune reads up to {RESULTS_VERSION}")
    rows = results.get("rows")
    if not as_list(rows) or not all(isinstance(row, dict) and "method" in row for row in as_list(rows)):
        raise ArtifactError(f"{path}: rows: need a list of objects with a method")
    if not are_texts(results.get("saved", [])):
        raise ArtifactError(f"{path}: saved: need a list of lines, got {show_value(results['saved'])}")
    for field in ("budgets", "summary"):
        if not all(isinstance(entry, dict) for entry in as_list(results.get(field, []))):
            raise ArtifactError(f"{path}: {field}: need a list of objects, got {show_value(results[field])}")
    return cast(Results, results)


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Rows of a ledger; a torn last line (a killed run) is left out, as is a missing file."""
    rows = []
    try:
        lines = read_bytes(path).splitlines()
    except ArtifactError:
        return []
    for line in lines:
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def budget_points(path: Path) -> list[dict[str, Any]]:
    """Rows of budgets.json that can be drawn; none where the file is missing or damaged."""
    try:
        points = read_json(path)
    except ArtifactError:
        return []
    return [
        p for p in as_list(points) if isinstance(p, dict) and is_finite(p.get("budget")) and "method" in p
    ]


def learning_curves(results: Results, ledger: Iterable[Mapping[str, object]]) -> dict[str, list[list[float]]]:
    """{search method: one list of scores per seed, in the order charged}; no rules, no dense model.

    Only the plans of the run's own checkpoint count: those of others, which train the policy, have a task's name.
    See `evaluation.ledger.charged_scores` for plans that cannot be the best.
    """
    rows = as_list(results.get("rows"))
    target: Any = as_mapping(results.get("budget")).get("target")
    limit = float(target) if is_finite(target) else math.inf
    searchers = [str(row["method"]) for row in rows if kind_of(row) not in ("rule", "dense")]
    runs: dict[str, dict[str, list[Mapping[str, object]]]] = {
        method: {} for method in dict.fromkeys(searchers)
    }
    for row in ledger:
        if str(row.get("method")) in runs and not row.get("task"):
            runs[str(row["method"])].setdefault(str(row.get("seed")), []).append(row)
    curves = {
        method: [charged_scores(rows, limit) for rows in seeds.values()] for method, seeds in runs.items()
    }
    return {method: found for method, seeds in curves.items() if (found := [s for s in seeds if s])}


def best_rule(results: Results) -> Mapping[str, Any] | None:
    """The rule's row with the best score, or None."""
    return best(row for row in as_list(results.get("rows")) if kind_of(row) == "rule")


def learned(results: Results) -> Mapping[str, Any] | None:
    """The learned plan's row with the best score, or None."""
    return best(row for row in as_list(results.get("rows")) if kind_of(row) == "agent")


def kind_of(row: Mapping[str, object]) -> str:
    """What a row's method is: "dense", "rule", "agent" or "baseline"."""
    if isinstance(row.get("kind"), str):
        return str(row["kind"])
    from ..rules import RULES

    method = str(row.get("method"))
    if method == "dense" or method in RULES:
        return "dense" if method == "dense" else "rule"
    return "agent" if method.startswith(LEARNED) else "baseline"


def best(rows: Iterable[Row]) -> Row | None:
    """The row with the highest score, or None where no row has one."""
    scored = [(score, row) for row in rows if is_finite(score := row.get("score"))]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def as_mapping(value: object) -> Mapping[str, Any]:
    """The value where it is a mapping, else an empty one: a part that is missing or damaged is left out."""
    return value if isinstance(value, Mapping) else {}


def as_list(value: object) -> list[Any]:
    """The value where it is a list, else an empty one."""
    return value if isinstance(value, list) else []
