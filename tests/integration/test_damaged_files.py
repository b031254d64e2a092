"""Every JSON, JSON Lines and YAML file that is read, damaged at random: no exception but ours, none that lasts.

``RLPRUNE_FUZZ=2000`` looks at so many damages of each file, and draws the pictures of the reports as well.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import rlprune
from helpers.damage import damaged, damaged_lines
from helpers.lm_folder import write_folder
from helpers.pruned_lm import pruned as pruned_lm
from helpers.questions import instruction
from helpers.run_fixture import write_run
from helpers.synthetic import make_synthetic_task
from rlprune.agents.ppo.policy import load_policy
from rlprune.artifacts.documents import read_plan
from rlprune.artifacts.pruned_model import example_of
from rlprune.config.config import load_config
from rlprune.errors import RlpruneError
from rlprune.evaluation.ledger import EvaluationLog
from rlprune.language.loading import help_tokenizer
from rlprune.latency.profile import read_table
from rlprune.report import html, plots

EXAMPLES = int(os.environ.get("RLPRUNE_FUZZ", "0"))
SECONDS = 20.0  # that no reading of a damaged file may take


@dataclass(frozen=True)
class Case:
    """A file below the folder of whole ones, what reads it, and how many damages of it are looked at."""

    file: str
    read: Callable[[Path], object]
    examples: int = 25


def load_model(folder: Path) -> None:
    """What `evaluate`, `export` and `apply` do first with the folder of a pruned model."""
    document = read_plan(folder)
    example_of(document)
    rlprune.load(folder)


def load_plan(folder: Path) -> None:
    """What `apply plan.json` does with a plan."""
    from rlprune.pruning.plan import Plan

    Plan.from_dict(read_plan(folder), _space())


def use_policy(folder: Path) -> None:
    policy = load_policy(folder)
    task = make_synthetic_task(6)
    policy.distribution(task, 0.5)
    policy.widths(task, 0.5)


def load_lm(folder: Path) -> None:
    from rlprune.language.files import pretrained

    pretrained.load_tokenizer(folder)
    rlprune.load(folder)


def load_dense_lm(folder: Path) -> None:
    from rlprune.language.loading import load_causal

    load_causal(f"hf:{folder}")


def evaluate_tokenizer(folder: Path) -> None:
    from rlprune.language.comparison import _tokenizer_of

    _tokenizer_of(folder, read_plan(folder))


def questions(folder: Path) -> None:
    from rlprune.language.zeroshot import read_questions

    read_questions(folder / "questions.json")


CASES: dict[str, Case] = {}
CASES.update(
    (
        ("a plan, loaded", Case("pruned/plan.json", lambda f: load_model(f / "pruned"))),
        ("a plan, applied", Case("pruned/plan.json", lambda f: load_plan(f / "pruned"))),
        ("a policy", Case("policy/policy.json", lambda f: use_policy(f / "policy"))),
        ("a ledger", Case("run/ledger.jsonl", lambda f: EvaluationLog(f / "run" / "ledger.jsonl"))),
        ("a run's settings", Case("run/config.yaml", lambda f: load_config(f / "run" / "config.yaml"))),
        ("results, reported", Case("run/results.json", lambda f: html.build(f / "run"))),
        ("a ledger, reported", Case("run/ledger.jsonl", lambda f: html.build(f / "run"), 10)),
        ("budgets, reported", Case("run/budgets.json", lambda f: html.build(f / "run"), 10)),
        ("a plan, reported", Case("run/pruned/plan.json", lambda f: html.build(f / "run"), 10)),
        ("a latency table", Case("table.json", lambda f: read_table(f / "table.json"))),
        ("an LM's plan", Case("lm/plan.json", lambda f: load_lm(f / "lm"))),
        ("an LM's config", Case("lm/config.json", lambda f: load_lm(f / "lm"))),
        ("an LM's generation", Case("lm/generation_config.json", lambda f: load_lm(f / "lm"))),
        ("an LM's tokenizer", Case("lm/tokenizer.json", lambda f: load_lm(f / "lm"), 10)),
        ("its settings", Case("lm/tokenizer_config.json", lambda f: evaluate_tokenizer(f / "lm"))),
        ("a dense LM", Case("dense/config.json", lambda f: load_dense_lm(f / "dense"))),
        ("its generation", Case("dense/generation_config.json", lambda f: load_dense_lm(f / "dense"), 10)),
        ("its tokenizer", Case("dense/tokenizer_config.json", lambda f: load_dense_lm(f / "dense"), 10)),
        ("questions", Case("questions.json", questions)),
    )
)


def _net() -> torch.nn.Module:
    from rlprune.vision.zoo import build_model

    torch.manual_seed(0)
    return build_model("cifar_resnet20", 10, 1, arguments={"width": 4}).eval()


_SPACES: list[Any] = []


def _space() -> Any:
    if not _SPACES:
        _SPACES.append(rlprune.trace(_net(), torch.zeros(1, 1, 8, 8)))
    return _SPACES[0]


def _write_policy(folder: Path) -> None:
    from gymnasium import spaces

    from rlprune.agents.ppo.policy import GroupPolicy, provenance, save_policy
    from rlprune.envs.observation import BOUND, FEATURE_VERSIONS

    width = 6 * len(FEATURE_VERSIONS[1])
    box = spaces.Box(-BOUND, BOUND, (width,), np.float32)
    policy = GroupPolicy(box, spaces.Box(-1.0, 1.0, (6,), np.float32), lambda _: 1e-3, hidden=8)
    policy.provenance = provenance([make_synthetic_task(6)])
    save_policy(policy, folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each file, small and whole."""
    from rlprune.latency.table import Calibration, LatencyTable, LayerTable, LayerUse

    folder = tmp_path_factory.mktemp("whole")
    space = _space()
    scores = [np.arange(group.width, 0, -1.0) for group in space.groups]
    plan = rlprune.make_plan(space, importance=scores, distribution=np.ones(len(space.groups)), budget=0.5)
    rlprune.save(rlprune.prune(_net(), plan), plan, folder / "pruned")
    _write_policy(folder / "policy")
    write_run(folder / "run", groups=4, seeds=1, evaluations=6)
    _write_ledger(folder / "run" / "ledger.jsonl")
    (folder / "run" / "config.yaml").write_text(json.dumps(load_config("digits").to_dict()))
    shutil.copy(folder / "pruned" / "plan.json", folder / "run" / "pruned" / "plan.json")
    sizes = np.array([1, 2, 4])
    layer = LayerTable("conv", sizes, sizes, np.arange(9.0).reshape(3, 3), 16.0)
    calibration = Calibration(element={16.0: 0.5}, dense=3.0)
    table = LatencyTable("mark", 1, {"device": "cpu"}, (layer,), (LayerUse("conv1", 0, 1),), calibration)
    (folder / "table.json").write_text(json.dumps(table.to_dict()))
    slim, plan = pruned_lm()
    rlprune.save(slim, plan, folder / "lm", tokenizer=help_tokenizer(300))
    write_folder(folder / "dense", num_hidden_layers=1)
    entry = {"instruction": instruction("why?", ("a", "b")), "answer": "answer1"}
    (folder / "questions.json").write_text(json.dumps([entry] * 2))
    return folder


