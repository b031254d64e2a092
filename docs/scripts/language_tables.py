"""Tables of docs/language-results.md, from what `language.py` has measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlprune.report import markdown_table
from rlprune.utils import write_json_atomic, write_text_atomic

Rows = list[dict[str, Any]]
MORE = "more "  # before the keys of what was measured with more calibration tokens
FIRST = (64, 128)  # calibration sequences and the tokens of each, for all other rows


def write(args: argparse.Namespace) -> None:
    """The page --doc and its .json, which keeps every figure: what the --out and the --more folder hold goes there."""
    record = args.doc.with_suffix(".json")
    rows = {row["key"]: row for row in (json.loads(record.read_text()) if record.exists() else [])}
    for folder in (args.out, args.more):
        for row in _read(folder) if folder else []:
            short = {k: v for k, v in row.items() if k not in ("hardware", "curve")}
            key = _key(row)
            rows[key] = {**short, "key": key, "machine": _machine(row)}
    found = [row for key, row in rows.items() if not key.startswith(MORE)]
    more = [row for key, row in rows.items() if key.startswith(MORE)]
    machines = sorted({row["machine"] for row in rows.values()})
    lines = [
        "# Language models: perplexity after pruning, without a gradient step",
        "",
        "Written by `docs/scripts/language.py` (commands at its top; every figure is in "
        f"`{args.doc.with_suffix('.json').name}`). SmolLM2-135M-Instruct (Q4_1 GGUF, dequantised), WikiText-2. "
        "Calibration: 64 sequences of 128 tokens of the valid text, for every method alike; the search scores on "
        "16 other sequences of it, the final choice among 5 on 64; perplexity: the first 40 blocks of 256 tokens "
        "of the test text (10,200 scored tokens), in bfloat16 (columns of 512 tokens: float32). 10% and 20% are "
        "shares of all parameters, embeddings included. Neurons are cut one by one (`prune.round_to: 1`; the default "
        "is 32). One calibration seed: gaps of a few percent are ties. "
        f"1 thread of a core ({'; '.join(machines)}).",
        "",
        *_dense_lines(found),
        "## Every method as published, and the same units with a closed form",
        "",
        *_published_lines(found, args.budgets),
        *_sliced_lines(found),
        "## Every allocation under our ranking and our closed form",
        "",
        *_allocation_lines(found, args.budgets),
        *_more_lines(found, [row for row in more if not _is_tuned(row)]),
        *_tuned_lines([row for row in rows.values() if _is_tuned(row)]),
    ]
    write_text_atomic(args.doc, "\n".join(lines) + "\n")
    write_json_atomic(record, [rows[key] for key in sorted(rows)])
    print(f"written: {args.doc}")


def _key(row: dict[str, Any]) -> str:
    """Its own key; with what is different before it where calibration sequences or scores are not the first rows'."""
    size = row.get("calibration", FIRST[0]), row.get("length", FIRST[1])
    kind = row.get("kind", "kl")
    return row["key"] if (*size, kind) == (*FIRST, "kl") else f"{MORE}{size[0]} {size[1]} {kind} {row['key']}"


def _machine(row: dict[str, Any]) -> str:
    hardware = row["hardware"]
    return f"{hardware['processor']}, torch {hardware['libraries']['torch']}"


def _read(folder: Path) -> Rows:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def _name(row: dict[str, Any]) -> str:
    return str(row["key"].split(" ", 2)[2])


def _dense_lines(found: Rows) -> list[str]:
    dense = {row["key"]: row["test"] for row in found if row["key"].startswith("dense")}
    text = ", ".join(f"{value:.2f} in {key.split()[1]}" for key, value in dense.items())
    return [f"Dense: {text}.", ""]


