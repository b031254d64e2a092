"""The committed results of `rlprune benchmark` -> docs/results.md with its figures, and the README's table.

    rlprune benchmark digits --budgets 0.5 0.3 --checkpoints 5 --evaluations 100 --jobs 2 --out runs/digits-benchmark
    python docs/scripts/results.py --take runs/digits-benchmark --commit HASH

--take copies a run's results.json, in a compact form, to docs/results/NAME.json (NAME is that of the shipped config,
or --variant's where the model is another), with the commit whose code the run was of; without it the page is written
anew from what is there. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlprune import load_config
from rlprune.benchmarks import difference, spread
from rlprune.report import comparison, markdown_table, plots, read_results

EVALUATIONS = 100
DOCS = Path(__file__).resolve().parents[1]
# What was measured with code whose defaults were others (the page says which), and is to be measured again.
STALE = "f31af48 or before"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


@dataclass(frozen=True)
class Wanted:
    """Budgets and seeds of a shipped config, of searches of `EVALUATIONS`, and further options of the command."""

    config: str
    budgets: tuple[str, ...]
    seeds: int
    options: str = ""
    variant: str = ""

    @property
    def name(self) -> str:
        """Of the file in docs/results/: the variant's, where it is not the config as it was shipped."""
        return self.variant or self.config

    def missing(self, results: Mapping[str, Any]) -> list[str]:
        """The budgets that the results lack, or have fewer seeds, shorter searches or other defaults of."""
        protocol = results.get("protocol", {})
        enough = protocol.get("seeds", 0) >= self.seeds and protocol.get("evaluations", 0) >= EVALUATIONS
        fresh = enough and results.get("commit") != STALE
        taken = {str(budget["asked"]) for budget in results.get("budgets", ())} if fresh else ()
        return [budget for budget in self.budgets if budget not in taken]

    def command(self, budgets: Sequence[str]) -> str:
        """What measures them."""
        words = f"rlprune benchmark {self.config} --budgets {' '.join(budgets)} --evaluations {EVALUATIONS}"
        options = f" {self.options}" if self.options else ""
        return f"{words} --seeds {self.seeds}{options} --out runs/{self.name}"


_CIFAR = "--set data.root=cifar10-jpeg model.checkpoint=resnet{depth}_cifar10.safetensors"
_MOBILENET = (
    "--checkpoints 3 --set model.name=mobilenet_v2 'model.arguments={width_mult: 0.25}' model.train.lr=0.05 "
    "score.samples=null"
)
_GOOGLENET = "--set model.name=cifar_googlenet 'model.arguments={width: 0.125}'"
# What the page names as open, with the command, until as much has been taken; a GPU makes it an hour's work.
WANTED = (
    Wanted("digits", ("0.5", "0.3"), 5, "--checkpoints 5 --jobs 2"),
    # A file of its own: the one without a variant holds the other budget.
    Wanted("fashion_mnist_resnet20", ("0.5",), 3, "--checkpoints 3", "fashion_mnist_resnet20-half"),
    Wanted("fashion_mnist_resnet20", ("0.3",), 3, "--checkpoints 3"),
    Wanted("fashion_mnist_resnet20", ("0.5",), 3, _MOBILENET, "fashion_mnist_mobilenet_v2"),
    Wanted("fashion_mnist_resnet20", ("0.5",), 3, _GOOGLENET, "fashion_mnist_googlenet"),
    Wanted("tiny_llama", ("0.5",), 3, "--checkpoints 3"),
    Wanted("cifar10_resnet20", ("0.5",), 3, _CIFAR.format(depth=20)),
    Wanted("cifar10_resnet56", ("0.5",), 3, _CIFAR.format(depth=56)),
    Wanted("smollm2_135m", ("0.8",), 3),
)
_SETTINGS = ("version", "config", "settings", "protocol")
KEPT = ("commit", *_SETTINGS, "workload", "budget", "score", "hardware", "groups", "budgets")


