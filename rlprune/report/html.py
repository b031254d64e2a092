"""report.html: one file without any outside resource, rebuilt from what a run recorded.

Read from the run's folder: `results.json` (needed), and where they exist `ledger.jsonl` (learning curve),
`outcomes.safetensors` (intervals), `config.yaml`, `pruned/plan.json` and `budgets.json` (quality against budget).
The page is made from templates that escape all that they are given, and lets the browser run no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError, described
from ..utils.dotted import flat
from ..utils.files import write_text_atomic
from ..utils.reading import read_bytes, read_json
from ..utils.values import is_finite
from . import benchmark, comparison, pictures, tables, words
from .comparison import score_unit
from .decision import Compared, Decision, cost_label, costs_of, decide, rival_words, sentence
from .results import (
    Results,
    as_list,
    as_mapping,
    best,
    best_rule,
    budget_points,
    kind_of,
    learned,
    learning_curves,
    read_ledger,
    read_results,
)
from .svg import Picture
from .tables import markdown, markdown_table

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["build", "markdown", "markdown_table", "render"]

_TEMPLATES = Path(__file__).parent / "templates"


def build(run_dir: str | Path) -> Path:
    """Write RUN/report.html from the run's files and return its path.

    Raises:
        ArtifactError: results.json is missing, damaged or newer than this version reads.
    """
    folder = Path(run_dir)
    results = read_results(folder)
    target = folder / "report.html"
    try:
        page = render(results, folder)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # What a benchmark wrote is drawn as it stands; an edited file may hold anything.
        raise ArtifactError(
            f"{folder / 'results.json'}: damaged: a figure is missing or of another kind ({described(error)})"
        ) from error
    write_text_atomic(target, page)
    return target


def render(results: Results, folder: Path) -> str:
    """The page's HTML text."""
    workload = as_mapping(results.get("workload"))
    config_path = folder / "config.yaml"
    header, rows, marked = tables.long(results)
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    views = comparison.per_budget(results)
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            title=f"rlprune: {workload.get('name', folder.name)}",
            style=(_TEMPLATES / "report.css").read_text(encoding="utf-8"),
            script=script,
            digest=digest,
            views=[_view(view, folder, len(views) > 1) for view in views],
            notes=comparison.notes(results),
            long={"header": header, "rows": rows, "marked": marked},
            commands=_commands(folder),
            facts=_facts(results, folder),
            versions=_versions(results, folder),
            config=read_bytes(config_path).decode(errors="replace") if config_path.is_file() else "",
        )
    )


def _view(results: Results, folder: Path, several: bool) -> dict[str, Any]:
    """What the page shows of one budget: of a run, or of a benchmark's methods."""
    decision = decide(results, folder)
    view: dict[str, Any] = {"heading": "", "lines": [], "tradeoffs": [], "charts": [], "table": None}
    view |= {"bars": [], "tables": [], "rule": "", "chosen": ""}
    if several:
        metric = words.cost_name(str(results["budget"]["metric"]))
        view["heading"] = f"{comparison.share(results)} of the {metric}"
    if results.get("summary"):
        return view | _benchmark(results)
    chosen, rule = learned(results), best_rule(results)
    view |= {"bars": tables.widths(results, chosen), "charts": _charts(results, folder)}
    view |= {"rule": str((rule or {}).get("method", "")), "chosen": str((chosen or {}).get("method", ""))}
    if decision is None:
        return view | {"lines": [headline(results)]}
    compared = Compared(results, folder)
    view["lines"] = [sentence(decision), rival_words(decision, compared.rows)]
    view["tradeoffs"] = _tradeoffs(results, compared, decision)
    view["table"] = tables.short(results, compared, decision)
    return view


