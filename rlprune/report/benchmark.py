"""What the page shows of a benchmark's results of one budget: sentences, charts, and the short table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..utils.values import is_finite
from . import pictures, words
from .comparison import against, curves, dense_mean, interval, score_unit
from .decision import cost_label, costs_of
from .results import Results, as_list, as_mapping, kind_of
from .svg import Picture
from .tables import Cell, Line, ShortTable, role_of

_SHOWN = {
    "test_loss_finetuned": "test loss, fine-tuned",
    "test_loss": "test loss before the fine-tune",
    "score": "score",
}
"""Fields with a chart: the first one that is known is what methods are ranked by."""


def sentences(results: Results) -> list[str]:
    """The best method, the best rule, PPO and the dense model by the test loss after the fine-tune."""
    field = _field(results)
    ranked = _ranked(results, field)
    if not ranked:
        return []
    seeds = max(entry["seeds"] for entry in ranked)
    shown = [
        entry for entry in ranked if entry is ranked[0] or entry["best_rule"] or entry["method"] == "ppo"
    ]
    parts = []
    for entry in shown:
        mark = " (best rule)" if entry["best_rule"] else ""
        parts.append(f"{entry['method']}{mark} {interval(entry[field])}")
    dense = _dense(results, field)
    if dense is not None:
        parts.append(f"the dense model {dense:.4f}")
    budget = words.budget_words(as_mapping(results.get("budget")))
    over = f"mean over {seeds} seeds [95% interval]" if seeds > 1 else "one seed, so no interval"
    better = "higher" if field == "score" else "lower"
    lines = [f"At {budget}, {_SHOWN[field]} ({better} is better; {over}): {', '.join(parts)}."]
    if seeds == 1:
        lines.append("Differences between methods may be chance: a second seed would show.")
    return lines


def charts(results: Results) -> list[Picture]:
    """Loss after and before the fine-tune, score, and the learning curves."""
    task = as_mapping(results.get("workload")).get("task")
    unit = score_unit(results.get("score"), task)
    found = []
    for field, label in _SHOWN.items():
        rows = [{"method": e["method"], **e[field]} for e in _ranked(results, field)]
        if rows:
            higher = field == "score"
            dense = _dense(results, field)
            found.append(pictures.methods(rows, label, dense, higher, unit if higher else ""))
    if searches := curves(results):
        best = {f"best rule: {e['method']}": e["score"]["mean"] for e in results["summary"] if e["best_rule"]}
        best = {label: mean for label, mean in best.items() if mean is not None}
        order = [str(e["method"]) for e in _ranked(results, "score") if e["method"] in searches]
        first = [name for name in ("ppo", "random") if name in searches]
        found.append(pictures.learning(searches, best, unit, [*first, *order]))
    return found


def tradeoffs(results: Results) -> list[list[Picture]]:
    """The ranked loss against the latencies and against the other costs: means over the seeds."""
    field = _field(results)
    if field == "score":
        return []
    metric = str(as_mapping(results.get("budget")).get("metric", "macs"))
    ranked = _ranked(results, field)
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in as_list(results.get("rows")):
        rows.setdefault(str(row["method"]), []).append(row)
    names = {e["method"] for e in (*ranked[:1], *(e for e in ranked if e["best_rule"]))} | {"dense", "ppo"}
    found: list[list[Picture]] = [[], []]
    for key in costs_of(rows["dense"][0], metric) if "dense" in rows else ():
        places = []
        for name, of_method in rows.items():
            wanted = "test_loss" if name == "dense" else field
            loss = _mean([row.get(wanted) for row in of_method])
            cost = _mean([costs_of(row, metric).get(key) for row in of_method])
            if loss is not None and cost is not None:
                role = "agent" if kind_of(of_method[0]) == "agent" else role_of(of_method[0])
                title = f"{name}: {loss:.4g}, {words.amount(cost, key)}"
                places.append(pictures.Place(name, cost, loss, role, title, name, name in names))
        if len(places) > 1:
            unit, scale = words.unit_of(max(place.cost for place in places), key)
            scaled = [pictures.rescaled(place, scale) for place in places]
            picture = pictures.tradeoff(scaled, cost_label(key), unit, _SHOWN[field], False, False)
            found[not key.startswith("latency")].append(picture)
    return [group for group in found if group]


def short(results: Results) -> ShortTable | None:
    """Loss after the fine-tune, its paired difference to the best rule (seeds won), and what it took."""
    field = _field(results)
    ranked = _ranked(results, field)
    if not ranked:
        return None
    kind = {"test_loss_finetuned": "against_loss_finetuned", "test_loss": "against_loss", "score": "against"}[
        field
    ]
    metric = str(as_mapping(results.get("workload")).get("metric") or "test metric")
    header = [
        "method",
        _SHOWN[field],
        "minus best rule",
        f"{metric}, fine-tuned",
        "evaluations",
    ]
    lines = []
    for place, entry in enumerate(ranked):
        pair = as_mapping(entry.get(kind)).get("best rule")
        spreads = [entry["test_finetuned"], entry["evaluations"]]
        texts = [interval(spreads[0]), _whole(spreads[1]["mean"])]
        cells = [Cell(str(entry["method"]), str(entry["method"]))]
        cells.append(Cell(interval(entry[field]), entry[field]["mean"]))
        cells.append(Cell(against(pair), None if pair is None else pair["mean"]))
        cells += [Cell(text, spread["mean"]) for text, spread in zip(texts, spreads, strict=True)]
        badge, why = ("best", f"by the mean {_SHOWN[field]}") if place == 0 else ("", "")
        if entry["best_rule"] and place:
            badge, why = "best rule", "by the score before the fine-tune"
        role = {"rule": "rule", "agent": "agent"}.get(str(entry["kind"]), "search")
        lines.append(Line(str(entry["method"]), cells, role, badge, why))
    return ShortTable(header, lines, spare=header[-2:])


def _field(results: Results) -> str:
    """What methods are ranked by: the first of the fields that every one of them has."""
    known = (f for f in _SHOWN if all(e[f]["mean"] is not None for e in results["summary"]))
    return next(known, "score")


def _ranked(results: Results, field: str) -> list[dict[str, Any]]:
    """The methods for which a field is known, the best first."""
    found = [entry for entry in results["summary"] if entry[field]["mean"] is not None]
    return sorted(found, key=lambda e: e[field]["mean"] * (-1 if field == "score" else 1))


def _dense(results: Results, field: str) -> float | None:
    """The mean of the dense models; of the loss, as they came."""
    return dense_mean(results, "score" if field == "score" else "test_loss")


def _mean(values: Sequence[object]) -> float | None:
    known = [float(value) for value in values if is_finite(value)]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _whole(value: float | None) -> str:
    return words.NONE if value is None else f"{value:,.0f}"