def take(run: Path, folder: Path, variant: str | None = None, commit: str | None = None) -> Path:
    """Copy a run's results with the settings that differ from the shipped config; one row or entry a line.

    ``commit`` is that of the code that the run was of.
    """
    config = load_config(run / "config.yaml")
    results = read_results(run) | {
        "config": config.name,
        "settings": changed(config.to_dict(), config.name),
    }
    results |= {"commit": commit} if commit else {}
    if not variant and any(key.startswith(("model.name", "model.arguments")) for key in results["settings"]):
        raise SystemExit(f"{run}: another model than that of {config.name}: give it a name with --variant")
    for split in results["workload"].get("protocol", {}).get("splits", {}).values():
        split["text"] = Path(split["text"]).name  # where a file lay is nobody's business
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{variant or config.name}.json"
    target.write_text(compact(results), encoding="utf-8")
    return target


def compact(results: Mapping[str, Any]) -> str:
    """Results as a JSON text, one row or entry a line."""
    lines = [f'"{key}": {json.dumps(results[key])}' for key in KEPT if key in results]
    for key in ("rows", "summary"):
        lines.append(f'"{key}": [\n' + ",\n".join(json.dumps(row) for row in results[key]) + "\n]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def with_intervals(value: Any) -> Any:
    """A summary with every mean's interval computed anew from its values."""
    if isinstance(value, list):
        return [with_intervals(item) for item in value]
    if not isinstance(value, dict):
        return value
    if {"mean", "low", "high", "values"} <= value.keys():
        return value | {
            bound: found for bound, found in spread(value["values"]).items() if bound in ("low", "high")
        }
    return {key: with_intervals(item) for key, item in value.items()}


def changed(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Settings by dotted name that are not those of the shipped config of this name."""
    ours, theirs = dotted(settings), dotted(load_config(name).to_dict())
    given = ("search.evaluations", "budget.target")  # options of the command, told with it
    return {k: v for k, v in ours.items() if theirs.get(k) != v and k not in given}


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        # The arguments of a model are another model's as a whole.
        deeper = isinstance(value, Mapping) and key != "arguments"
        found |= dotted(value, f"{prefix}{key}.") if deeper else {prefix + key: value}
    return found


def command(name: str, results: Mapping[str, Any]) -> str:
    """The command that measures these results."""
    protocol = results["protocol"]
    words = ["rlprune benchmark", results.get("config", name), "--methods", ",".join(protocol["methods"])]
    words += ["--budgets", *[str(budget["asked"]) for budget in results["budgets"]]]
    words += [
        f"--seeds {protocol['seeds']} --evaluations {protocol['evaluations']} --jobs {protocol['jobs']}"
    ]
    if protocol.get("checkpoints", 1) > 1:
        words.append(f"--checkpoints {protocol['checkpoints']}")
    if results["settings"]:
        words += ["--set", *[shlex.quote(f"{k}={plain(v)}") for k, v in results["settings"].items()]]
    return " ".join(words)


def plain(value: Any) -> Any:
    """A setting as the command line reads it back: null and mappings in YAML's words."""
    return json.dumps(value) if value is None or isinstance(value, dict | bool) else value


def verdict(results: Mapping[str, Any], agent: str = "ppo") -> list[str]:
    """A line for each method that searches: is the agent's mean test loss below it, and with what certainty."""
    summary = {entry["method"]: entry for entry in results["summary"]}
    if agent not in summary or summary[agent]["test_loss"]["mean"] is None:
        return []
    lines = []
    for field, when in (("test_loss", "before"), ("test_loss_finetuned", "after")):
        ours = summary[agent][field]
        if ours["mean"] is None:
            continue
        below = [n for n, e in summary.items() if n != agent and ours["mean"] < e[field]["mean"]]
        above = [n for n in summary if n != agent and n not in below]
        lines.append(
            f"- {agent}'s mean test loss {when} the fine-tune is {comparison.interval(ours)}: below that of "
            f"{len(below)} of {len(below) + len(above)} methods"
            + (f"; **not** below {', '.join(above)}." if above else ".")
        )
    for reference, what in (("best rule", "the best rule"), ("random", "random search")):
        found = summary[agent]["against_loss"].get(reference)
        if found is not None:
            lines.append(
                f"- Paired by seed, its test loss minus that of {what} is {found['mean']:+.4f} "
                f"[{found['low']:+.4f}, {found['high']:+.4f}], lower on {found['wins']} of {found['seeds']} seeds."
            )
    needed = summary[agent].get("evaluations_to_random")
    if needed and needed["seeds"]:
        total = results["protocol"]["evaluations"]
        median = (
            "never"
            if needed["median"] is None
            else f"after {needed['median']:g} of {total} evaluations (median)"
        )
        lines.append(
            f"- It reaches the score that random search ends with {median}, on {needed['reached']} of "
            f"{needed['seeds']} seeds."
        )
    return lines


def duels(results: Mapping[str, Any], agent: str = "ppo") -> comparison.Table:
    """Header and rows: the agent minus every other search under the same seed, mean [95% interval] (seeds won)."""
    fields = {"test_loss": "test loss", "test_loss_finetuned": "test loss, fine-tuned", "score": "score"}
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in results["rows"]:
        if row["kind"] not in ("dense", "rule"):
            found.setdefault(row["method"], {})[row["seed"]] = row
    header = [f"{agent} minus", *fields.values()]
    others = [entry["method"] for entry in results["summary"] if entry["method"] in found]
    return header, [
        [name]
        + [
            comparison.against(difference(found[agent], found[name], field, higher=field == "score"))
            for field in fields
        ]
        for name in others
        if name != agent and agent in found
    ]


def section(name: str, results: Mapping[str, Any], folder: Path) -> str:
    """Everything about one workload; draws its figures into ``folder``."""
    workload, hardware, protocol = results["workload"], results["hardware"], results["protocol"]
    sizes = ", ".join(f"{count} {split}" for split, count in workload["sizes"].items())
    parts = [
        f"## {workload['name']}\n",
        f"{protocol['seeds']} seed{'s' if protocol['seeds'] > 1 else ''}, {_models(protocol)}, "
        f"{protocol['evaluations']} evaluations for each search; {sizes} samples; "
        f"{hardware['device']} ({hardware['processor']}, {protocol['jobs']} processes of {hardware['threads']} "
        f"threads), torch {hardware['libraries'].get('torch', 'unknown')}{_code(results)}.\n",
        f"```sh\n{command(name, results)}\n```\n",
    ]
    if dense := [row for row in results["rows"] if row["method"] == "dense"]:
        names = ("test_loss", "test", "test_loss_finetuned", "test_finetuned")
        loss, metric, tuned_loss, tuned = (sum(row[n] for row in dense) / len(dense) for n in names)
        parts.append(
            f"Dense: test loss {loss:.4f}, {workload['metric']} {metric:.4f}; after the same fine-tune "
            f"{tuned_loss:.4f} and {tuned:.4f}.\n"
        )
    for view in comparison.per_budget(results):
        share = comparison.share(view)
        parts.append(f"### {share} of the {view['budget']['metric']}\n")
        parts += [*verdict(view), ""]
        for kind, figure, text in comparison.figures(view):
            file = f"{name}-{share.rstrip('%')}-{kind}.png"
            plots.to_png(figure, folder / file)
            parts.append(f"![{text}]({folder.name}/{file})\n")
        parts += [markdown_table(*comparison.headline(view)), ""]
        parts += [markdown_table(*comparison.paired(view)), ""]
        if (table := duels(view))[1]:
            parts += [markdown_table(*table), ""]
        if (table := comparison.equal_seconds(view))[1]:
            parts += [f"{comparison.EQUAL_SECONDS}:\n", markdown_table(*table), ""]
    parts += [f"- {note}" for note in comparison.notes(results)]
    return "\n".join(parts).rstrip() + "\n"


def _code(results: Mapping[str, Any]) -> str:
    return f"; code of commit {results['commit']}" if "commit" in results else ""


def _models(protocol: Mapping[str, Any]) -> str:
    count = protocol.get("checkpoints", 1)
    if count == 1:
        return "one dense model"
    own = "of its own weights and splits"
    return (
        f"each with a dense model {own}"
        if count == protocol["seeds"]
        else f"{count} dense models, each {own}"
    )


def overview(every: Mapping[str, Mapping[str, Any]]) -> comparison.Table:
    """Header and rows: for each workload and budget the test loss before / after the fine-tune, and the evaluations."""
    header = [
        "workload, budget",
        "seeds",
        "best rule",
        "random search",
        "best other search",
        "PPO",
        "evaluations of PPO",
    ]
    rows = []
    for results in every.values():
        for view in comparison.per_budget(results):
            summary = {entry["method"]: entry for entry in view["summary"]}
            if "ppo" not in summary:
                continue
            rule = next((name for name, entry in summary.items() if entry["best_rule"]), None)
            others = [n for n, e in summary.items() if e["kind"] != "rule" and n not in ("ppo", "random")]
            other = min(others, key=lambda n: summary[n]["test_loss"]["mean"], default=None)
            cells = [_losses(summary, name, name) for name in (rule, other)]
            needed = _needed(summary["ppo"].get("evaluations_to_random"), view["protocol"]["evaluations"])
            budget = f"{comparison.share(view)} of the {view['budget']['metric']}"
            name, seeds = f"{view['workload']['name']}, {budget}", str(view["protocol"]["seeds"])
            ours, random = (_losses(summary, method) for method in ("ppo", "random"))
            rows.append([name, seeds, cells[0], random, cells[1], ours, needed])
    return header, rows


def _losses(summary: Mapping[str, Any], name: str | None, mark: str = "") -> str:
    if name is None or name not in summary:
        return "–"
    means = [summary[name][field]["mean"] for field in ("test_loss", "test_loss_finetuned")]
    text = " / ".join("–" if mean is None else f"{mean:.3f}" for mean in means)
    return f"{text} ({mark})" if mark else text


def _needed(found: Mapping[str, Any] | None, evaluations: int) -> str:
    if not found or not found["seeds"]:
        return "–"
    return "never" if found["median"] is None else f"{found['median']:g} of {evaluations}"


def still_open(every: Mapping[str, Mapping[str, Any]]) -> str:
    """What has not been measured, with the command."""
    missing = {wanted: wanted.missing(every.get(wanted.name, {})) for wanted in WANTED}
    lines = [wanted.command(budgets) for wanted, budgets in missing.items() if budgets]
    if not lines:
        return ""
    text = "\n".join(lines)
    return (
        "## Open\n\nNot measured for this page, or with older code, fewer seeds or evaluations, with the command that "
        "does it; checkpoint and data have to be in place:\n\n"
        f"```sh\n{text}\n```\n"
    )


def after_finetune(every: Mapping[str, Mapping[str, Any]]) -> comparison.Table:
    """Header and rows of the README's table: test accuracy after the fine-tune, in percent with its 95% interval.

    The rule and the search are the best by this very column, chosen afterwards: the comparison favours them.
    """
    header = [
        "network, data, MACs left",
        "seeds",
        "evaluations",
        "dense",
        "best rule",
        "best other search",
        "PPO",
        "PPO − best rule",
    ]
    views = [view for results in every.values() for view in comparison.per_budget(results)]
    return header, [_row_after_finetune(view) for view in views if _is_tuned(view)]


def _is_tuned(view: Mapping[str, Any]) -> bool:
    """Whether the fine-tune changed anything, and PPO took part."""
    changed = any(entry["test_finetuned"]["mean"] != entry["test"]["mean"] for entry in view["summary"])
    return changed and any(entry["method"] == "ppo" for entry in view["summary"])


def _row_after_finetune(view: Mapping[str, Any]) -> list[str]:
    tuned = {entry["method"]: entry["test_finetuned"] for entry in view["summary"]}
    rules = [entry["method"] for entry in view["summary"] if entry["kind"] == "rule"]
    searches = [name for name in tuned if name not in rules and name != "ppo"]
    rule, other = (max(names, key=lambda n: tuned[n]["mean"]) for names in (rules, searches))
    by_seed = [{row["seed"]: row for row in view["rows"] if row["method"] == name} for name in ("ppo", rule)]
    dense = [row["test_finetuned"] for row in view["rows"] if row["method"] == "dense"]
    return [
        f"{view['workload']['name'].replace(' on ', ', ')}, {comparison.share(view)}",
        str(view["protocol"]["seeds"]),
        str(view["protocol"]["evaluations"]),
        f"{100 * sum(dense) / len(dense):.1f}",
        f"{percent(tuned[rule])} {rule}",
        f"{percent(tuned[other])} {other}",
        percent(tuned["ppo"]),
        percent(difference(*by_seed, "test_finetuned", higher=True), "+"),
    ]


def percent(spread: Mapping[str, Any], sign: str = "") -> str:
    """Mean [95% interval] in percent; the mean alone where there is one seed."""
    mean, low, high = (f"{100 * spread[name]:{sign}.1f}" for name in ("mean", "low", "high"))
    return mean if len(spread["values"]) == 1 else f"{mean} [{low}, {high}]"


def write_readme(readme: Path, every: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the table of what is left after the fine-tune between the marks of the README."""
    text = markdown_table(*after_finetune(every))
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def write(folder: Path, docs: Path) -> None:
    """The page of all results in ``folder``, with the figures next to them, and the README's table."""
    files = sorted(folder.glob("*.json"))
    every = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    parts = [markdown_table(*overview(every)), ""]
    parts += [section(name, results, folder) for name, results in every.items()]
    text = PAGE.format(parts="\n".join([*parts, still_open(every)]))
    (docs / "results.md").write_text(text, encoding="utf-8")
    readme = docs.parent / "README.md"
    if readme.exists():
        write_readme(readme, every)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--take", nargs="+", type=Path, default=[], metavar="RUN")
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="with --take of one run: its name, where the config's name would mislead",
    )
    parser.add_argument("--commit", metavar="HASH", help="with --take: the commit that the runs are of")
    parser.add_argument(
        "--intervals",
        action="store_true",
        help="compute the intervals of what is there anew, where their method has changed",
    )
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder that the page is written into")
    arguments = parser.parse_args(argv)
    if arguments.variant and len(arguments.take) != 1:
        parser.error("--variant: names one run; --take has to name it")
    folder = arguments.docs / "results"
    for run in arguments.take:
        print(f"taken: {take(run, folder, arguments.variant, arguments.commit)}")
    if arguments.intervals:
        for path in sorted(folder.glob("*.json")):
            results = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(
                compact(results | {"summary": with_intervals(results["summary"])}), encoding="utf-8"
            )
    write(folder, arguments.docs)
    print(f"written: {arguments.docs / 'results.md'}")
    return 0


PAGE = """# Results

Written by `python docs/scripts/results.py` from the results of `rlprune benchmark` in `docs/results/`.

Every method goes through the same door: the same dense models, groups, recovery, score and final fine-tune. A search
may have so many distinct plans scored, its starts (uniform and the rules) and a rule's probes included; a plan that
another method has scored costs it an evaluation all the same. Validation chooses the plan, with no rule as a fallback;
the test split is read once for each row, at the end. Seeds are paired: a seed decides a method's search and its
fine-tune, and with several dense models also which of them is pruned; with one, a rule's plan is the same for every
seed and its fine-tune is not.

Cells hold the mean over the seeds and its 95% interval (BCa bootstrap: too narrow for a handful of seeds).
"Evaluations to random's score" is the median over the seeds of how many evaluations a method needed for the score
that random search ended with under the same seed; in brackets the interval and on how many seeds it got there.
"Mean best score" is the area under the curve of the best score so far. Differences are paired by seed; in brackets the
seeds on which the method is strictly better. Seconds are those of the search, whatever else ran on the machine,
with every plan's own time even where another method had scored it before; the evaluations of one search are taken to
last equally long where methods are compared at equal seconds, which counts a search short whose own computations grow
with what it knows, as PPO's do.

Every section names the commit whose code it was measured with. SmolLM2 has two: one of 64 calibration sequences of 128
tokens, the shipped config's then (`data.calibration=64 data.sequence_length=128`), and one of today's 256 of 256, whose
searches are short and are paid by 8 validation sequences: PPO is not ahead of `fisher`, which reads no score.
Searches start from one rule that scores single groups where it takes a third of the evaluations at most,
`fisher_probed` under `obs_fisher`. That, and how surely PPO picks, was chosen by scores and test losses of one to
three models of digits and CIFAR-10, so that their figures are no held-out ones for this choice. CIFAR-10, GoogLeNet
and MobileNetV2 are scored on all validation images (`score.samples=null`), because scores of a part promise too much.
For GoogLeNet that was decided after a first run on the 500 images of the shipped config, in which `evopress` was
ahead ([negative-results.md](negative-results.md), "Benchmarks that are not on the page"). MobileNetV2 learns at a
rate of 0.05, because one of its three models did not train at the shipped config's. Its section alone is of code
whose step `bn` leaves models as they are that the images' own batch-norm statistics would change, which is what
MobileNetV2 gains most by.

In short: the test loss before / after the same fine-tune (means), and how many evaluations PPO needs for the score
that random search ends with.

{parts}"""

if __name__ == "__main__":
    sys.exit(main())