def _tradeoffs(results: Results, compared: Compared, decision: Decision) -> list[list[Picture]]:
    """Quality against the latencies, and against the other costs: two sets of pictures of which one is seen each."""
    metric, rows = str(as_mapping(results.get("budget")).get("metric", "macs")), compared.rows
    rule = best_rule(results)
    found: list[list[Picture]] = [[], []]
    for key in costs_of(decision.dense, metric):
        places = []
        for index, row in enumerate(rows):
            cost, quality = costs_of(row, metric).get(key), compared.quality(row)
            if cost is None or quality is None:
                continue
            change = None if row is not decision.chosen else compared.change(row, decision.dense)
            ends = _ends(compared, decision, change)
            role = "chosen" if row is decision.chosen else tables.role_of(row)
            name = tables.label_of(row, rows)
            title = f"{name}: {words.quality(quality, compared.metric)}, {words.amount(cost, key)}"
            named = role in ("dense", "chosen") or row is rule or index in decision.rivals
            places.append(pictures.Place(name, cost, quality, role, title, f"row{index}", named, *ends))
        if len(places) > 1:
            unit, scale = words.unit_of(max(place.cost for place in places), key)
            label = cost_label(key)
            share = words.is_share(compared.metric)
            scaled = [pictures.rescaled(place, scale) for place in places]
            picture = pictures.tradeoff(scaled, label, unit, compared.metric, compared.higher, share)
            found[not key.startswith("latency")].append(picture)
    return [group for group in found if group]


def _ends(compared: Compared, decision: Decision, change: Any) -> tuple[float | None, float | None]:
    """Where the interval of the chosen plan's metric ends, given that of its difference to the dense model."""
    if change is None or compared.kind != "metric" or decision.before is None:
        return None, None
    sign = 1 if compared.higher else -1
    ends = [decision.before + sign * end for end in (change.low, change.high)]
    if words.is_share(compared.metric):
        ends = [min(1.0, max(0.0, end)) for end in ends]
    return ends[0], ends[1]


def _charts(results: Results, folder: Path) -> list[Picture]:
    """Learning curve and quality against budget; one without data is left out."""
    found: list[Picture] = []
    unit = _score_unit(results)
    if curves := learning_curves(results, read_ledger(folder / "ledger.jsonl")):
        agents = [str(row["method"]) for row in as_list(results.get("rows")) if kind_of(row) == "agent"]
        found.append(pictures.learning(curves, _references(results), unit, agents))
    if points := budget_points(folder / "budgets.json"):
        metric = str(points[0].get("metric") or as_mapping(results.get("budget")).get("metric", "macs"))
        picture = pictures.budgets(points, words.cost_name(metric), unit)
        # A policy over a range of budgets is about this curve.
        found.insert(0 if as_mapping(results.get("budget")).get("range") else len(found), picture)
    return found


def _benchmark(results: Results) -> dict[str, Any]:
    """The pictures and tables that compare a benchmark's methods."""
    tables = [
        ("Every figure: mean [95% interval over the seeds]", *comparison.headline(results)),
        (
            "Paired differences: mean [95% interval] (seeds on which the method is better)",
            *comparison.paired(results),
        ),
        (comparison.EQUAL_SECONDS, *comparison.equal_seconds(results)),
    ]
    return {
        "lines": benchmark.sentences(results),
        "tradeoffs": benchmark.tradeoffs(results),
        "charts": benchmark.charts(results),
        "table": benchmark.short(results),
        "tables": [table for table in tables if table[2]],
    }


def _references(results: Results) -> dict[str, float]:
    references: dict[str, float] = {}
    rule = best_rule(results)
    if rule is not None:
        references[f"best rule: {rule['method']}"] = float(rule["score"])
    for row in as_list(results.get("rows")):
        if row.get("method") == "uniform" and is_finite(row.get("score")) and row is not rule:
            references.setdefault("uniform", float(row["score"]))
    return references


def _score_unit(results: Results) -> str:
    workload = as_mapping(results.get("workload"))
    return score_unit(results.get("score") or workload.get("score", "kl"), workload.get("task"))


def headline(results: Results) -> str:
    """What is known of a run without a dense model or a learned plan, in a sentence each."""
    sentences = []
    if asked := words.budget_words(as_mapping(results.get("budget"))):
        sentences.append(f"Budget: {asked}.")
    means = means_of(results)
    for label, kind in (("Dense", "dense"), ("Best rule", "rule"), ("Learned", "agent")):
        row = best(row for row in means if kind_of(row) == kind)
        if row is not None:
            facts = [f"{name} {value}" for name, value in _shown_quality(row) if value != words.NONE]
            method = "" if label == "Dense" else f" ({row['method']})"
            sentences.append(f"{label}{method}: {', '.join(facts) or 'not measured'}.")
    return " ".join(sentences)