def _published_lines(found: Rows, budgets: Sequence[float]) -> list[str]:
    rows = {row["key"]: row for row in found if row["key"].startswith("published")}
    methods = dict.fromkeys(_name(row) for row in sorted(rows.values(), key=lambda row: row["test"]))
    header = ["method"]
    for budget in budgets:
        cut = f"{1 - budget:.0%}"
        header += [f"{cut}: as published", f"{cut}: + our closed form"]
    lines = []
    for method in methods:
        cells = [method]
        for budget in budgets:
            row = rows.get(f"published {budget} {method}", {})
            cells += [_number(row.get(field)) for field in ("test", "ours")]
        lines.append(cells)
    note = (
        "As published: own ranking, own allocation, own compensation (FLAP: bias), one shot. Our closed form: ridge "
        "1e-3 of the mean diagonal and 0.2 of each input's own second moment (`recovery.shrink`) on the same units."
    )
    return [markdown_table(header, lines), "", note, ""]


def _sliced_lines(found: Rows) -> list[str]:
    rows = [row for row in found if row["key"].startswith("sliced")]
    if not rows:
        return []
    header = ["SliceGPT keeps", "hidden width", "parameters of the dense model's", "perplexity"]
    lines = [
        [
            f"{row['budget']:.0%} of the {row['measure']}",
            str(row["width"]),
            f"{row['parameters']:.1%}",
            _number(row["test"]),
        ]
        for row in sorted(rows, key=lambda row: -row["width"])
    ]
    note = (
        "SliceGPT (arXiv 2401.15024) keeps directions of the hidden states, not units: it is compared here and not "
        "built into the package ([published.md](published.md)). Principal components of each block's inputs, measured "
        "behind those that are cut already, a matrix in every shortcut, the head whole, one shot, as its authors' code "
        "has it, but for the mean that it takes off each embedding, which changes a model of RMS norms; computed as a "
        "dense model with projected hidden states, which gives the same answers, in float32. "
        "Its authors measure by the width. By parameters it loses here: SmolLM2's embeddings and head are one matrix "
        "and become two, and the shortcuts' matrices are large next to narrow layers."
    )
    return ["### SliceGPT", "", markdown_table(header, lines), "", note, ""]


def _allocation_lines(found: Rows, budgets: Sequence[float]) -> list[str]:
    rules = sorted({row["rule"] for row in found if row["key"].startswith("allocation")})
    methods = [m for m in ("random", "ppo") if any(row.get("method") == m for row in found)]
    table: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for name in [*rules, *methods]:
        table[name] = {
            b: [
                row
                for row in found
                if row["key"] == f"allocation {b} {name}" or row["key"].startswith(f"search {b} {name} ")
            ]
            for b in budgets
        }
    header = ["allocation"]
    for budget in budgets:
        header += [f"{1 - budget:.0%}: score", f"{1 - budget:.0%}: perplexity", "seeds"]
    last = budgets[-1]
    order = sorted(table, key=lambda n: -_mean([r["score"] for r in table[n][last]]))
    lines = []
    for name in order:
        cells = [name]
        for budget in budgets:
            own = table[name][budget]
            cells += [
                _spread([r["score"] for r in own], 3),
                _spread([r["test"] for r in own], 2),
                str(len(own)),
            ]
        lines.append(cells)
    spent = sorted({row["evaluations"] for row in found if row["key"].startswith("search")})
    note = (
        "Ranking `obs_fisher`, recovery `reconstruct` with shrink 0.2. Score: -KL(dense || pruned) on the "
        f"validation sequences of the search, in nats. random and ppo: {', '.join(map(str, spent))} evaluations each, "
        "the rules that need no further passes over the model among their starts (fisher too); the score is that "
        "of the plan whose perplexity is shown, chosen among the best 5 on 64 sequences; mean [lowest, highest] over "
        "the seeds."
    )
    return [markdown_table(header, lines), "", note, ""]


