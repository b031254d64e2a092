"""Searches with workers: time with two, efficiency with many, quality of batches ahead -> docs/parallel-speed.md.

    python docs/scripts/parallel.py speed [--rounds 2]     # two processes against one, in turns: 4 minutes a round
    python docs/scripts/parallel.py many                   # candidates that sleep, 8 to 64 at a time: 10 minutes
    python docs/scripts/parallel.py quality                # search.ahead at equal evaluations, three seeds: 10 minutes
    python docs/scripts/parallel.py --write                # the page, from what is there; other sections stay

What has been measured is kept in --out, a file each, and not measured again: all of it can be stopped and goes on.
Run `speed` while nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rlprune import load_config
from rlprune.config import Config
from rlprune.evaluation import EvaluationLog, workers_of
from rlprune.execution import Shared
from rlprune.experiments import Experiment, prepare_experiment, run_agent, working
from rlprune.report import markdown_table

DOCS = Path(__file__).resolve().parents[1]
AGENTS = ("random", "evopress", "ppo")
# A candidate of 1 to 2 seconds on one thread: the digits at 32 pixels, a ResNet-20 of three times the width.
SLOW = (
    "data.image_size=32", "model.arguments.width=36", "model.train.epochs=1", "data.validation=400",
    "data.calibration=256", "threads=1",
)  # fmt: skip
SPEED_EVALUATIONS = 40
# A search, its agent, its settings, and the ratio that is asked for.
SPEED: dict[str, tuple[str, tuple[str, ...], float]] = {
    "random": ("random", (), 1.7),
    "evopress": ("evopress", (), 1.7),
    "ppo": ("ppo", (), 1.6),
    "ppo, search.ahead 1": ("ppo", ("search.ahead=1",), 1.6),
}
# Workers that sleep: seconds of a candidate, and candidates for each worker.
SLEEP = {"random": (5.0, 6), "evopress": (5.0, 6), "ppo": (10.0, 4)}
MANY = (8, 16, 64)
# In multiples of 16 a tiny Llama has so few plans that every search finds the same best one.
QUALITY = {"digits": ["budget.target=0.3"], "tiny_llama": ["budget.target=0.5", "prune.round_to=1"]}
AHEAD = (0, 1, 3)
SECTIONS = {
    "speed": "## Two workers on two cores",
    "many": "## Many workers",
    "quality": "## Batches ahead",
}
PAGE = """# What workers save

How to use workers: [parallel.md](parallel.md).

## Two workers on two cores

{speed_evaluations} evaluations of the digits at 32 pixels by a ResNet-20, the starts among them; each search in one
process and with two workers, in turns, a thread each; the median of the rounds' ratios. Workers have begun before
the clock starts. The last column is the machine's load at the end of a search, 1 to 2 where nothing else runs; with
more, the workers have less than the two cores. "With another": what a candidate takes while the other worker computes
one too; where that is longer, the two cores are not worth two, and no ratio can reach 2.
On {machine}.{note}

{speed}

## Many workers

Candidates of a small model that sleep for the rest of a fixed time; each worker is a thread of one process and
stands for a machine, so that what is measured is how well a search feeds them: the share of the workers' time that
went into candidates.
{many_note}

{many}

## Batches ahead

PPO with {evaluations} evaluations, the same seeds in all rows of a workload; scores are minus the divergence from the
dense model, higher is better.

{quality}

{quality_note}

Written by `python docs/scripts/parallel.py --write` from what `python docs/scripts/parallel.py speed many quality`
has measured.
"""
MANY_NOTE = (
    "`evopress` and `ppo` as shipped ask for 8 and 6 plans at a time, which keeps no more workers busy than that.\n"
    "PPO's own work between two batches, the fit and its steps, is done by the run's own process, a batch at a time:\n"
    "candidates have to take long enough for it. Here they take 10 seconds."
)


def kept(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file holds, or what is measured now and put there."""
    if not path.exists():
        found = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")
        print(
            path.stem,
            {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items() if k != "ledger"},
            flush=True,
        )
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def searched(experiment: Experiment, agent: str, seed: int = 0) -> dict[str, Any]:
    """One search: seconds on the wall, the ledger, and the best score."""
    ledger = EvaluationLog()
    started = time.perf_counter()
    found = run_agent(agent, [experiment], ledger, seed=seed)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in ledger.rows]
    seconds = [row["seconds"] for row in ledger.rows]
    return {
        "seconds": time.perf_counter() - started,
        "candidate": statistics.median(seconds),
        "evaluations": len(rows),
        "score": found.best.score,
        "load": os.getloadavg()[0],
        "ledger": rows,
    }


