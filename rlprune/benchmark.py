"""Every method through one fair door: same workload, evaluator, starts, evaluations and final fine-tune.

One cell is one method under one seed. A finished cell is a file named after a hash of everything that
determines it, so a stopped benchmark goes on where it was, and one with more methods or seeds reuses
what is there. The seed decides a method's search and its final fine-tune, so methods are compared in
pairs of one seed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import plots, plugins, report
from .agents import AGENTS
from .artifacts import library_versions
from .config import Config
from .errors import ArtifactError, ConfigError, near_miss
from .files import lock_run, read_json, write_bytes_atomic, write_json_atomic, write_text_atomic
from .finish import choose, finish
from .latency import DEFAULT_BATCH_SIZES, measure
from .ledger import Ledger
from .problem import Found, Problem, prepare, score_rule, search
from .progress import Console
from .pruning.surgery import prune
from .rules import RULES, rules_for
from .run import results_of

DENSE = "dense"
RESAMPLES = 2000
FIELDS = ("score", "validation", "test", "test_loss", "test_finetuned", "test_loss_finetuned")
# Settings that say how a run is shown or where it runs, not what comes out.
_NOT_DETERMINING = ("name", "device", "threads")
Row = dict[str, Any]


def run(
    config: Config, methods: Sequence[str] | None, seeds: int, evaluations: int, out: str | Path
) -> dict[str, Any]:
    """Compare methods and write results.json, benchmark.md, benchmark.png, ledger.jsonl and report.html.

    Args:
        methods: names of rules and agents; all of them for None.
        seeds: number of seeds, from `config.seed` upwards.
        evaluations: distinct plans that each agent may have scored, its starts included.

    Returns the content of results.json: its rows are one per method and seed, its `summary` one per method.

    Raises:
        ConfigError: an unknown method, or no seed or evaluation.
    """
    _checked(methods, [*RULES, *AGENTS])  # a wrong name is said before anything is trained
    if seeds < 1 or evaluations < 1:
        raise ConfigError(f"--seeds {seeds}, --evaluations {evaluations}: must be at least 1")
    console = Console(True)
    config = replace(config, search=replace(config.search, evaluations=evaluations))
    with lock_run(out) as folder:
        write_text_atomic(folder / "config.yaml", config.to_yaml())
        cells = folder / "cells"
        cells.mkdir(exist_ok=True)
        problem = prepare(config, console=console)
        names = _checked(methods, [*rules_for(problem.space), *AGENTS])
        jobs = [(DENSE, config.seed), *((n, config.seed + i) for n in names for i in range(seeds))]
        done = []
        for name, seed in jobs:
            done.append(_cell(problem, name, seed, cells, console))
            console.note(f"{len(done)}/{len(jobs)} {name}, seed {seed}: {_brief(done[-1]['row'])}")
        results = _results(problem, [cell["row"] for cell in done])
        lines = [line for cell in done for line in cell["ledger"]]
        _write(folder, results, lines)
    return results


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float], count: int, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of a statistic of ``count`` observations; it is given their drawn indices.

    The plain percentile bootstrap (Efron 1979); with a handful of observations it is too narrow.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(count, size=count)) for _ in range(resamples)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Per method, best mean score first: mean, range and 95% interval of every field, and paired differences.

    A paired difference is that of the scores of one seed, to uniform, to the best rule (by mean score) and
    to random search; "wins" counts the seeds on which it is above zero.
    """
    by_method: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["method"] != DENSE:
            by_method.setdefault(row["method"], {})[row["seed"]] = row
    rules = [name for name in by_method if next(iter(by_method[name].values()))["kind"] == "rule"]
    best = max(rules, key=lambda name: _mean(by_method[name], "score"), default=None)
    references = {"uniform": "uniform", "best rule": best, "random": "random"}
    summary = []
    for name, found in by_method.items():
        entry: Row = {"method": name, "kind": next(iter(found.values()))["kind"], "seeds": len(found)}
        entry["best_rule"] = name == best
        entry |= {field: _spread([row.get(field) for row in found.values()]) for field in FIELDS}
        entry["against"] = {
            label: _difference(found, by_method[reference])
            for label, reference in references.items()
            if reference in by_method and reference != name
        }
        summary.append(entry)
    return sorted(summary, key=lambda entry: -entry["score"]["mean"])


def markdown(results: Mapping[str, Any]) -> str:
    """The summary as a Markdown table: mean [lowest, highest] over the seeds, and paired score differences."""
    header = ["method", "seeds", "score", "test", "test loss", "test, fine-tuned", "test loss, fine-tuned"]
    header += ["score − uniform", "score − best rule", "score − random"]
    lines = []
    for entry in results["summary"]:
        fields = [
            _range(entry[f]) for f in ("score", "test", "test_loss", "test_finetuned", "test_loss_finetuned")
        ]
        against = [_against(entry["against"].get(label)) for label in ("uniform", "best rule", "random")]
        mark = " (best rule)" if entry["best_rule"] else ""
        lines.append([f"{entry['method']}{mark}", str(entry["seeds"]), *fields, *against])
    return report.markdown_table(header, lines)