def _more_lines(found: Rows, more: Rows) -> list[str]:
    """The methods that were also measured with more calibration tokens, next to their first figures."""
    if not more:
        return []
    before = {row["key"]: row for row in found}
    columns = [FIRST, *sorted({(row["calibration"], row["length"]) for row in more})]
    cells: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
    for row in more:
        kind, budget, name = row["key"].removeprefix(MORE).split(" ", 5)[3:]
        first = before.get(f"{kind} {budget} {name}", {})
        for field, label in _labels(kind, name, row):
            known = cells.setdefault((budget, label), {})
            known[row["calibration"], row["length"]] = row[field]
            if field in first and row.get("kind", "kl") == "kl":
                known[FIRST] = first[field]
    header = ["method", "removed", *(f"{count} of {length} tokens" for count, length in columns)]
    order = sorted(cells.items(), key=lambda item: (-float(item[0][0]), min(item[1].values())))
    lines = [
        [label, f"{1 - float(budget):.0%}", *(_number(known.get(column)) for column in columns)]
        for (budget, label), known in order
    ]
    note = (
        "Test perplexity when there are more calibration sequences, or longer ones, for every method of a column; "
        "validation sequences are as long as those. Searches (one seed) are paid by the divergence, or where that is "
        "said by the loss on 32 validation sequences, with the final choice among 3 plans; published methods "
        "have their own ranking, allocation and compensation, or our closed form on their units. "
        "Longer sequences were tried after the figures of shorter ones had been seen."
    )
    if any("plan" in row for row in more):
        note += " With 512 tokens PPO's plans are those that it found with 256."
    return ["## With more calibration tokens", "", markdown_table(header, lines), "", note, ""]


def _labels(kind: str, name: str, row: dict[str, Any]) -> list[tuple[str, str]]:
    """The fields of a row that are shown, and what stands before them."""
    if kind == "published":
        return [("test", f"{name}, as published"), ("ours", f"{name}, its units, our closed form")]
    if kind == "sliced":
        return [("test", f"SliceGPT, {row['budget']:.0%} of the {name}")]
    method = name.rpartition(" ")[0] if kind == "search" else name  # a search's name ends with its seed
    if kind == "search" and row.get("kind") == "loss":
        method += f", paid by the loss, {row['evaluations']} evaluations"
    return [("test", f"{method}, our ranking and closed form")]


def _is_tuned(row: dict[str, Any]) -> bool:
    return "steps" in row


def _tuned_lines(rows: Rows) -> list[str]:
    """A table for each number of steps and calibration split."""
    lines = []
    for steps, count, length in sorted({_tuned_by(row) for row in rows}):
        own = [row for row in rows if _tuned_by(row) == (steps, count, length)]
        lines += _tuned_table(own, steps, count, length)
    return ["## After an equal number of LoRA steps", "", *lines] if lines else []


def _tuned_by(row: dict[str, Any]) -> tuple[int, int, int]:
    return row["steps"], row.get("calibration", FIRST[0]), row.get("length", FIRST[1])


def _tuned_table(rows: Rows, steps: int, count: int, length: int) -> list[str]:
    tasks = rows[0]["tasks"]
    header = ["method", "perplexity before", f"after {steps} LoRA steps"]
    header += [f"{task['task']} (chance {task['chance']:.3f})" for task in tasks]
    lines = []
    for row in sorted(rows, key=lambda r: r["after"]):
        cells = [
            row["method"],
            _number(row["before"]),
            _number(row["after"]) if row["method"] != "dense" else "-",
        ]
        for task in row["tasks"]:
            cells.append(
                f"{task['acc']:.3f} ± {task['acc_stderr']:.3f} / {task['acc_norm']:.3f} ± {task['acc_norm_stderr']:.3f}"
            )
        lines.append(cells)
    first = rows[0]
    sequences = f"{first['batch']} sequences" if first["batch"] > 1 else "one sequence"
    note = (
        f"{1 - first['budget']:.0%} of the parameters removed, {count} calibration sequences of {length} tokens; LoRA "
        f"of rank 8 with distillation, {steps} steps of {sequences} of {length} tokens."
    )
    note += (
        " The steps read text of the test's kind (the valid text), which the dense model has not had: a figure may "
        "lie below the dense model's, and only those of one table compare."
    )
    if tasks:
        limit = f"first {first['limit']} questions of each file" if first["limit"] else "all questions"
        note += (
            f" Zero-shot on {limit}: accuracy by the answer's log-probability / by that divided by its length, each "
            "with its standard error."
        )
    if any(row.get("plan") for row in rows):
        note += " PPO's plan is that of its search with sequences of 256 tokens."
    if any(row["method"] == "FLAP" for row in rows):
        note += " FLAP as published: own ranking, allocation and biases."
    return [markdown_table(header, lines), "", note, ""]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("-inf")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{_mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"