def speed(out: Path, rounds: int, evaluations: int) -> None:
    """Each search in one process and with two workers, in turns."""
    experiment = prepare_experiment(load_config("digits", [*SLOW, f"search.evaluations={evaluations}"]))
    for number in range(rounds):
        for label, (agent, settings, _) in SPEED.items():
            config = load_config("digits", [*SLOW, f"search.evaluations={evaluations}", *settings])
            here = replace(experiment, config=config, evaluator=experiment.evaluator.bare())
            kept(out / f"speed-{slug(label)}-serial-{number}.json", lambda e=here, a=agent: searched(e, a))  # type: ignore[misc]
            there = replace(experiment, config=config, evaluator=experiment.evaluator.bare())
            path = out / f"speed-{slug(label)}-processes-{number}.json"
            if not path.exists():
                with working(with_workers(config, 2), [there]):
                    warm(there)
                    kept(path, lambda e=there, a=agent: searched(e, a))  # type: ignore[misc]


def with_workers(config: Config, workers: int) -> Config:
    return replace(config, execution=replace(config.execution, engine="processes", workers=workers))


def warm(experiment: Experiment) -> None:
    """Both workers have begun and proved their dense model: a search of a candidate a minute would not see it."""
    widths = [experiment.rule_widths("uniform", budget=budget) for budget in (0.9, 0.91, 0.92, 0.93)]
    experiment.evaluator.prefetch(widths)
    for plan in widths:
        experiment.evaluator.evaluate(plan)


class Sleepers:
    """Machines whose candidates take a fixed time; each is a thread, and the real work is done by one at a time."""

    name = "sleepers"

    def __init__(self, workers: int, seconds: float) -> None:
        self.workers, self.seconds, self.asked = workers, seconds, 0
        self._pool, self._lock = ThreadPoolExecutor(workers), threading.Lock()

    def submit(self, work: Callable[..., Any], *arguments: object) -> Future[Any]:
        self.asked += 1
        plain = [a.value if isinstance(a, Shared) else a for a in arguments]
        return self._pool.submit(self._run, work, plain)

    def _run(self, work: Callable[..., Any], arguments: list[object]) -> Any:
        started = time.perf_counter()
        with self._lock:
            found = work(*arguments)
        time.sleep(max(0.0, self.seconds - (time.perf_counter() - started)))
        return found

    def drop(self, shared: Shared[Any]) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        self._pool.shutdown()


def wide(agent: str, workers: int) -> Iterator[tuple[str, list[str], int]]:
    """A label, settings that give so many workers enough to do, and candidates to be scored."""
    count = SLEEP[agent][1] * workers
    if agent == "random":
        yield "", [], count
    elif agent == "evopress":
        yield "", [], 48
        yield f"offspring {2 * workers}", [f"search.evopress.offspring={2 * workers}"], count
    else:
        yield "", [], 18
        ahead = -(-workers // 3) - 1
        yield f"ahead {ahead}", [f"search.ahead={ahead}"], count
        scores = ["search.ppo.surrogate=scores", f"search.batch={workers}", "search.ahead=1"]
        yield f"scores, batch {workers}, ahead 1", scores, count


def many(out: Path) -> None:
    """Efficiency of searches whose candidates sleep."""
    small = ["model.arguments.width=4", "model.train.epochs=2", "data.calibration=64", "data.validation=100"]
    experiment = prepare_experiment(load_config("digits", [*small, "threads=1"]))
    for agent in AGENTS:
        seconds = SLEEP[agent][0]
        for workers in MANY:
            for label, settings, count in wide(agent, workers):
                config = load_config(
                    "digits", [*small, "threads=1", f"search.evaluations={count + 14}", *settings]
                )
                name = slug(label) or "as-shipped"
                kept(
                    out / f"many-{agent}-{workers}-{name}.json",
                    lambda c=config, w=workers, s=seconds, a=agent: asleep(experiment, c, a, w, s),  # type: ignore[misc]
                )


def asleep(experiment: Experiment, config: Any, agent: str, workers: int, seconds: float) -> dict[str, Any]:
    here = replace(experiment, config=config, evaluator=experiment.evaluator.bare())
    names = here.start_rules()
    for name in names:  # every search has these; they cost nothing here
        here.evaluator.evaluate(here.rule_widths(name))
    executor = Sleepers(workers, seconds)
    here.evaluator.use_workers(workers_of(here.evaluator, executor))
    executor.asked = 0
    found = searched(here, agent)
    executor.close()
    slept = seconds * executor.asked
    found |= {"efficiency": slept / workers / found["seconds"], "workers": workers, "ledger": []}
    return found


def quality(out: Path, seeds: int, evaluations: int, names: Sequence[str], aheads: Sequence[int]) -> None:
    """The best score of PPO's search with batches ahead, by equal evaluations and seeds."""
    for name in names:
        own = QUALITY[name]
        settings = [*own, f"search.evaluations={evaluations}", "threads=1"]
        experiment: Experiment | None = None
        for seed in range(seeds):
            for ahead in aheads:
                path = out / f"quality-{name}-{evaluations}-{ahead}-{seed}.json"
                if path.exists():
                    continue
                experiment = experiment or prepare_experiment(load_config(name, settings))
                config = load_config(name, [*settings, f"search.ahead={ahead}"])
                here = replace(experiment, config=config, evaluator=experiment.evaluator.fork())
                kept(path, lambda e=here, s=seed: searched(e, "ppo", s) | {"ledger": []})  # type: ignore[misc]


def slug(label: str) -> str:
    return label.replace(" ", "-").replace(",", "").replace(".", "-")


def read(out: Path, pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob(pattern))]


