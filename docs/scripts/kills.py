"""Kill every command that can be resumed between all of its writes and renames, go on, and compare -> docs/kills.md.

    python docs/scripts/kills.py --write

A moment is where a run is ended at once, by `os._exit`: when a file or folder was made next to its place, before its
content is waited for, before a rename, before a removal; a line that is appended is torn in one more. The command then
runs again, and everything on the disk has to be what an uninterrupted run leaves: the same files, no others, the
same bytes, but for what a clock says. One process with everything imported forks a child for each run. Moments that
are on record (--record) are not tried again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import runpy
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlprune.report import markdown_table

DOCS = Path(__file__).resolve().parents[1]
KILLED = 137
KILLS = 4  # moments of each command at which a process is really ended, and its disk compared with the copy
GOLDEN = 0.618034
# What a clock or a process number says, and pages that show it. Fidelity recommends the fastest of equal recoveries.
CLOCKS = {
    "seconds",
    "finish_seconds",
    "latency_ms",
    "final_seconds",
    "per_sample",
    "added_ms",
    "elapsed",
    "recommended",
}
SHOWN = re.compile(r"(report\.html|run\.log|benchmark\.md|fidelity\.md|\.rlprune\.lock|events\.out\..*)$")

NETWORK = (
    "model.name=kills:network", "model.arguments={}", "model.train.epochs=2", "data.train=128",
    "data.calibration=32", "data.validation=50", "device=cpu", "threads=1",
)  # fmt: skip
SEARCH = (
    "search.evaluations=8", "search.batch=4", "finish.rules=false", "finish.epochs=1",
    "search.ppo.surrogate_steps=128", "search.ppo.surrogate_envs=8", "finish.candidates=2", "data.test=50",
)  # fmt: skip
LLAMA = (
    "model.arguments.layers=2", "model.train.epochs=1", "data.train=32", "data.calibration=8", "data.validation=8",
    "data.test=8", "device=cpu", "threads=1",
)  # fmt: skip


def network(classes: int = 10, channels: int = 1) -> nn.Module:
    """The smallest network whose widths are worth a search."""
    layers: list[nn.Module] = []
    for width in (6, 8, 8, 10):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


@dataclass(frozen=True)
class Case:
    """A command, what is added when it goes on, and the commands whose outcome it needs."""

    words: tuple[str, ...]
    again: tuple[str, ...] = ()
    before: tuple[tuple[str, ...], ...] = ()
    cold: bool = True
    """Whether the dense model is trained by the command itself, so that kills hit its cache as well."""


def sets(*settings: str) -> tuple[str, ...]:
    return ("--set", *settings)


_TRAIN = ("train", "digits", "--out", "run", *sets(*NETWORK, *SEARCH))
_SHORT = tuple(
    setting for setting in SEARCH if not setting.startswith(("search.evaluations", "finish.rules"))
)
_PRUNED = ("prune", "digits", "--rule", "uniform", "--out", "cut", *sets(*NETWORK))
_METHODS = ("--methods", "uniform,ppo", "--seeds", "1", "--evaluations", "6")
CASES = {
    "train": Case(_TRAIN, ("--resume",)),
    "benchmark": Case(("benchmark", "digits", *_METHODS, "--out", "bench", *sets(*NETWORK, *_SHORT))),
    "fidelity": Case(
        ("fidelity", "digits", "--candidates", "4", "--out", "fidelity",
         *sets(*NETWORK, "finish.epochs=1", "recovery.steps=[bn]")),
    ),
    "prune --stages": Case(
        ("prune", "digits", "--rule", "uniform", "--stages", "3", "--steps", "2", "--out", "cut", *sets(*NETWORK)),
    ),
    "apply --refine": Case(
        ("apply", "run", "digits", "--refine", "8", "--out", "applied",
         *sets(*NETWORK, "search.ppo.surrogate_steps=128", "search.ppo.surrogate_envs=8")),
        before=(_TRAIN,), cold=False,
    ),
    "train, a language model": Case(
        ("train", "tiny_llama", "--out", "run",
         *sets(*LLAMA, "search.evaluations=6", "search.batch=3", "search.ppo.surrogate_steps=128",
               "search.ppo.surrogate_envs=8", "finish.steps=4", "finish.candidates=1", "finish.rules=false")),
        ("--resume",),
    ),
    "prune over a folder that is there": Case(
        (*_PRUNED[:3], "erk", *_PRUNED[4:]), before=(_PRUNED,), cold=False,
    ),
}  # fmt: skip


# One run in a child of its own


@dataclass
class Killer:
    """Ends the process at a moment; ``at`` counts from 0, None lets it live. Counts what happens below ``root``.

    With ``keep`` the disk as it is at every moment is copied into that folder: what a kill there would leave.
    """

    root: Path
    at: int | None = None
    keep: Path | None = None
    moments: list[str] = field(default_factory=list)

    def here(self, what: str, path: object, torn: bool = False) -> None:
        """A moment, if the path lies below the root; ``torn``: the last bytes of the file are not on the disk yet."""
        place = Path(os.path.abspath(os.fsdecode(path)))  # type: ignore[arg-type]
        if self.root not in place.parents:
            return
        number = len(self.moments)
        if number == self.at:
            tear(place, torn)
            os._exit(KILLED)
        if self.keep is not None:
            copy = self.keep / str(number)
            shutil.copytree(self.root, copy)
            tear(copy / place.relative_to(self.root), torn)
        self.moments.append(f"{what} {tidy(str(place.relative_to(self.root)))}")

    def install(self) -> None:
        """Put the moments around the calls by which programs write, rename and remove."""
        for module, name in ((tempfile, "mkstemp"), (tempfile, "mkdtemp")):
            self._after(module, name)
        for name in ("replace", "rename"):
            self._before(name, "rename to", 1)
        for name in ("unlink", "remove", "rmdir"):
            self._before(name, "remove", 0)
        fsync = os.fsync

        def waiting(handle: Any) -> None:
            number = handle if isinstance(handle, int) else handle.fileno()
            path = os.readlink(f"/proc/self/fd/{number}")
            if path.endswith(".jsonl"):
                # The line is in the file; a power cut may leave a part of it.
                self.here("half of a line in", path, torn=True)
            self.here("wait for", path)
            fsync(handle)

        os.fsync = waiting

    def _after(self, module: Any, name: str) -> None:
        call = getattr(module, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            found = call(*args, **kwargs)
            self.here("make", found[1] if name == "mkstemp" else found)
            return found

        setattr(module, name, wrapped)

    def _before(self, name: str, what: str, argument: int) -> None:
        call = getattr(os, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            path = os.fsdecode(args[argument])
            if (folder := kwargs.get("dir_fd")) is not None:
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
            self.here(what, path)
            return call(*args, **kwargs)

        setattr(os, name, wrapped)


def tear(path: Path, wanted: bool) -> None:
    if wanted:
        os.truncate(path, path.stat().st_size - 9)


def tidy(path: str) -> str:
    """A path without what is drawn at random, or counted, in it."""
    path = re.sub(r"rlprune-(new|old)-\w{8}", r"rlprune-\1-*", path)
    return re.sub(r"[0-9a-f]{32}", "*", path)  # names in the cache: `network` is part of them


def child(
    words: Sequence[str], root: Path, at: int | None = None, keep: Path | None = None
) -> tuple[int, list[str], list[str]]:
    """Run a command of rlprune in the folder ``root``: its exit code, its moments, the modules that it imported."""
    log, note = root.with_suffix(".log"), root.with_suffix(".note")
    note.unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        code = 70
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.chdir(root)
            os.environ["RLPRUNE_CACHE"] = str(root / "cache")
            killer = Killer(root, at, keep)
            killer.install()
            code = command(words)
            note.write_text(json.dumps([killer.moments, sorted(sys.modules)]))
        finally:
            sys.stdout.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    moments, modules = json.loads(note.read_text()) if note.is_file() else ([], [])
    return code, moments, modules


def command(words: Sequence[str]) -> int:
    """`rlprune WORDS` in this process; its exit code."""
    sys.argv = ["rlprune", *words]
    sys.path.insert(0, str(Path(__file__).parent))  # `network` is named as kills:network
    try:
        runpy.run_module("rlprune", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


# What is on the disk


def tree(root: Path) -> dict[str, object]:
    """Every file and folder below a folder with its content, without what a clock says."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        found[name] = "a folder" if path.is_dir() else "shown" if SHOWN.search(name) else content(path)
    return found


