"""The wheel with every extra alone, in an environment of its own; what the core packages are for -> docs/install.md.

    python -m build --wheel
    python docs/scripts/extras.py dist/rlprune-*.whl --work runs/extras            # half an hour, 6 GB
    python docs/scripts/extras.py dist/rlprune-*.whl --work runs/extras --write    # only the page

`core` is an environment of the wheel and what it requires. That of an extra is another one, which holds the packages
that `pip install rlprune[EXTRA]` adds to these; a `.pth` file lets it see those of `core`, so torch is there once. In
each of them the extra's feature has to work, and the features of all other extras have to end with exit code 2 and one
line that names `pip install 'rlprune[OTHER]'`, unless their packages came along. What is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rlprune.report import markdown_table
from rlprune.utils import hardware, read_json, write_json_atomic

PAGE = Path(__file__).parent.parent / "install.md"
SMALL = (
    "--set", "model.train.epochs=1", "search.evaluations=10", "search.baselines=[]", "finish.epochs=0",
    "finish.candidates=1", "finish.rules=false", "score.samples=64",
)  # fmt: skip
"""An extra's features, as commands; OUT is a folder for what they write."""
FEATURES: dict[str, list[list[str]]] = {
    "timm": [["inspect", "timm.yaml"]],
    "language": [
        ["export", "tiny", "--to", "gguf", "--out", "OUT.gguf"],
        ["train", "tiny_llama", "--out", "OUT", *SMALL[:-1], "finish.steps=2", "score.samples=16"],
        ["inspect", "tiny_llama", "--set", "data.name=hub:no/data", "data.download=true"],
    ],
    "zeroshot": [["evaluate", "tiny", "--tasks", "task.json"]],
    "metrics": [["train", "mywork.yaml", "--out", "OUT"]],
    "benchmark": [
        ["train", "digits", "--out", "OUT", *SMALL, "search.agent=cma_es"],
        ["optuna", "run", "--storage", "sqlite:///OUT.db"],
    ],
    "peers": [["train", "digits", "--out", "OUT", *SMALL, "search.agent=fastnas", "search.evaluations=30"]],
    "ray": [["train", "digits", "--out", "OUT", "--engine", "ray", "--workers", "1", *SMALL]],
    "contrib": [["train", "digits", "--out", "OUT", *SMALL, "search.agent=sb3", "search.sb3.algorithm=TQC"]],
    "export": [["export", "half", "--to", "onnx", "--out", "OUT.onnx"]],
    "tensorboard": [["train", "digits", "--out", "OUT", *SMALL, "search.tensorboard=true"]],
    **{
        name: [["train", "digits", "--out", "OUT", *SMALL, f"search.trackers=[{name}]"]]
        for name in ("mlflow", "wandb", "trackio")
    },
}
"""Features of an extra that say something else where it is there: the data set of that name does not exist."""
ENDS = {"data.name=hub:no/data": "no/data"}
IMPORTS = {"docs": ("mkdocs", "material", "mkdocstrings")}
WORK = """\
import torch, rlprune

class Marks(rlprune.Workload):
    task = "classification"
    split_metric = "F1"

    def __init__(self):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 3))
        self.example_inputs = torch.zeros(1, 1, 8, 8)

    def batches(self, split, limit=None):
        generator = torch.Generator().manual_seed(len(split))
        images = torch.randn(64, 1, 8, 8, generator=generator)
        yield images, (images.mean((1, 2, 3)) * 20).long().clamp(-1, 1) + 1
"""
SETTINGS = """\
workload: mywork:Marks
budget: {target: 60%}
search: {evaluations: 8, agent: random, baselines: []}
finish: {epochs: 0}
"""
TASK = [
    {
        "instruction": f"Is {n} even?\n\nanswer1: yes answer2: no\n\nAnswer format: answer1/answer2",
        "answer": a,
    }
    for n, a in ((2, "answer1"), (3, "answer2"))
]
# Run in an environment: each command as a person types it, in one process; [exit code, standard error] of each.
MANY = """\
import contextlib, io, json, runpy, sys
found = []
for words in json.loads(sys.argv[1]):
    said, code = io.StringIO(), 0
    sys.argv = ["rlprune", *words]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            runpy.run_module("rlprune", run_name="__main__")
        except SystemExit as ended:
            code = int(ended.code or 0)
    found.append([code, said.getvalue()])
print(json.dumps(found))
"""
# Distributions of an environment: name, bytes, what they require there, and whether the environment itself holds them.
PACKAGES = """\
import json, re, sys
from importlib import metadata
from packaging.requirements import Requirement
def key(name): return re.sub(r"[-_.]+", "-", name).lower()
found = {}
for one in metadata.distributions():
    if (name := key(one.metadata["Name"])) in found:
        continue
    needs = [Requirement(text) for text in one.requires or []]
    needs = [key(r.name) for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    size = sum(f.locate().stat().st_size for f in one.files or [] if f.locate().is_file())
    found[name] = {"bytes": size, "needs": needs, "own": str(one.locate_file("")).startswith(sys.prefix)}
print(json.dumps(found))
"""
# The distributions whose modules are loaded after a program.
LOADED = """
import json, re, sys
from importlib import metadata
owners = metadata.packages_distributions()
names = {owner for module in list(sys.modules) for owner in owners.get(module.partition(".")[0], ())}
print(json.dumps(sorted({re.sub(r"[-_.]+", "-", name).lower() for name in names})))
"""
OWN_MODEL = """\
import torch, rlprune
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(0)
data = TensorDataset(torch.randn(64, 1, 8, 8), torch.arange(64) % 3)
loaders = {split: DataLoader(data, batch_size=32) for split in ("train", "calibration", "validation", "test")}
model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 3))
result = rlprune.search(model, torch.zeros(1, 1, 8, 8), loaders=loaders, budget="60%", evaluations=12)
result.save("OUT")
"""