def table_of(part: str, head: list[str], rows: list[list[str]]) -> str:
    return (
        markdown_table(head, rows) if rows else f"Not measured yet: `python docs/scripts/parallel.py {part}`."
    )


def speed_table(out: Path) -> str:
    rows = []
    for label, (_, _, wanted) in SPEED.items():
        name = slug(label)
        serial, both = read(out, f"speed-{name}-serial-*"), read(out, f"speed-{name}-processes-*")
        pairs = list(zip(serial, both, strict=False))
        if not pairs:
            continue
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)
        same = all(a["ledger"] == b["ledger"] for a, b in pairs)
        met = "met" if ratio >= wanted else "missed"
        rows.append(
            [
                label,
                f"{statistics.median(a['candidate'] for a in serial):.2f} s",
                f"{statistics.median(b['candidate'] for _, b in pairs):.2f} s",
                f"{statistics.median(a['seconds'] for a in serial):.1f} s",
                f"{statistics.median(b['seconds'] for b in both):.1f} s",
                f"{ratio:.2f} (required: {wanted}; {met})",
                "yes" if same else "NO",
                f"{max(r['load'] for r in serial + both):.1f}",
            ]
        )
    head = [
        "agent",
        "a candidate",
        "with another",
        "one process",
        "two workers",
        "ratio",
        "equal ledgers",
        "load",
    ]
    return table_of("speed", head, rows)


def many_table(out: Path) -> str:
    rows = []
    for agent in AGENTS:
        labels: dict[str, dict[int, dict[str, Any]]] = {}
        for workers in MANY:
            for label, _, _ in wide(agent, workers):
                name = slug(label) or "as-shipped"
                path = out / f"many-{agent}-{workers}-{name}.json"
                if path.exists():
                    general = label.replace(str(2 * workers), "2 a worker") if agent == "evopress" else label
                    if agent == "ppo":
                        general = general.replace(f"ahead {-(-workers // 3) - 1}", "ahead: workers / 3")
                        general = general.replace(f"batch {workers}", "batch: one a worker")
                    found = json.loads(path.read_text(encoding="utf-8"))
                    labels.setdefault(general or "as shipped", {})[workers] = found
        for label, found in labels.items():
            cells = [f"{found[w]['efficiency']:.0%}" if w in found else "" for w in MANY]
            rows.append([agent, label, f"{SLEEP[agent][0]:.0f} s", *cells])
    head = ["agent", "settings", "a candidate", *(f"{w} workers" for w in MANY)]
    return table_of("many", head, rows)


