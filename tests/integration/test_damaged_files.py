"""Every JSON, JSON Lines and YAML file that is read, damaged at random: no exception but ours, none that lasts.

``RLPRUNE_FUZZ=2000`` looks at so many damages of each file, and draws the pictures of the reports as well.
"""

from __future__ import annotations

import contextlib
import io
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

import rlprune
from helpers.damage import damaged, damaged_lines
from helpers.synthetic import make_synthetic_task
from helpers.whole_files import small_space, write_whole
from rlprune.agents.ppo.policy import load_policy
from rlprune.artifacts.documents import read_plan
from rlprune.artifacts.pruned_model import example_of
from rlprune.config.config import load_config
from rlprune.errors import RlpruneError
from rlprune.evaluation.ledger import EvaluationLog
from rlprune.latency.profile import read_table
from rlprune.report import html

EXAMPLES = int(os.environ.get("RLPRUNE_FUZZ", "0"))
SECONDS = 20.0  # of the processor that no reading of a damaged file may take


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

    Plan.from_dict(read_plan(folder), small_space())


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
        ("a benchmark, reported", Case("benchmark/results.json", lambda f: html.build(f / "benchmark"))),
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each file, small and whole."""
    return write_whole(tmp_path_factory.mktemp("whole"))


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
def test_damaged_files_are_read_or_refused(name: str, whole: Path) -> None:
    case = CASES[name]
    path = whole / case.file
    make = damaged_lines if path.suffix == ".jsonl" else damaged

    @settings(
        max_examples=EXAMPLES or case.examples,
        deadline=None,
        database=None,
        derandomize=not EXAMPLES,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate] if EXAMPLES else list(Phase),
    )
    @given(content=make(path.read_bytes()))
    def check(content: bytes) -> None:
        started = time.process_time()
        with replaced(path, content), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                case.read(whole)
            except RlpruneError as error:
                assert str(error)
        assert time.process_time() - started < SECONDS

    check()
