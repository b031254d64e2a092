"""The command line itself: help, exit codes, one-line errors; the work behind it is replaced."""

from __future__ import annotations

import argparse
import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rlprune
from rlprune import experiments
from rlprune.cli import commands
from rlprune.cli import main as cli
from rlprune.cli.catalogue import KINDS
from rlprune.config.config import load_config, shipped_configs
from rlprune.errors import BudgetError
from rlprune.utils.findings import Findings

API_COMMANDS = (
    "demo", "inspect", "train", "apply", "prune", "benchmark", "fidelity", "evaluate", "export", "push", "report",
    "optuna", "list", "schema", "completion",
)  # fmt: skip


def sub_parsers() -> dict[str, argparse.ArgumentParser]:
    for action in cli.build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("no commands")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command run in this process."""
    try:
        code = cli.main(list(words))
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def one_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    code, out, err = run(capsys, *words)
    assert code == 2
    assert out == ""
    assert err.startswith("rlprune: error: ")
    assert err.count("\n") == 1
    return err


def replace_work(monkeypatch: pytest.MonkeyPatch, module: str = "train", **functions: Any) -> None:
    """Stand in for the module that does a command's work."""
    fake = SimpleNamespace(**functions)
    monkeypatch.setitem(sys.modules, f"rlprune.experiments.{module}", fake)
    monkeypatch.setattr(experiments, module, fake, raising=False)


def test_the_commands_are_those_of_the_api() -> None:
    assert tuple(sub_parsers()) == API_COMMANDS


