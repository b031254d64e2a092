"""Searches with workers: time with two, efficiency with many, quality of batches ahead -> docs/parallel.md.

    python docs/scripts/parallel.py speed [--rounds 2]     # two processes against one, in turns: 4 minutes a round
    python docs/scripts/parallel.py many                   # candidates that sleep, 8 to 64 at a time: 10 minutes
    python docs/scripts/parallel.py quality                # search.ahead at equal evaluations, three seeds: 10 minutes
    python docs/scripts/parallel.py --write                # the page, from what is there

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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rlprune import load_config
from rlprune.evaluation import EvaluationLog, workers_of
from rlprune.execution import Shared
from rlprune.experiments import Experiment, prepare_experiment, run_agent, working
from rlprune.report import markdown_table

DOCS = Path(__file__).resolve().parents[1]
AGENTS = ("random", "evopress", "ppo")
# A candidate of 1 to 2 seconds on one thread: the digits at 32 pixels, a ResNet-20 of twice the width.
SLOW = (
    "data.image_size=32", "model.arguments.width=24", "model.train.epochs=1", "data.validation=400",
    "data.calibration=256", "threads=1",
)  # fmt: skip
SPEED_EVALUATIONS = 40
WANTED = {"random": 1.7, "evopress": 1.7, "ppo": 1.6}
# Workers that sleep: seconds of a candidate, and candidates for each worker.
SLEEP = {"random": (2.0, 10), "evopress": (2.0, 10), "ppo": (20.0, 4)}
MANY = (8, 16, 64)
QUALITY = {"digits": "0.3", "tiny_llama": "0.5"}
AHEAD = (0, 1, 3)
PAGE = """TODO
"""


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
    config = load_config("digits", [*SLOW, f"search.evaluations={evaluations}"])
    parallel = replace(config, execution=replace(config.execution, engine="processes", workers=2))
    experiment = prepare_experiment(config)
    for number in range(rounds):
        for agent in AGENTS:
            here = replace(experiment, evaluator=experiment.evaluator.bare())
            kept(out / f"speed-{agent}-serial-{number}.json", lambda e=here, a=agent: searched(e, a))  # type: ignore[misc]
            there = replace(experiment, evaluator=experiment.evaluator.bare())
            path = out / f"speed-{agent}-processes-{number}.json"
            if not path.exists():
                with working(parallel, [there]):
                    warm(there)
                    kept(path, lambda e=there, a=agent: searched(e, a))  # type: ignore[misc]


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
        self.workers, self.seconds = workers, seconds
        self._pool, self._lock = ThreadPoolExecutor(workers), threading.Lock()

    def submit(self, work: Callable[..., Any], *arguments: object) -> Future[Any]:
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


def wide(agent: str, workers: int) -> Iterator[tuple[str, list[str]]]:
    """Settings with enough to do for so many workers, with a label each."""
    if agent == "random":
        yield "", []
    elif agent == "evopress":
        yield "", []
        yield f"offspring {2 * workers}", [f"search.evopress.offspring={2 * workers}"]
    else:
        yield "", []
        ahead = -(-workers // 6)
        yield f"ahead {ahead}", [f"search.ahead={ahead}"]
        scores = ["search.ppo.surrogate=scores", f"search.batch={workers}", "search.ahead=1"]
        yield f"scores, batch {workers}, ahead 1", scores


def many(out: Path) -> None:
    """Efficiency of searches whose candidates sleep."""
    small = ["model.arguments.width=4", "model.train.epochs=2", "data.calibration=64", "data.validation=100"]
    experiment = prepare_experiment(load_config("digits", [*small, "threads=1"]))
    for agent in AGENTS:
        seconds, each = SLEEP[agent]
        for workers in MANY:
            for label, settings in wide(agent, workers):
                config = load_config(
                    "digits", [*small, "threads=1", f"search.evaluations={each * workers + 14}", *settings]
                )
                name = label.replace(" ", "-").replace(",", "") or "as-shipped"
                kept(
                    out / f"many-{agent}-{workers}-{name}.json",
                    lambda c=config, w=workers, s=seconds, a=agent: asleep(experiment, c, a, w, s),  # type: ignore[misc]
                )


def asleep(experiment: Experiment, config: Any, agent: str, workers: int, seconds: float) -> dict[str, Any]:
    here = replace(experiment, config=config, evaluator=experiment.evaluator.bare())
    names = here.start_rules()
    for name in names:  # every search has these; they cost nothing here
        here.evaluator.evaluate(here.rule_widths(name))
    known = len({tuple(here.rule_widths(name)) for name in names})
    executor = Sleepers(workers, seconds)
    here.evaluator.use_workers(workers_of(here.evaluator, executor))
    found = searched(here, agent)
    executor.close()
    slept = seconds * (found["evaluations"] - known)
    found |= {"efficiency": slept / workers / found["seconds"], "workers": workers, "ledger": []}
    return found


def quality(out: Path, seeds: int, evaluations: int) -> None:
    """The best score of PPO's search with batches ahead, by equal evaluations and seeds."""
    for name, budget in QUALITY.items():
        settings = [f"budget.target={budget}", f"search.evaluations={evaluations}", "threads=1"]
        experiment: Experiment | None = None
        for seed in range(seeds):
            for ahead in AHEAD:
                path = out / f"quality-{name}-{evaluations}-{ahead}-{seed}.json"
                if path.exists():
                    continue
                experiment = experiment or prepare_experiment(load_config(name, settings))
                config = load_config(name, [*settings, f"search.ahead={ahead}"])
                here = replace(experiment, config=config, evaluator=experiment.evaluator.fork())
                kept(path, lambda e=here, s=seed: searched(e, "ppo", s) | {"ledger": []})  # type: ignore[misc]


