"""Surgery and cost on many architectures with random weights -> docs/architectures.md.

    python docs/scripts/architectures.py                           # all of architectures.yaml, an hour or two
    python docs/scripts/architectures.py --only 'timm:*' --jobs 2  # these, and the page from all that is known
    python docs/scripts/architectures.py --print resnet18 hf:vit   # only look

Each model runs in a process of its own with a limit on time and memory: none can hang or exhaust the machine. Its
result is one line of a cache file, so that a run that was stopped goes on where it was; a line counts as long as
the code that made it is unchanged. The page says what has to hold for "works".
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import inspect
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

import rlprune
from rlprune import masked
from rlprune.pruning import NarrowSpaceWarning, layer_ratios
from rlprune.report import markdown_table
from rlprune.tracing import UnusedModuleWarning, count_macs, macs_of_layers, wrong_layer
from rlprune.utils import call, tensors, to_double
from rlprune.vision import base_of, build_model, example_for

DOCS = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_suffix(".yaml")
CACHE = DOCS.parent / "runs" / "architectures.jsonl"
# What decides a result: a line of the cache made by other code of these does not count.
CODE = ("pruning", "tracing", "vision", "artifacts", "utils", "workloads", "api.py")
LIMIT_SECONDS, TRACE_SECONDS, TRACE_GIGABYTES, GIGABYTES = 900, 120.0, 8.0, 10.0
PATIENCE = 3
"""How many times the limit may go by on the clock: seconds are those of one core, and others may use it as well."""
EXACT, CLASSES, NARROW, LEFT = 1e-9, 10, 0.5, 0.05
SAMPLES = 2
FOLDER = re.escape(tempfile.gettempdir()) + r"/\w+/"
"""What errors call the place where a model was saved for a moment."""
# No cut of these channels could be exact, whatever the tracer can follow.
BY_NATURE = re.compile(
    r"(in|out)put of the model|a single unit|its channels|shares a parameter|crosses|normalises"
)
RESULTS = ("works", "in part", "refused", "too long", "failed", "WRONG", "not run")


@dataclass(frozen=True)
class Entry:
    """A model of the list: its group there, the side of its input (None: its own), arguments of its constructor."""

    group: str
    side: int | None
    arguments: Mapping[str, object] = field(default_factory=dict)


def entries(document: Mapping[str, Mapping[str, Any]]) -> dict[str, Entry]:
    """The models of the list by name."""
    found: dict[str, Entry] = {}
    for group, models in document.items():
        for name, given in models.items():
            if isinstance(given, dict):
                found[name] = Entry(group, given["side"], given["arguments"])
            else:
                found[name] = Entry(group, given)
    return found


ARCHITECTURES = entries(yaml.safe_load(LIST.read_text(encoding="utf-8")))


def examine(name: str) -> dict[str, Any]:
    """Trace, cut and check one architecture; GraphError passes through."""
    torch.set_num_threads(1)
    entry = ARCHITECTURES[name]
    sizes: dict[str, Any] = {"arguments": dict(entry.arguments), "side": entry.side}
    base = base_of(name, CLASSES, **sizes)
    model = scrambled(build_model(name, CLASSES, **sizes)).double()
    torch.manual_seed(0)
    samples = [to_double(example_for(base, entry.side)) for _ in range(SAMPLES)]
    start = core_seconds()
    with warnings.catch_warnings():
        for kind in (UnusedModuleWarning, NarrowSpaceWarning):  # the table says both
            warnings.simplefilter("ignore", kind)
        space = rlprune.trace(
            model, samples[0], max_seconds=PATIENCE * TRACE_SECONDS, max_memory_gb=TRACE_GIGABYTES
        )
    seconds = core_seconds() - start
    if seconds > TRACE_SECONDS:
        raise rlprune.GraphError(f"it took more than {TRACE_SECONDS:g} s ({seconds:.0f} s)")
    lowest = {metric: space.lowest(metric) for metric in ("macs", "params")}
    rng = np.random.default_rng(0)
    widths = space.project(rng.random(len(space.groups)), max(0.5, min(1.0, 1.02 * lowest["macs"])))
    # Units at random, so that a wrong index map cannot hide behind a prefix.
    plan = rlprune.make_plan(space, importance=[rng.random(g.width) for g in space.groups], widths=widths)
    slim = rlprune.prune(model, plan)
    with torch.no_grad():
        wanted, found, whole = (outputs(m, samples) for m in (masked(model, plan), slim, model))
        with tempfile.TemporaryDirectory() as folder:
            rlprune.save(slim, plan, Path(folder) / "pruned", base=base)
            loaded = outputs(rlprune.load(Path(folder) / "pruned").double().eval(), samples)
    counted, macs_equal = counts(slim, model, plan, samples[0])
    return {
        "input": " + ".join("x".join(str(n) for n in t.shape) for t in tensors(samples[0])),
        "seconds": seconds, "groups": len(space.groups), "protected": len(space.protected),
        "left": left_out(space), "lowest": lowest,
        "macs": space.dense_cost("macs"), "params": space.dense_cost("params"),
        "ratio": counted / space.dense_cost("macs"), "macs_equal": macs_equal,
        "params_equal": sum(p.numel() for p in slim.parameters()) == space.cost(widths, "params"),
        "difference": difference(found, wanted), "changed": difference(whole, wanted),
        "reloaded": difference(loaded, found) == 0.0,
    }  # fmt: skip


def core_seconds() -> float:
    """Seconds of processor time of this process and of those that it ended: a busy machine does not count."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def counts(slim: nn.Module, model: nn.Module, plan: rlprune.Plan, sample: Any) -> tuple[float, bool]:
    """The MACs of the cut model, and whether they are those of the plan.

    A detector of two stages works on as many boxes as it proposes, which changes with its weights: there each layer's
    count is compared with its share of the count of the masked dense model, which proposes the same boxes.
    """
    counted, dense = count_macs(slim, sample), count_macs(masked(model, plan), sample)
    if dense == plan.space.dense_cost("macs"):
        return counted, counted == plan.space.cost(plan.widths, "macs")
    by_layer = [macs_of_layers(m, sample) for m in (slim, masked(model, plan))]
    return counted, wrong_layer(*by_layer, layer_ratios(plan.space, plan.widths, "macs")) is None