def clean() -> dict[str, str]:
    """The variables of this process without what would let another rlprune be seen."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


class Environment:
    """A virtual environment below the folder of the work."""

    def __init__(self, work: Path, name: str, base: Environment | None = None) -> None:
        self.work, self.name, self.path, self.base = work, name, work / "environments" / name, base
        self.python = self.path / "bin" / "python"

    def install(self, wheel: Path) -> None:
        """The wheel with the extra of the environment's name, on top of what the base holds."""
        if (self.path / "done").exists():
            return
        pip = [] if self.base is None else ["--without-pip"]
        subprocess.run([sys.executable, "-m", "venv", "--clear", *pip, self.path], check=True)
        wanted = str(wheel) if self.base is None else f"{wheel}[{self.name}]"
        installer = self.python if self.base is None else self.base.python
        if self.base is not None:
            (self.site() / "core.pth").write_text(f"{self.base.site()}\n")
        command = [
            installer,
            "-m",
            "pip",
            "--python",
            self.python,
            "install",
            "--quiet",
            "--disable-pip-version-check",
        ]
        wanted_too = ["packaging"] if self.base is None else []
        subprocess.run([*command, wanted, *wanted_too], check=True, env=clean(), cwd=self.path)
        (self.path / "done").touch()

    def site(self) -> Path:
        return next((self.path / "lib").glob("python*/site-packages")).resolve()

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A Python program of the environment, in a folder of its own outside of the clone."""
        place = self.work / "place" / self.name
        place.mkdir(parents=True, exist_ok=True)
        env = clean() | {
            "RLPRUNE_CACHE": str(self.work / "cache"),
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "offline",
            "MLFLOW_TRACKING_URI": f"sqlite:///{place / 'mlflow.db'}",
            "TRACKIO_DIR": str(place / "trackio"),
        }
        done = subprocess.run([self.python, *words], cwd=place, env=env, capture_output=True, text=True)
        if check and done.returncode:
            raise SystemExit(f"{self.name}: {' '.join(words)[-200:]}:\n{done.stderr[-3000:]}")
        return done

    def packages(self) -> dict[str, dict[str, Any]]:
        return dict(json.loads(self.run("-c", PACKAGES).stdout))

    def commands(self, commands: list[list[str]]) -> list[tuple[int, str]]:
        """Exit code and standard error of commands of rlprune."""
        out = f"out-{time.time_ns()}"
        filled = [[word.replace("OUT", f"{out}-{i}") for word in words] for i, words in enumerate(commands)]
        last = self.run("-W", "ignore", "-c", MANY, json.dumps(filled)).stdout.splitlines()[-1]
        return [(int(code), str(said)) for code, said in json.loads(last)]

    def seconds(self, *words: str, rounds: int = 5) -> float:
        """Median of the processor time of a program; the first, which compiles, is not counted."""
        times = []
        for _ in range(rounds + 1):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            self.run(*words)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return statistics.median(times[1:])

    def times(self) -> dict[str, float]:
        """Processor seconds of an empty program, of the import and of the help."""
        return {
            "python": self.seconds("-c", "pass"),
            "import": self.seconds("-c", "import rlprune"),
            "help": self.seconds("-m", "rlprune", "--help"),
        }


def prepare(core: Environment, place: Path) -> None:
    """What the features work on: two pruned models, a run, a workload and a task."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "mywork.py").write_text(WORK)
    (place / "mywork.yaml").write_text(SETTINGS)
    (place / "timm.yaml").write_text(
        'model: {name: "timm:test_resnet"}\ndata: {name: digits, image_size: 32}\n'
    )
    (place / "task.json").write_text(json.dumps(TASK))
    for out, words in {
        "tiny": [
            "prune",
            "tiny_llama",
            "--rule",
            "ffn_uniform",
            "--budget",
            "80%",
            "--set",
            "model.train.epochs=1",
        ],
        "half": ["prune", "digits", "--rule", "uniform", "--budget", "50%", "--set", "model.train.epochs=1"],
        "run": ["train", "digits", *SMALL],
    }.items():
        if not (place / out).exists():
            core.run("-m", "rlprune", *words[:2], "--out", str(place / out), *words[2:])