def read(out: Path, pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob(pattern))]


def speed_table(out: Path) -> str:
    rows = []
    for agent in AGENTS:
        serial, both = read(out, f"speed-{agent}-serial-*"), read(out, f"speed-{agent}-processes-*")
        pairs = list(zip(serial, both, strict=False))
        if not pairs:
            continue
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)
        same = all(a["ledger"] == b["ledger"] for a, b in pairs)
        met = "met" if ratio >= WANTED[agent] else "missed"
        rows.append(
            [
                agent,
                f"{statistics.median(a['candidate'] for a in serial):.2f} s",
                f"{statistics.median(a['seconds'] for a in serial):.1f} s",
                f"{statistics.median(b['seconds'] for b in both):.1f} s",
                f"{ratio:.2f} (required: {WANTED[agent]}; {met})",
                "yes" if same else "NO",
                f"{max(r['load'] for r in serial + both):.1f}",
            ]
        )
    head = ["agent", "a candidate", "one process", "two workers", "ratio", "equal ledgers", "load"]
    return markdown_table(head, rows)


def many_table(out: Path) -> str:
    rows = []
    for agent in AGENTS:
        labels: dict[str, dict[int, dict[str, Any]]] = {}
        for workers in MANY:
            for label, _ in wide(agent, workers):
                name = label.replace(" ", "-").replace(",", "") or "as-shipped"
                path = out / f"many-{agent}-{workers}-{name}.json"
                if path.exists():
                    general = label.replace(str(2 * workers), "2 a worker") if agent == "evopress" else label
                    if agent == "ppo":
                        general = general.replace(f"ahead {-(-workers // 6)}", "ahead: workers / 6")
                        general = general.replace(f"batch {workers}", "batch: one a worker")
                    found = json.loads(path.read_text(encoding="utf-8"))
                    labels.setdefault(general or "as shipped", {})[workers] = found
        for label, found in labels.items():
            cells = [f"{found[w]['efficiency']:.0%}" if w in found else "" for w in MANY]
            rows.append([agent, label, f"{SLEEP[agent][0]:.0f} s", *cells])
    return markdown_table(["agent", "settings", "a candidate", *(f"{w} workers" for w in MANY)], rows)


def quality_table(out: Path, evaluations: int) -> str:
    rows = []
    for name in QUALITY:
        base = read(out, f"quality-{name}-{evaluations}-0-*")
        for ahead in AHEAD:
            found = read(out, f"quality-{name}-{evaluations}-{ahead}-*")
            if not found or len(found) != len(base):
                continue
            differences = [a["score"] - b["score"] for a, b in zip(found, base, strict=True)]
            scores = ", ".join(f"{a['score']:.4f}" for a in found)
            mean = statistics.mean(a["score"] for a in found)
            worst = f"{min(differences):+.4f} to {max(differences):+.4f}" if ahead else ""
            rows.append([name, str(ahead), f"{mean:.4f}", scores, worst])
    return markdown_table(
        ["workload", "`search.ahead`", "mean best score", "each seed", "against 0, by seed"], rows
    )


def page(out: Path, evaluations: int) -> str:
    machine = (
        f"{os.cpu_count()} cores, {platform.machine()} ({cpu()}), no GPU; torch {torch.__version__}, "
        f"Python {platform.python_version()}, joblib {version('joblib')}"
    )
    return PAGE.format(
        machine=machine,
        speed=speed_table(out),
        many=many_table(out),
        quality=quality_table(out, evaluations),
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
    parser.add_argument("--out", type=Path, default=Path("runs/parallel"))
    parser.add_argument("--write", action="store_true", help="write docs/parallel.md")
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
        quality(arguments.out, arguments.seeds, arguments.evaluations)
    text = page(arguments.out, arguments.evaluations)
    if arguments.write:
        (DOCS / "parallel.md").write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