def content(path: Path) -> object:
    if path.suffix == ".json":
        return timeless(json.loads(path.read_bytes()))
    if path.suffix == ".jsonl":
        return [row(line) for line in path.read_text().splitlines()]
    if path.suffix == ".pt":
        return timeless(torch.load(path, weights_only=True))
    return path.read_bytes()


def row(line: str) -> object:
    """A line of JSON without what a clock says; half of one is just that."""
    try:
        return timeless(json.loads(line))
    except ValueError:
        return "half of a line"


def timeless(value: object) -> object:
    """A value without the fields that a clock fills; tensors as lists."""
    if isinstance(value, Mapping):
        return {str(k): timeless(v) for k, v in value.items() if k not in CLOCKS}
    if isinstance(value, (list, tuple)):
        return [timeless(v) for v in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def differences(found: Mapping[str, object], wanted: Mapping[str, object]) -> list[str]:
    """In words what differs between two trees."""
    lines = [f"{name}: left behind" for name in found.keys() - wanted.keys()]
    lines += [f"{name}: missing" for name in wanted.keys() - found.keys()]
    both = found.keys() & wanted.keys()
    return sorted(lines) + [f"{name}: other content" for name in sorted(both) if found[name] != wanted[name]]


# All moments of a command


class Tried:
    """One command with all that is needed to kill it: a folder to start from, and what an uninterrupted run leaves."""

    def __init__(self, case: Case, place: Path, keep: bool = False) -> None:
        self.case, self.place = case, place
        self.start = place / "start"
        self.start.mkdir(parents=True)
        for words in case.before:
            self._must(words, self.start)
        if not case.cold and not case.before:
            raise ValueError("a case that starts warm needs a command before it")
        whole = self._copy("whole")
        self.kept = place / "moments" if keep else None
        _, self.moments, modules = self._must(case.words, whole, self.kept)
        self.wanted = tree(whole)
        for name in modules:  # so that the children need not
            with contextlib.suppress(Exception):
                import_module(name)

    def twice(self) -> list[str]:
        """Differences between two uninterrupted runs: nothing that is compared may depend on anything but the seed."""
        again = self._copy("twice")
        self._must(self.case.words, again)
        return differences(tree(again), self.wanted)

    def kill(self, moment: int) -> list[str]:
        """Kill at a moment, or take what was kept of it, and go on; what differs then from an uninterrupted run."""
        if self.kept is not None:
            here = self.kept / str(moment)
        else:
            here = self._copy("killed")
            code, _, _ = child(self.case.words, here, moment)
            if code != KILLED:
                return [f"was not killed: exit code {code}"]
        code, _, _ = child((*self.case.words, *self.case.again), here)
        if code != 0:
            return [f"exit code {code}: {here.with_suffix('.log').read_text().strip().splitlines()[-1]}"]
        return differences(tree(here), self.wanted)

    def same_as_killed(self, moment: int) -> list[str]:
        """Whether a process that is ended at a moment leaves what was kept of it: differences, before going on."""
        assert self.kept is not None
        here = self._copy("killed")
        child(self.case.words, here, moment)
        found, wanted = (
            {tidy(name): content for name, content in tree(root).items()}
            for root in (here, self.kept / str(moment))
        )
        return differences(found, wanted)

    def _copy(self, name: str) -> Path:
        target = self.place / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.start, target)
        return target

    def _must(
        self, words: Sequence[str], root: Path, keep: Path | None = None
    ) -> tuple[int, list[str], list[str]]:
        found = child(words, root, keep=keep)
        if found[0] != 0:
            raise RuntimeError(
                f"{' '.join(words)}: exit code {found[0]}: {root.with_suffix('.log').read_text()}"
            )
        return found