def judged(environment: Environment, extra: str, absent: list[str]) -> list[str]:
    """What went wrong: with the features of the extra, which is installed, and those of absent ones; in one process."""
    for module in IMPORTS.get(extra, ()):
        environment.run("-c", f"import {module}")
    asked = [(one, words) for one in (extra, *absent) for words in FEATURES.get(one, ())]
    wrong = []
    for (one, words), (code, said) in zip(asked, environment.commands([w for _, w in asked]), strict=True):
        if one == extra:
            end = next((text for key, text in ENDS.items() if key in words), None)
            fine = code == 0 if end is None else code == 2 and end in said and "pip install" not in said
        else:
            lines = [line for line in said.splitlines() if "error" in line]
            fine = code == 2 and len(lines) == 1 and f"pip install 'rlprune[{one}]'" in lines[0]
        if not fine:
            wrong.append(
                f"{'' if one == extra else 'without '}{one}: rlprune {' '.join(words)}: {code}: {said.strip()[-400:]}"
            )
    return wrong


def requirements(core: Environment) -> dict[str, list[str]]:
    """{extra: names of its packages}, from the wheel's metadata; '' holds what the core requires."""
    program = "from importlib import metadata; print('\\n'.join(metadata.requires('rlprune')))"
    found: dict[str, list[str]] = {"": []}
    for line in core.run("-c", program).stdout.splitlines():
        name = re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", line, maxsplit=1)[0]).lower()
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        found.setdefault(extra[1] if extra else "", []).append(name)
    return found


def look(
    work: Path, core: Environment, extra: str, wheel: Path, needs: dict[str, list[str]]
) -> dict[str, Any]:
    """Install an extra alone and try everything there."""
    environment = core if extra == "core" else Environment(work, extra, core)
    began = time.perf_counter()
    environment.install(wheel)
    installed = time.perf_counter() - began
    prepare(core, work / "given")
    place = work / "place" / extra
    place.mkdir(parents=True, exist_ok=True)
    for one in (work / "given").iterdir():
        if not (place / one.name).exists():
            (place / one.name).symlink_to(one.resolve())
    packages = environment.packages()
    own = {name: entry for name, entry in packages.items() if entry["own"] and name != "rlprune"}
    others = [other for other in FEATURES if other != extra]
    came = [other for other in others if set(needs[other]) <= set(packages)]
    # An extra of which some packages came along is neither: parts of it work.
    absent = [other for other in others if not set(needs[other]) & set(packages)]
    wrong = judged(environment, extra, absent)
    environment.run("-m", "rlprune", "--version")
    environment.run("-m", "rlprune", "list", "configs")
    return {
        "packages": sorted(own),
        "bytes": sum(entry["bytes"] for entry in own.values()),
        "came": came,
        "wrong": wrong,
        "install": installed,
        "seconds": environment.times(),
    }


def closure(packages: dict[str, dict[str, Any]], roots: list[str]) -> set[str]:
    """The packages that some need, directly or not."""
    seen, left = set(), list(roots)
    while left:
        if (name := left.pop()) in packages and name not in seen:
            seen.add(name)
            left += packages[name]["needs"]
    return seen