@pytest.mark.parametrize("command", ["", *API_COMMANDS])
def test_help_has_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *command.split(), "--help")
    assert (code, err) == (0, "")
    example = re.search(r"example: rlprune (.*)", out)
    assert example is not None
    words = cli._separate_sets(re.sub(r"\s+", " ", out[example.start(1) :]).split())
    args = cli.build_parser().parse_args(words)
    if command:
        assert args.command == command


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"rlprune {rlprune.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "a command is needed"),
        ("trian digits", "did you mean 'train'?"),
        ("train", "required: CONFIG"),
        ("train digits --sett a=1", "did you mean '--set'?"),
        ("train digits --seed x", "--seed: must be a whole number of 0 and more, got 'x'"),
        ("train digits --threads 0", "--threads: must be a whole number of 1 and more"),
        ("train digits --out", "--out: expected one argument"),
        ("apply runs/a digits --resume", "unrecognized arguments: --resume, which another command has"),
        ("train digts", "did you mean 'digits'?"),
        ("train digits --set search.evalutions=3", "did you mean 'evaluations'?"),
        ("train digits --set nonsense", "must look like"),
        ("train digits --resume --out nowhere", "no run in nowhere"),
        ("prune digits", "required: --rule NAME, --same-widths"),
        ("prune digits --rule lamb", "did you mean 'lamp'?"),
        ("prune digits --rule lamp --budget 1.5", "budget.target: "),
        ("apply nowhere digits", "RUN_OR_POLICY: nowhere: no such folder"),
        ("benchmark digits --methods ppo,,lamp", "--methods: must be different names"),
        ("evaluate nowhere", "DIR: nowhere: no such folder"),
        ("export nowhere --to onnx", "DIR: nowhere: no such folder"),
        ("report nowhere", "RUN: nowhere: no such folder"),
        ("list rulez", "did you mean 'rules'?"),
        ("inspect digits --set search.agent=ppp", "search.agent: unknown name 'ppp' (did you mean 'ppo'?)"),
        ("inspect digits --set prune.importance=tailor", "did you mean 'taylor'?"),
        ("inspect digits --set search.base_rule=lamb", "did you mean 'lamp'?"),
        ("inspect digits --set data.name=digit", "did you mean 'digits'?"),
    ],
)
def test_wrong_command_lines(
    words: str,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in one_line(capsys, *words.split())
    assert list(tmp_path.iterdir()) == []


def test_list_prints_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in KINDS:
        code, out, err = run(capsys, "list", kind)
        assert (code, err) == (0, "")
        lines = out.splitlines()
        assert len(lines) >= 2, kind
        for line in lines:
            assert re.match(r"\S+\s\s+\S", line), line
    assert set(shipped_configs()) == {
        line.split()[0] for line in run(capsys, "list", "configs")[1].splitlines()
    }
    code, out, _ = run(capsys, "list")
    assert code == 0
    assert all(f"{kind}:" in out for kind in KINDS if kind != "settings")


def test_sets_may_be_given_together_or_apart() -> None:
    together = cli._separate_sets("train --set a=1 b=2 digits --set c=3".split())
    assert together == "train --set a=1 --set b=2 digits --set c=3".split()
    args = cli.build_parser().parse_args(together)
    assert (args.overrides, args.config) == (["a=1", "b=2", "c=3"], "digits")


def test_options_before_and_after_the_command() -> None:
    parser = cli.build_parser()
    assert parser.parse_args(["--debug", "--threads", "2", "list"]).threads == 2
    assert parser.parse_args(["--debug", "list"]).debug
    assert parser.parse_args(["list", "--debug"]).debug
    assert not parser.parse_args(["list"]).debug


def test_train_passes_the_settings_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def train(config: Any, out: Path, *, resume: bool, callback: Any) -> None:
        seen.update(config=config, out=out, resume=resume)

    replace_work(monkeypatch, train=train)
    monkeypatch.setattr(commands, "show_run", lambda out, args: print(f"shown {out}"))
    monkeypatch.chdir(tmp_path)
    code, out, err = run(
        capsys, "train", "digits", "--seed", "3", "--set", "search.evaluations=7", "budget.target=30%"
    )
    assert (code, err) == (0, "")
    assert out == f"shown {Path('runs/digits')}\n"
    assert seen["config"].seed == 3
    assert seen["config"].search.evaluations == 7
    assert seen["config"].budget.target == "30%"
    # A folder that is taken is left alone when nobody asked for it.
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    run(capsys, "train", "digits")
    assert seen["out"] == Path("runs/digits-2")
    run(capsys, "train", "digits", "--resume")
    assert (seen["out"], seen["resume"]) == (Path("runs/digits"), True)


def test_the_demo_is_a_train_whose_policy_prunes_a_second_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def train(config: Any, out: Path, *, resume: bool, callback: Any) -> None:
        seen.update(config=config, run=out, resume=resume)

    class Applied(str):
        def save(self, folder: Path) -> None:
            seen["out"] = folder

    def apply(source: Path, config: Any, budget: float, **options: Any) -> Applied:
        seen.update(source=source, other=config, budget=budget, **options)
        return Applied("scores")

    replace_work(monkeypatch, train=train)
    replace_work(monkeypatch, "apply", apply=apply)
    monkeypatch.setattr(commands, "show_run", lambda out, args: print(f"shown {out}"))
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    monkeypatch.chdir(tmp_path)
    out = Path("runs/demo")
    code, printed, err = run(capsys, "demo", "--threads", "2", "--seed", "3")
    assert (code, err) == (0, "")
    head = "\nthe learned policy on a second checkpoint, without a search:\n"
    assert printed == f"{head}scores\nshown {out}\n"
    assert seen["config"] == load_config("digits", ["seed=3", "threads=2"])
    assert (seen["run"], seen["resume"], seen["source"]) == (out, False, out)
    assert seen["other"] == seen["config"].override(["model.seed=1"])
    assert (seen["budget"], seen["out"]) == (0.5, out / "second")
    out.mkdir(parents=True)
    run(capsys, "demo")
    assert seen["run"] == Path("runs/demo-2")
    run(capsys, "demo", "--resume")
    assert (seen["run"], seen["resume"]) == (out, True)


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (BudgetError("budget: too\nsmall"), 2, "rlprune: error: budget: too small\n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "rlprune: error: No space left on device\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            2,
            "rlprune: error: /x: Permission denied\n",
        ),
        (OSError(errno.EIO, "Input/output error"), 1, "rlprune: error: Input/output error\n"),
        (
            ValueError("strange\nthing"),
            1,
            "rlprune: error: ValueError: strange thing (--debug shows where)\n",
        ),
        (MemoryError(), 1, "rlprune: error: out of memory\n"),
        (
            KeyboardInterrupt(),
            130,
            "rlprune: interrupted; state saved in OUT, continue with --resume --out OUT\n",
        ),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def train(*_: Any, **__: Any) -> None:
        raise error

    replace_work(monkeypatch, train=train)
    out = str(tmp_path / "run")
    assert run(capsys, "train", "digits", "--out", out) == (code, "", expected.replace("OUT", out))
    _, _, err = run(capsys, "--debug", "train", "digits", "--out", out)
    assert "Traceback" in err


def test_our_warnings_are_one_line_and_those_of_libraries_are_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import warnings

    class OwnWarning(UserWarning):
        __module__ = "rlprune.somewhere"

    def inspect(config: Any) -> Findings:
        warnings.warn("ours,\nin two lines", OwnWarning, stacklevel=1)
        warnings.warn("theirs", FutureWarning, stacklevel=1)
        return Findings("groups")

    replace_work(monkeypatch, "inspect", inspect=inspect)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = run(capsys, "inspect", "digits")
    assert result == (0, "groups\n", "rlprune: warning: ours, in two lines\n")


def call(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlprune", *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent.parent.parent,
        **options,
    )


def test_as_a_process() -> None:
    done = call("list", "configs")
    assert (done.returncode, done.stderr) == (0, "")
    assert "digits" in done.stdout
    wrong = call("train", "digts")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_a_reader_that_goes_away_is_no_error() -> None:
    script = f"{sys.executable} -m rlprune list settings | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_settings_do_not_need_torch() -> None:
    """Wrong settings answer at once: the heavy libraries load when there is work to do."""
    script = "import sys, rlprune.cli.main; sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        timeout=120,
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