def quality_of(out: Path, evaluations: int) -> Iterator[tuple[str, int, list[float], list[float]]]:
    """Workload, batches ahead, best scores by seed, and their differences to those without batches ahead."""
    for name in QUALITY:
        base = [r["score"] for r in read(out, f"quality-{name}-{evaluations}-0-[0-9].json")]
        for ahead in AHEAD:
            found = [r["score"] for r in read(out, f"quality-{name}-{evaluations}-{ahead}-[0-9].json")]
            if found and len(found) == len(base):
                yield name, ahead, found, [a - b for a, b in zip(found, base, strict=True)]


def quality_table(out: Path, evaluations: int) -> str:
    rows = []
    for name, ahead, found, differences in quality_of(out, evaluations):
        scores = ", ".join(f"{score:.4f}" for score in found)
        against = "" if ahead == 0 else ", ".join(f"{d:+.4f}" for d in differences)
        mean = statistics.mean(differences)
        rows.append(
            [
                name,
                str(ahead),
                f"{statistics.mean(found):.4f}",
                scores,
                against,
                f"{mean:+.4f}" if against else "",
            ]
        )
    head = ["workload", "`search.ahead`", "mean best score", "each seed", "against 0, by seed", "mean"]
    return table_of("quality", head, rows)


def quality_note(out: Path, evaluations: int) -> str:
    """Where scores fall with batches ahead, in words."""
    parts = []
    for name, ahead, found, differences in quality_of(out, evaluations):
        if ahead:
            worse = sum(d < 0 for d in differences)
            mean = statistics.mean(differences)
            verdict = "no worse on the mean" if mean >= 0 else f"worse on the mean by {-mean:.4f}"
            spread = (
                ""
                if len(found) < 2
                else f", standard deviation of the differences {statistics.stdev(differences):.4f}"
            )
            parts.append(f"{name}, {ahead}: {verdict} ({worse} of {len(found)} seeds below{spread})")
    return "; ".join(parts) + f". Measured on {cpu()}." if parts else ""


def with_present(out: Path, text: str, present: str) -> str:
    """The page's text, with the sections that ``out`` has no figures for as they stand on the present page."""
    for part, heading in SECTIONS.items():
        if not list(out.glob(f"{part}-*.json")) and heading in present:
            text = text.replace(section(text, heading), section(present, heading))
    return text


def section(text: str, heading: str) -> str:
    """From a heading to the next one, or to the end."""
    start = text.index(heading)
    end = text.find("\n## ", start)
    return text[start:] if end < 0 else text[start:end]


def page(out: Path, evaluations: int, note: str) -> str:
    machine = (
        f"{os.cpu_count()} cores, {platform.machine()} ({cpu()}), no GPU; torch {torch.__version__}, "
        f"Python {platform.python_version()}, joblib {version('joblib')}"
    )
    return PAGE.format(
        machine=machine,
        note=f" {note}" if note else "",
        speed=speed_table(out),
        many=many_table(out),
        many_note=MANY_NOTE,
        quality=quality_table(out, evaluations),
        quality_note=quality_note(out, evaluations),
        evaluations=evaluations,
        speed_evaluations=SPEED_EVALUATIONS,
    )


def cpu() -> str:
    lines = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if Path("/proc/cpuinfo").exists()
        else []
    )
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="speed, many, quality")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=100, help="of `quality`")
    parser.add_argument(
        "--workloads", nargs="*", default=list(QUALITY), choices=list(QUALITY), help="of `quality`"
    )
    parser.add_argument("--ahead", nargs="*", type=int, default=AHEAD, help="of `quality`")
    parser.add_argument("--out", type=Path, default=Path("runs/parallel"))
    parser.add_argument("--write", action="store_true", help="write docs/parallel-speed.md")
    parser.add_argument("--note", default="", help="what the page says of the machine, behind its name")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - {"speed", "many", "quality"}
    if unknown:
        parser.error(f"unknown part {sorted(unknown)[0]!r}; allowed: speed, many, quality")
    torch.set_num_threads(1)
    if "speed" in arguments.parts:
        speed(arguments.out, arguments.rounds, SPEED_EVALUATIONS)
    if "many" in arguments.parts:
        many(arguments.out)
    if "quality" in arguments.parts:
        quality(arguments.out, arguments.seeds, arguments.evaluations, arguments.workloads, arguments.ahead)
    target = DOCS / "parallel-speed.md"
    text = page(arguments.out, arguments.evaluations, arguments.note)
    text = with_present(arguments.out, text, target.read_text(encoding="utf-8") if target.is_file() else "")
    if arguments.write:
        target.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