def _write_ledger(path: Path) -> None:
    log = EvaluationLog(None)
    path.unlink()
    task = make_synthetic_task(4)
    for width in (3, 4, 5):
        found = task.evaluator.evaluate([width] * 4)
        row = {"seconds": 0.1, "method": "ppo", "seed": 0, "task": "", "widths": list(found.widths)}
        row |= {
            name: getattr(found, name) for name in ("cost", "score", "loss", "metric", "error", "samples")
        }
        log.path = path
        log.append(row)  # type: ignore[arg-type]


@contextlib.contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("name", CASES)
def test_whole_files_are_read(name: str, whole: Path) -> None:
    CASES[name].read(whole)


@pytest.mark.parametrize("name", CASES)
def test_damaged_files_are_read_or_refused(name: str, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    path = whole / case.file
    if not EXAMPLES:  # drawing takes most of a report's time
        monkeypatch.setattr(plots, "to_svg", lambda figure: b"")
    make = damaged_lines if path.suffix == ".jsonl" else damaged

    @settings(
        max_examples=EXAMPLES or case.examples,
        deadline=None,
        database=None,
        derandomize=not EXAMPLES,
        suppress_health_check=list(HealthCheck),
    )
    @given(content=make(path.read_bytes()))
    def check(content: bytes) -> None:
        started = time.perf_counter()
        with replaced(path, content), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                case.read(whole)
            except RlpruneError as error:
                assert len(str(error)) < 2000
                assert str(error).encode(errors="backslashreplace")
        assert time.perf_counter() - started < SECONDS

    check()