def sample(count: int, most: int) -> list[int]:
    """At most ``most`` moments, spread over all of them."""
    return list(range(count)) if most >= count else [int((i + 0.5) * count / most) for i in range(most)]


@contextlib.contextmanager
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        yield Path(folder).resolve()


def study(name: str, record: Path, most: int | None, until: float) -> dict[str, Any]:
    """Try the moments of a case that are not on record; what was found of each. {} where there is no time."""
    kept = json.loads(record.read_text()) if record.is_file() else {}
    if time.monotonic() >= until:
        return dict(kept)
    with place() as folder:
        tried = Tried(CASES[name], folder, keep=most is None)
        if kept.get("moments") != tried.moments:
            kept = {"moments": tried.moments, "found": {}, "seconds": 0.0}
        if most is None and "twice" not in kept:
            kept["twice"] = tried.twice()
            kept["killed"] = {str(m): tried.same_as_killed(m) for m in sample(len(tried.moments), KILLS)}
        # In an order that spreads what is tried first, for those without time for all.
        chosen = sample(len(tried.moments), most or len(tried.moments))
        for moment in sorted(chosen, key=lambda m: m * GOLDEN % 1):
            if str(moment) in kept["found"] or time.monotonic() > until:
                continue
            started = time.perf_counter()
            wrong = kept["found"][str(moment)] = tried.kill(moment)
            kept["seconds"] += time.perf_counter() - started
            if wrong:
                print(f"{name}, moment {moment} ({tried.moments[moment]}): {'; '.join(wrong)}", flush=True)
            record.parent.mkdir(parents=True, exist_ok=True)
            fresh = record.with_suffix(".new")
            fresh.write_text(json.dumps(kept))
            fresh.replace(record)
    return dict(kept)


