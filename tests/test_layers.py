"""The floors of the design: a file imports from lower floors, or from its own package without a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "rlprune"
# Packages of one floor do not import each other.
FLOORS = {
    "errors": 1,
    "utils": 2,
    "config": 2.5,
    "execution": 2.7,
    "pruning": 3,
    "tracing": 4,
    "importance": 4,
    "artifacts": 4,
    "recovery": 5,
    "workloads": 6,
    "vision": 7,
    "language": 7,
    "rules": 8,
    "latency": 8,
    "api": 8,
    "evaluation": 9,
    "envs": 10,
    "report": 10,
    "surrogates": 11,
    "agents": 12,
    "tracking": 12,
    "experiments": 13,
    "plugins": 13,
    "benchmarks": 14,
    "cli": 15,
    "__main__": 16,
    "__init__": 16,  # the public surface: it may name everything
}


@dataclass(frozen=True)
class Edge:
    """One import: from a file to a module of ours, both as dotted names below rlprune."""

    source: str
    target: str
    line: int
    types_only: bool


def place(module: str) -> str:
    return module.split(".")[0]


def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts)] = path
    return names


def resolve(name: str, known: dict[str, Path]) -> str | None:
    """The file that a dotted name below rlprune lives in; None for a name that is no module."""
    for candidate in (name, f"{name}.__init__" if name else "__init__"):
        if candidate in known:
            return candidate
    return None


def edges_of(module: str, path: Path, known: dict[str, Path]) -> Iterator[Edge]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    types_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    # A package's __init__ counts itself as the level that one dot means.
    package = module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            absolute = [a.name for a in node.names if a.name.split(".")[0] == "rlprune"]
            assert not absolute, f"{path}:{node.lineno}: import {absolute[0]}: use a relative import"
        if not isinstance(node, ast.ImportFrom):
            continue
        outside = node.module is not None and node.module.split(".")[0] == "rlprune"
        assert node.level or not outside, f"{path}:{node.lineno}: use a relative import"
        if not node.level:
            continue
        base = package[: len(package) - (node.level - 1)]
        stem = ".".join([*base, *(node.module.split(".") if node.module else [])])
        for alias in node.names:
            target = resolve(f"{stem}.{alias.name}" if stem else alias.name, known) or resolve(stem, known)
            assert target is not None, f"{path}:{node.lineno}: cannot tell what {alias.name!r} is"
            if target != module:
                yield Edge(module, target, node.lineno, id(node) in types_only)


KNOWN = modules()
EDGES = [edge for name, path in KNOWN.items() for edge in edges_of(name, path, KNOWN)]


def test_every_place_has_a_floor() -> None:
    assert {place(name) for name in KNOWN} <= set(FLOORS)
    assert len(EDGES) > 20


def allowed(edge: Edge) -> bool:
    here, there = place(edge.source), place(edge.target)
    if edge.target == "__init__":  # `from . import __version__`
        return FLOORS[here] >= FLOORS["experiments"]
    return here == there or FLOORS[there] < FLOORS[here]


@pytest.mark.parametrize("module", KNOWN)
def test_no_import_goes_up(module: str) -> None:
    wrong = [
        f"line {edge.line} imports {edge.target} (floor {FLOORS[place(edge.target)]})"
        for edge in EDGES
        if edge.source == module and not allowed(edge)
    ]
    assert not wrong, f"rlprune/{module}.py (floor {FLOORS[place(module)]}): {'; '.join(wrong)}"


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a directed graph as a path, or an empty list."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            circle = visit(target, [*path, node])
            if circle:
                return circle
        done.add(node)
        return []

    for node in sorted(graph):
        circle = visit(node, [])
        if circle:
            return circle
    return []


def test_no_circle() -> None:
    """Imports inside of functions count as well; only those for type checkers do not."""
    graph: dict[str, set[str]] = {}
    for edge in EDGES:
        # The package's root names everything lazily, and `from . import __version__` reads one constant.
        if not edge.types_only and "__init__" not in (edge.source, edge.target):
            graph.setdefault(edge.source, set()).add(edge.target)
    assert find_circle(graph) == []


def test_the_checks_see_a_violation() -> None:
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert not allowed(Edge("tracing.graph", "envs.task", 1, False))
    assert not allowed(Edge("tracing.graph", "workloads.base", 1, True))
    assert not allowed(Edge("config.config", "artifacts.policy", 1, False))
    assert not allowed(Edge("vision.data", "language.text", 1, False))
    assert allowed(Edge("agents.ppo.agents", "envs.task", 1, False))


def test_torch_pruning_is_imported_by_the_peer_only() -> None:
    users = [
        name
        for name, path in KNOWN.items()
        if any(
            isinstance(node, (ast.Import, ast.ImportFrom)) and "torch_pruning" in ast.unparse(node)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        )
    ]
    assert users == ["rules.global_pruners"]


def insides(tree: ast.AST) -> Iterator[str]:
    """What a file takes from the inside of libraries: private names of modules, and the attributes that are listed."""
    libraries = {
        "gymnasium",
        "nn",
        "optuna",
        "sb3_contrib",
        "stable_baselines3",
        "torch",
        "torch_pruning",
        "tp",
    }
    libraries |= {"transformers", "peft", "accelerate", "joblib", "loky", "process_executor"}
    private = re.compile(r"(^|\.)_[a-z]\w*(\.|$)", re.I)
    own = {
        ast.unparse(n)
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
    }
    own = {name for name in own if re.fullmatch(r"self\.\w+", name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.ClassDef) and node.bases:
            names = [f"{node.name}.{f.name}" for f in node.body if isinstance(f, ast.FunctionDef)]
        else:
            continue
        for name in names:
            root = name.split(".")[0]
            inner = name.rpartition(".")[2] in OF_LIBRARIES and name not in own
            if inner or (root in libraries and private.search(name)):
                yield name


# Attributes of the libraries' objects, whatever the object is called; tests/test_internals.py looks for them there.
OF_LIBRARIES = {
    "_last_obs", "_last_episode_starts", "_n_updates", "_sample_action", "_update_learning_rate", "_build",
    "_get_indices", "_setup_model", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set",
    "_no_split_modules", "_n_gpu", "_get_train_sampler", "_load_from_checkpoint",
}  # fmt: skip
INTERNALS = (
    "agents.sb3_internals",
    "execution.loky_internals",
    "utils.torch_internals",
    "language.transformers_internals",
)
# Copies of them travel in saved folders, so they cannot import the others.
ALONE = ("language.dropped", "language.sizes")


@pytest.mark.parametrize("module", [name for name in KNOWN if name not in (*INTERNALS, *ALONE)])
def test_no_other_file_reaches_into_a_library(module: str) -> None:
    found = sorted(set(insides(ast.parse(KNOWN[module].read_text(encoding="utf-8")))))
    assert not found, (
        f"rlprune/{module}.py uses {', '.join(found)}: put it into one of {', '.join(INTERNALS)}"
    )


@pytest.mark.parametrize(
    "line",
    ["from torch_pruning._helpers import x", "from torch.nn import _x", "import torch._dynamo", "tp.ops._OutputOp",
     "nn.modules.conv._ConvNd", "self.ppo._last_obs = None", "class Mine(DDPG):\n    def _sample_action(self): pass"],
)  # fmt: skip
def test_the_check_sees_a_reach_into_a_library(line: str) -> None:
    assert list(insides(ast.parse(line)))


def test_the_internals_are_used() -> None:
    assert all(list(insides(ast.parse(KNOWN[name].read_text(encoding="utf-8")))) for name in INTERNALS)


WINGS = ("vision", "language")
# Names that only one wing has; general code gets them from an adapter or a builder.
OF_A_WING = {
    *("is_language_model", "is_language", "is_causal", "is_text", "language_model", "LANGUAGE_KINDS"),
    *("LanguageWorkload", "VisionWorkload", "LanguageAdapter", "VisionAdapter", "LanguageCalibration"),
    *("PreTrainedModel", "AutoModelForCausalLM"),
}


def questions(tree: ast.AST) -> Iterator[str]:
    """Where a file asks which kind of model it holds: by a name of one wing, by a flag, or by comparing a wing."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if name in OF_A_WING or (isinstance(node, ast.Attribute) and name == "language"):
                yield ast.unparse(node)
        elif isinstance(node, ast.alias) and node.name in OF_A_WING:
            yield node.name
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            constants = {s.value for s in sides if isinstance(s, ast.Constant)}
            if constants & {*WINGS, "transformers", "perplexity", "hf:"}:
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            asked = [a.value for a in node.args if isinstance(a, ast.Constant)]
            if {"language", "tokenizer"} & set(asked):
                yield ast.unparse(node)


@pytest.mark.parametrize("module", [name for name in KNOWN if place(name) not in WINGS])
def test_only_a_wing_knows_the_kind_of_a_model(module: str) -> None:
    found = sorted(set(questions(ast.parse(KNOWN[module].read_text(encoding="utf-8")))))
    assert not found, f"rlprune/{module}.py asks {', '.join(found)}: add a method to ModelAdapter or Workload"


@pytest.mark.parametrize(
    "line",
    ["if workload.language: pass", "is_causal(name)", "from x import LanguageWorkload", "space.wing == 'language'",
     "getattr(workload, 'tokenizer', None)", "base.get('source') == 'transformers'"],
)  # fmt: skip
def test_the_check_sees_a_question(line: str) -> None:
    assert list(questions(ast.parse(line)))


def test_the_root_holds_packages_and_five_files() -> None:
    files = {path.stem for path in ROOT.glob("*.py")}
    assert files == {"__init__", "__main__", "errors", "api", "plugins"}