def outputs(model: nn.Module, samples: Iterable[Any]) -> list[Tensor]:
    """All floating-point tensors that a model gives for some samples; of a detector what its head gives.

    Boxes of equal scores come in any order, and which of them suppresses the others says nothing of a cut. Detectors
    of two stages are compared by the head that proposes boxes, and by the scores in the end, sorted.
    """
    heads: list[Tensor] = []
    modules = dict(model.named_modules())
    named = [name for name in ("head", "rpn.head") if name in modules][:1]
    hooks = [
        modules[n].register_forward_hook(lambda _, __, value: heads.extend(tensors(value))) for n in named
    ]
    found = []
    for sample in samples:
        heads.clear()
        value = call(model, sample)
        if isinstance(sample, list):
            scores = [] if named == ["head"] else [boxes["scores"].sort().values for boxes in value]
            value = (*heads, *scores)
        found += [t for t in tensors(value) if t.is_floating_point()]
    for hook in hooks:
        hook.remove()
    return found


def difference(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Largest difference of two lists of outputs, in units of the largest one; infinite where they do not match."""
    if [t.shape for t in some] != [t.shape for t in others]:
        return float("inf")
    largest = max((float(t.abs().max()) for t in others if t.numel()), default=0.0)
    apart = max(
        (float((a - b).abs().max()) for a, b in zip(some, others, strict=True) if a.numel()), default=0.0
    )
    return apart / largest if largest else apart


def left_out(space: rlprune.PruningSpace) -> list[tuple[str, float, str]]:
    """(layer, share of the MACs, reason) of layers protected for another reason than `BY_NATURE`, largest first."""
    shares = {part.name: part.share for part in space.protected_shares("macs")}
    found = [(n, shares.get(n, 0.0), why) for n, why in space.protected.items() if not BY_NATURE.search(why)]
    return sorted(found, key=lambda row: -row[1])


def scrambled(model: nn.Module) -> nn.Module:
    """Random statistics, shifts and scales: f(0) = 0, or a branch scaled by 0, would hide a wrong cut."""
    torch.manual_seed(0)
    for module in model.modules():
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if key == "running_mean":
                tensor.normal_(0, 0.2)
            elif key == "running_var":
                tensor.uniform_(0.7, 1.4)
            elif isinstance(tensor, nn.Parameter) and tensor.ndim == 1:
                with torch.no_grad():
                    tensor.normal_(0, 0.2) if key == "bias" else tensor.uniform_(0.7, 1.3)
            elif isinstance(tensor, nn.Parameter) and tensor.numel() and tensor.abs().max() < 1e-3:
                with torch.no_grad():  # layer scales of 1e-6, heads of 0: they would hide everything
                    tensor.normal_(0, 0.1)
    return model


def exact(facts: Mapping[str, Any]) -> bool:
    """Whether everything that the page claims of a cut model holds for one architecture."""
    same = facts["difference"] <= EXACT < facts["changed"]
    return bool(same and facts["macs_equal"] and facts["params_equal"] and facts["reloaded"])


def result(facts: Mapping[str, Any]) -> str:
    """One of `RESULTS`."""
    for kind in ("refused", "failed"):
        if kind in facts:
            late = re.search(r"took more than|stopped after", str(facts[kind]))
            return "too long" if late else kind
    if "difference" not in facts:
        return "not run"
    if not exact(facts):
        return "WRONG"
    left = sum(share for _, share, _ in facts["left"])
    return "works" if facts["lowest"]["macs"] <= NARROW and left <= LEFT else "in part"


# One process a model


def in_own_process(name: str) -> dict[str, Any]:
    """Facts of `examine`, or {"refused": line} or {"failed": line}; "all_seconds" and "memory_gb" of the process."""
    command, start = [sys.executable, __file__, "--one", name], time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        try:
            out, err = child.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            return {"failed": f"stopped after {LIMIT_SECONDS} s", "all_seconds": LIMIT_SECONDS}
    lines = [line for line in err.strip().splitlines() if line] or [f"ended with code {child.returncode}"]
    if child.returncode == 0:
        facts: dict[str, Any] = json.loads(out.splitlines()[-1])
    else:
        facts = {"refused" if child.returncode == 2 else "failed": lines[-1][:400]}
    return facts | {"all_seconds": time.perf_counter() - start}


def one(name: str) -> int:
    """Child process: the facts as JSON on stdout, exit 2 with one line where the model is refused."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(GIGABYTES * 2**30),) * 2)
    except (ImportError, ValueError):  # Windows, macOS: only the tracer's own limit holds
        pass
    try:
        facts = examine(name)
    except rlprune.GraphError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        facts["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    except NameError:
        facts["memory_gb"] = None
    print(json.dumps(facts))
    return 0


# The cache


def code_mark() -> str:
    """A hash of the code and of the libraries that decide a result."""
    digest = hashlib.sha256(f"{torch.__version__} {EXACT} {SAMPLES}".encode())
    root = Path(inspect.getfile(rlprune)).parent
    for part in CODE:
        files = [root / part] if part.endswith(".py") else sorted((root / part).rglob("*.py"))
        for file in files:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def known(path: Path, mark: str | None) -> dict[str, dict[str, Any]]:
    """The last facts of each model in the cache; only those of one mark, unless it is None. A torn line is dropped."""
    found: dict[str, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        entry = ARCHITECTURES.get(row["model"])
        if entry is not None and row["entry"] == written(entry) and mark in (None, row["code"]):
            found[row["model"]] = row["facts"]
    return found


def written(entry: Entry) -> list[Any]:
    """What of an entry decides the result, as JSON gives it back."""
    return [entry.side, json.loads(json.dumps(entry.arguments))]


class Recorder:
    """Examines models in a few processes at once and adds a line to the cache as each is done."""

    def __init__(self, path: Path, mark: str, total: int) -> None:
        self.path, self.mark, self.total = path, mark, total
        self.done = 0
        self.lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str) -> None:
        facts = in_own_process(name)
        line = json.dumps(
            {"model": name, "entry": written(ARCHITECTURES[name]), "code": self.mark, "facts": facts}
        )
        with self.lock:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            self.done += 1
            print(f"{self.done}/{self.total}  " + "  ".join(row(name, facts)), flush=True)
            said = reason(name, facts)
            if said:
                print(said, flush=True)


# The page


HEADER = ["model", "input", "result", "groups", "protected", "lowest MACs", "lowest params", "M MACs", "cut to",
          "difference", "trace and proof (s)"]  # fmt: skip


def row(name: str, facts: Mapping[str, Any]) -> list[str]:
    """One line of the table."""
    entry = ARCHITECTURES[name]
    if "difference" not in facts:
        return [name, str(entry.side or "own"), result(facts), *["–"] * 8]
    return [
        name, facts["input"], result(facts), str(facts["groups"]), str(facts["protected"]),
        f"{facts['lowest']['macs']:.3f}", f"{facts['lowest']['params']:.3f}", f"{facts['macs'] / 1e6:.1f}",
        f"{100 * facts['ratio']:.1f}%", f"{facts['difference']:.0e}" if facts["difference"] else "0",
        f"{facts['seconds']:.1f}",
    ]  # fmt: skip


def reason(name: str, facts: Mapping[str, Any]) -> str:
    """What stands in the way of more, in a line; "" where nothing does."""
    kind = result(facts)
    if kind == "not run":
        return ""
    if kind == "WRONG":
        wrong = [key for key in ("macs_equal", "params_equal", "reloaded") if not facts[key]]
        return f"- {name}: WRONG: difference {facts['difference']:.1e}, {', '.join(wrong) or 'costs agree'}"
    if kind not in ("works", "in part"):
        line = str(facts.get("refused", facts.get("failed")))
        return f"- {name}: {kind}: {re.sub(FOLDER, '', line)}"
    parts = []
    if facts["lowest"]["macs"] > NARROW:
        parts.append(f"{facts['lowest']['macs']:.1%} of the MACs stay at the smallest widths")
    if facts["left"]:
        (layer, _, why), count = facts["left"][0], len(facts["left"])
        layers = layer if count == 1 else f"{layer} and {count - 1} more"
        parts.append(f"{layers} ({sum(row[1] for row in facts['left']):.1%} of the MACs): {why}")
    return f"- {name}: {kind}: {'; '.join(parts)}" if parts else ""


def summary(results: Mapping[str, str]) -> str:
    """How many models end how, for all of them and for each group of the list."""

    def line(label: str, names: Sequence[str]) -> str:
        count = Counter(results[name] for name in names)
        told = [f"{count[kind]} {kind} ({count[kind] / len(names):.0%})" for kind in RESULTS if count[kind]]
        return f"- {label}: {len(names)} models: {', '.join(told)}"

    groups: dict[str, list[str]] = {}
    for name in results:
        groups.setdefault(ARCHITECTURES[name].group, []).append(name)
    return "\n".join([line("all", list(results)), *(line(label, names) for label, names in groups.items())])


def age(found: Mapping[str, object], current: Mapping[str, object]) -> str:
    """How many lines were made by the code as it stands."""
    if len(current) >= len(found):
        return "All lines were made by the code as it stands."
    return (
        f"{len(current)} of the {len(found)} lines were made by the code as it stands, the others before its last "
        "change to tracing, pruning, models or files (the cache file says which)."
    )


def page(found: Mapping[str, Mapping[str, Any]], current: Mapping[str, object]) -> str:
    """The page for all models of the list; those without facts are named as not run, and how old the lines are."""
    every = {name: found.get(name, {}) for name in ARCHITECTURES}
    times = sorted(facts["seconds"] for facts in every.values() if "seconds" in facts)
    middle = times[len(times) // 2] if times else 0.0
    return PAGE.format(
        summary=summary({name: result(facts) for name, facts in every.items()}),
        table=markdown_table(HEADER, [row(name, facts) for name, facts in every.items()]),
        reasons="\n".join(said for name, facts in every.items() if (said := reason(name, facts))) or "- none",
        exact=EXACT, narrow=f"{NARROW:.0%}", left=f"{LEFT:.0%}", limit=f"{TRACE_SECONDS:g}", samples=SAMPLES,
        times=f"{middle:.1f} s in the middle, {times[-1] if times else 0.0:.1f} s at most",
        torch=torch.__version__, python=platform.python_version(), age=age(found, current),
    )  # fmt: skip


PAGE = """# Architectures

Written by `python docs/scripts/architectures.py` (torch {torch}, Python {python}, one CPU thread, random weights,
float64) from the list `docs/scripts/architectures.yaml`. {age}

{summary}

Tracing and proof take {times}; the limit is {limit} s. Seconds are those of one core (processor time), so that what
else a machine does is not counted.

What is checked, on widths and units drawn at random at half of the MACs (or just above the lowest budget): the cost
formula equals half of what torch's FLOP counter finds on the built model, the parameter counts agree, all outputs
equal those of the masked dense model on {samples} random samples to {exact:g} of the largest output, and the saved
folder loads, without the dense model being passed in, to the same outputs. Biases and normalisation statistics are
random too, so that f(0) is not 0.

- **works**: all of that holds, at least {narrow} of the MACs can be cut, and at most {left} of them are held by layers
  that keep their width for another reason than their nature: making the model's output, a norm or softmax that runs
  over the channels, so that no cut of them is exact (`prune.inexact`), a single channel, shared weights.
- **in part**: all of that holds, but fewer MACs can be cut, or layers with more of them keep their width because the
  tracer cannot follow an operation; the list below says which.
- **refused**: one line says why nothing of the model can be pruned. **too long**: stopped by the limit on time.
- **failed**, **WRONG**: a fault of rlprune; a WRONG cut computes something else than it should.

"lowest" is the smallest budget that the minimal widths reach, as a share of the dense model. "protected" counts the
layers whose outputs keep their width (the one that makes the output is always one).

{table}

## What stays, and why

{reasons}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", metavar="PATTERN", help="only models whose name matches")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once (each up to 10 GB)")
    parser.add_argument("--again", action="store_true", help="also what the cache knows")
    parser.add_argument(
        "--page", action="store_true", help="only write the page, from all that the cache knows"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"default: {CACHE.name} in runs/")
    parser.add_argument(
        "--print", nargs="+", metavar="NAME", help="examine these and print them; nothing is written"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return one(arguments.one)
    if arguments.print:
        for name in arguments.print:
            facts = in_own_process(name)
            print("  ".join(row(name, facts)), reason(name, facts), sep="\n")
        return 0
    mark = code_mark()
    if not arguments.page:
        chosen = [n for n in ARCHITECTURES if any(fnmatch.fnmatch(n, p) for p in arguments.only or ["*"])]
        have = {} if arguments.again else known(arguments.cache, mark)
        missing = [name for name in chosen if name not in have]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            try:
                list(pool.map(Recorder(arguments.cache, mark, len(missing)), missing))
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    found = known(arguments.cache, None if arguments.page or arguments.only else mark)
    current = known(arguments.cache, mark)
    (DOCS / "architectures.md").write_text(page(found, current), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