PAGE = """# Killed at any moment

Written by `python docs/scripts/kills.py --write` on {machine}, one thread; torch {torch}, Python {python}; seed 0, the
smallest settings that go through every part (the script has them).

A moment is where a run is ended at once: when a file or folder was made next to its place, before its content is waited
for, before a rename, before a removal; a line that is appended is torn in one more. The same command (with `--resume`
where it has one) then runs again, and all that is on the disk has to be what an uninterrupted run leaves: the same
files and no others, the cache folder included, and the same bytes in every one. Left out is what a clock says
(seconds and latencies in ledgers, results and cells, the recovery that fidelity recommends as the fastest of equal
ones, the pages that show these, `run.log`) and the process number in the lock.

What a kill leaves at a moment is the disk as it is then: one run is copied at all of its moments, and at some of them
("ended") another process is really ended, by `os._exit`, and its disk compared with the copy.

{table}

A row of which not all moments are tried is not finished; the same command goes on there.

Moments by what happens in them: {kinds}.

What is saved does not depend on the process either: `tests/integration/test_reproducible.py` runs `train`, `apply`,
`export`, `benchmark` and `prune` in two processes with other hash seeds and compares every file in the same way.
"""


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    rows, kinds = [], dict[str, int]()
    for name, kept in found.items():
        wrong = sum(map(bool, kept["found"].values()))
        verdict = "all equal" if not wrong else f"{wrong} not equal"
        twice = "; ".join(kept["twice"]) or "equal" if "twice" in kept else "not compared"
        killed = kept.get("killed", {})
        ended = f"{sum(not lines for lines in killed.values())} of {len(killed)} equal"
        rows.append([f"`{name}`" if "," not in name and "over" not in name else name, str(len(kept["moments"])),
                     str(len(kept["found"])), verdict, ended, twice, f"{kept['seconds'] / 60:.1f} min"])  # fmt: skip
        for moment in kept["moments"]:
            kind = re.match(r"half of a line|make|wait|rename|remove", moment)
            kinds[kind[0] if kind else moment] = kinds.get(kind[0] if kind else moment, 0) + 1
    head = ["command", "moments", "tried", "after going on", "ended", "two uninterrupted runs", "time"]
    words = {
        "make": "made next to its place",
        "wait": "content not yet waited for",
        "half of a line": "half of a line",
    }
    words |= {"rename": "before a rename", "remove": "before a removal"}
    return PAGE.format(
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        torch=version("torch"),
        python=platform.python_version(),
        table=markdown_table(head, rows),
        kinds=", ".join(f"{words[kind]} {count}" for kind, count in kinds.items()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help="; ".join(CASES)
    )
    parser.add_argument("--sample", type=int, help="so many moments of each command, spread over all of them")
    parser.add_argument(
        "--minutes", type=float, default=1e6, help="stop after so many minutes; the same command goes on"
    )
    parser.add_argument("--record", type=Path, default=Path("runs/kills"), help="what has been tried")
    parser.add_argument("--write", action="store_true", help="write docs/kills.md of what has been tried")
    args = parser.parse_args()
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * args.minutes
    found = {}
    for name in args.only:
        kept = study(name, args.record / f"{name.replace(' ', '-')}.json", args.sample, until)
        if not kept:
            continue
        found[name] = kept
        wrong = [m for m, lines in kept["found"].items() if lines]
        print(
            f"{name}: {len(kept['found'])} of {len(kept['moments'])} moments tried, {len(wrong)} not equal",
            flush=True,
        )
    if args.write:
        (DOCS / "kills.md").write_text(page(found), encoding="utf-8")
        print(f"wrote {DOCS / 'kills.md'}")


if __name__ == "__main__":
    main()