def weigh(core: Environment, needed: list[str]) -> list[list[str]]:
    """A row for each package that the core requires."""
    packages = core.packages()
    phases = {
        "`import rlprune`": core.run("-c", "import rlprune" + LOADED),
        "own model": core.run("-c", OWN_MODEL.replace("OUT", f"own-{time.time_ns()}") + LOADED),
    }
    loaded = {name: set(json.loads(done.stdout.splitlines()[-1])) for name, done in phases.items()}
    rows = []
    for name in needed:
        others = [other for other in needed if other != name]
        gone = closure(packages, needed) - closure(packages, others)
        by = next((phase for phase, names in loaded.items() if name in names), "a feature")
        users = [other for other in others if name in closure(packages, [other])]
        size, only = packages[name]["bytes"] / 1e6, sum(packages[one]["bytes"] for one in gone) / 1e6
        rows.append([name, by, f"{size:,.1f}", f"{only:,.1f}", ", ".join(users) or "–"])
    return rows


def extras_table(found: dict[str, dict[str, Any]]) -> str:
    rows = []
    for extra, entry in found.items():
        came = ", ".join(f"`{name}`" for name in entry["came"])
        rows.append([
            f"`{extra}`" if extra != "core" else "none", str(len(entry["packages"])), f"{entry['bytes'] / 1e6:,.0f}",
            f"{entry['seconds']['import']:.2f}", f"{entry['seconds']['help']:.2f}",
            "yes" if not entry["wrong"] else "**no**", came or "–",
        ])  # fmt: skip
    header = [
        "extra",
        "packages",
        "MB",
        "`import rlprune` (s)",
        "`rlprune --help` (s)",
        "checks passed",
        "brings along",
    ]
    return markdown_table(header, rows)


def write(found: dict[str, Any]) -> None:
    """Put the tables between the page's marks."""
    text = PAGE.read_text(encoding="utf-8")
    header = ["package", "first loaded by", "MB", "MB that only it brings", "also required by"]
    left = [f"`{name}`" for name in (*FEATURES, *IMPORTS) if name not in found["extras"]]
    open_ = f" Not tried yet: {', '.join(left)}." if left else ""
    for mark, table in {
        "extras": extras_table(found["extras"]),
        "core": markdown_table(header, found["core"]),
    }.items():
        begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"{PAGE.name}: no place for the table {mark}")
        before, after = text.partition(begin)[0], text.partition(end)[2]
        text = (
            f"{before}{begin}\n{table}\n\n{found['machine']}{open_ if mark == 'extras' else ''}\n{end}{after}"
        )
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("wheel", type=Path, help="the built wheel")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/extras"), help="where environments and figures are kept"
    )
    parser.add_argument("--only", help="extras to look at, comma-separated")
    parser.add_argument("--again", action="store_true", help="look again at what was looked at")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/install.md")
    args = parser.parse_args()
    work, wheel = args.work.resolve(), args.wheel.resolve()
    (work / "environments").mkdir(parents=True, exist_ok=True)
    record = work / "found.json"
    found = dict(read_json(record)) if record.exists() else {"extras": {}}
    core = Environment(work, "core")
    core.install(wheel)
    needs = requirements(core)
    names = (
        args.only.split(",") if args.only else ["core", *(name for name in needs if name not in ("", "dev"))]
    )
    for name in names:
        if name not in found["extras"] or args.again:
            found["extras"][name] = look(work, core, name, wheel, needs)
            write_json_atomic(record, found)
        entry = found["extras"][name]
        if "seconds" not in entry:
            entry["seconds"] = (core if name == "core" else Environment(work, name, core)).times()
            write_json_atomic(record, found)
        print(
            f"{name}: {len(entry['packages'])} packages, {entry['bytes'] / 1e6:,.0f} MB",
            *entry["wrong"],
            sep="\n  ",
        )
    if "core" not in found or args.again:
        found["core"] = weigh(core, needs[""])
        machine = hardware()
        found["machine"] = (
            f"{machine['processor']}, Python {machine['python']}, torch {machine['libraries']['torch']}; "
            "seconds of the processor, medians of 5."
        )
        write_json_atomic(record, found)
    if args.write:
        write(found)
    if any(entry["wrong"] for entry in found["extras"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