def means_of(results: Results) -> list[dict[str, Any]]:
    """One row a method, the mean over its seeds; of a benchmark of several budgets at the first of them."""
    first = next((budget.get("asked") for budget in as_list(results.get("budgets"))), None)
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for row in as_list(results.get("rows")):
        if row.get("budget") in (None, first):
            by_method.setdefault(row["method"], []).append(row)
    return [
        dict(found[0])
        | {
            name: sum(row[name] for row in found) / len(found)
            for name in ("score", "test", "test_finetuned")
            if all(is_finite(row.get(name)) for row in found)
        }
        for found in by_method.values()
    ]


def _shown_quality(row: Mapping[str, object]) -> list[tuple[str, str]]:
    return [
        ("score", words.number(row.get("score"))),
        ("test", words.number(row.get("test"))),
        ("test after the fine-tune", words.number(row.get("test_finetuned"))),
    ]


def _commands(folder: Path) -> list[tuple[str, str]]:
    """What to type in the run's folder to load, check, export and reuse what lies in it: (what it does, lines)."""
    pruned = folder / "pruned"
    plan = _plan(folder)
    if not plan:
        return []
    given = as_mapping(plan.get("base")).get("source") == "given"
    call = (
        'rlprune.load("pruned", base=model)  # model: yours, as it was before'
        if given
        else 'rlprune.load("pruned")'
    )
    found = [("Load it, a torch.nn.Module in eval mode", f"import rlprune\n\nslim = {call}")]
    transformers = (pruned / "modeling_rlprune.py").is_file()
    if transformers:
        lines = "from transformers import AutoModelForCausalLM\n\n"
        lines += 'slim = AutoModelForCausalLM.from_pretrained("pruned", trust_remote_code=True)'
        found.append(("The same without rlprune", lines))
    if (pruned / "load_pruned.py").is_file():
        found.append(("The same without rlprune", "python pruned/load_pruned.py"))
    if not given and (folder / "config.yaml").is_file():
        found.append(("Measure it again", "rlprune evaluate pruned config.yaml"))
        to = "hf" if transformers else "onnx"
        found.append(
            ("Export it (`rlprune list formats`)", f"rlprune export pruned --to {to} --out exported")
        )
        if (folder / "policy").is_dir():
            line = "rlprune apply policy config.yaml --checkpoint other.safetensors --out other-pruned"
            found.append(("Prune another checkpoint, without a search", line))
    return found


def _plan(folder: Path) -> Mapping[str, Any]:
    try:
        return as_mapping(read_json(folder / "pruned" / "plan.json"))
    except ArtifactError:
        return {}


def _facts(results: Results, folder: Path) -> list[tuple[str, str]]:
    """What was run, apart from the versions of libraries."""
    sections = [
        (name, as_mapping(results.get(name)))
        for name in ("workload", "budget", "hardware", "importance", "scoring")
    ]
    plan = _plan(folder)
    wanted = ("version", "fingerprint", "costs", "inexact")
    sections.append(("pruned model", {key: plan[key] for key in wanted if key in plan}))
    return [
        (f"{section}: {key}", _words(value))
        for section, values in sections
        for key, value in flat(values).items()
        if value != {} and "libraries" not in key
    ]


def _versions(results: Results, folder: Path) -> list[tuple[str, str]]:
    """Versions of the libraries that the run used, and that wrote the pruned model."""
    plan = _plan(folder)
    named = [*as_mapping(as_mapping(results.get("hardware")).get("libraries")).items()]
    saved = as_mapping(plan.get("libraries")) or as_mapping(plan.get("versions"))
    return [
        *((str(k), str(v)) for k, v in named),
        *((f"{k} (pruned model)", str(v)) for k, v in saved.items()),
    ]


def _words(value: object) -> str:
    return words.number(value, 6) if isinstance(value, float) else str(value)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