def cell_key(config: Config, method: str, seed: int) -> str:
    """Hash of everything that determines one cell: settings, method and its code, seed, versions of the libraries."""
    settings = {k: v for k, v in config.to_dict().items() if k not in (*_NOT_DETERMINING, "seed")}
    settings["search"] = {
        k: v for k, v in settings["search"].items() if k not in ("baselines", "tensorboard")
    }
    if method in (*RULES, DENSE):
        del settings["search"]
    parts = [settings, config.seed, method, seed, library_versions()]
    # A name from outside says nothing of the code behind it.
    parts += filter(None, map(plugins.fingerprint, dict.fromkeys((method, config.search.base_rule))))
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _checked(methods: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    for name in methods or ():
        if name not in known:
            hint = near_miss(name, known)
            raise ConfigError(f"--methods: unknown method {name!r}{hint}; allowed: {', '.join(known)}")
    return list(dict.fromkeys(methods or known))


def _cell(problem: Problem, method: str, seed: int, cells: Path, console: Console) -> dict[str, Any]:
    """The finished cell {"row", "ledger"}: from its file, or computed and written to it."""
    name = f"{method}-{seed}-{cell_key(problem.config, method, seed)}"
    path = cells / f"{name}.json"
    if path.exists():
        try:
            kept = read_json(path)
            return {"row": dict(kept["row"]), "ledger": list(kept["ledger"])}
        except (ArtifactError, KeyError, TypeError, ValueError):
            console.note(f"{path}: damaged, so this cell is computed again")
    state = cells / f"{name}.state"
    state.mkdir(exist_ok=True)
    ledger = Ledger(state / "ledger.jsonl")
    found = None if method == DENSE else _found(problem, method, seed, ledger, state, console)
    chosen = None if found is None else choose(problem, found)
    finished = finish(problem, chosen, seed=seed, state=state, console=console)
    rows = results_of(problem, [finished.row])["rows"]
    cell = {"row": rows[0], "ledger": ledger.rows}
    write_json_atomic(path, cell)
    shutil.rmtree(state, ignore_errors=True)
    return cell


def _found(problem: Problem, method: str, seed: int, ledger: Ledger, state: Path, console: Console) -> Found:
    if method in RULES:
        return score_rule(problem, method, ledger, seed)
    show = console.search(f"{method}, seed {seed}")
    return search(method, [problem], ledger, seed=seed, state=state / "search", progress=show)


def _results(problem: Problem, rows: list[Row]) -> dict[str, Any]:
    _add_latency(problem, rows)
    return results_of(problem, rows) | {"summary": summarise(rows)}


def _add_latency(problem: Problem, rows: Sequence[Row], budget_seconds: float = 15.0) -> None:
    """Measured in turns at the end, once for all rows of the same widths; only the shapes matter."""
    widths = list(dict.fromkeys(tuple(row["widths"]) for row in rows))
    evaluator, language = problem.evaluator, problem.workload.language
    shared: dict[str, Any] = {}  # twenty copies of a language model's embeddings would not fit
    models = {
        str(i): prune(problem.workload.model, evaluator.plan(w), shared=shared if language else None)
        for i, w in enumerate(widths)
    }
    times = measure(
        models,
        problem.workload.example_inputs,
        batch_sizes=(1,) if language else DEFAULT_BATCH_SIZES,  # as in `finish.add_latency`
        budget_seconds=budget_seconds,
    )
    for row in rows:
        found = times[str(widths.index(tuple(row["widths"])))]
        row["latency_ms"] = {str(batch): round(ms, 4) for batch, ms in found.items()}


def _write(folder: Path, results: dict[str, Any], lines: Sequence[Row]) -> None:
    text = "".join(json.dumps(line | {"index": index}) + "\n" for index, line in enumerate(lines))
    write_text_atomic(folder / "ledger.jsonl", text)
    write_json_atomic(folder / "results.json", results)
    write_text_atomic(folder / "benchmark.md", f"{markdown(results)}\n\n{report.markdown(results)}\n")
    shown = [
        {"method": entry["method"], **{k: entry["score"][k] for k in ("values", "mean", "low", "high")}}
        for entry in results["summary"]
    ]
    unit = report.SCORE_UNITS[results["score"]]
    write_bytes_atomic(folder / "benchmark.png", plots.to_png(plots.comparison(shown, unit)))
    report.build(folder)


def _spread(values: Sequence[Any]) -> Row:
    """Mean, range, 95% interval of the mean and the values themselves; null where one is missing."""
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    if len(numbers) < len(values) or not np.isfinite(numbers).all():
        return {"mean": None, "min": None, "max": None, "low": None, "high": None, "values": list(values)}
    array = np.array(numbers)
    low, high = bootstrap(lambda index: float(array[index].mean()), len(array))
    return {
        "mean": float(array.mean()),
        "min": float(array.min()),
        "max": float(array.max()),
        "low": low,
        "high": high,
        "values": numbers,
    }


def _difference(ours: Mapping[int, Row], theirs: Mapping[int, Row]) -> Row:
    """Score differences on the seeds that both have."""
    both = [seed for seed in ours if seed in theirs]
    differences = [ours[seed]["score"] - theirs[seed]["score"] for seed in both]
    return _spread(differences) | {"wins": sum(d > 0 for d in differences), "seeds": len(both)}


def _mean(rows: Mapping[int, Row], field: str) -> float:
    return float(np.mean([row[field] for row in rows.values()]))


def _range(spread: Row) -> str:
    if spread["mean"] is None:
        return "–"
    if spread["min"] == spread["max"]:
        return f"{spread['mean']:.4f}"
    return f"{spread['mean']:.4f} [{spread['min']:.4f}, {spread['max']:.4f}]"


def _against(difference: Row | None) -> str:
    if difference is None or difference["mean"] is None:
        return "–"
    return f"{difference['mean']:+.4f} ({difference['wins']}/{difference['seeds']})"


def _brief(row: Row) -> str:
    test = row.get("test_finetuned")
    return f"score {row['score']:.4f}" + (
        f", test after the fine-tune {test:.4f}" if test is not None else ""
    )
