"""The real command in processes: parallel as serial, killed and continued, and wrong inputs in one line."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.small import SMALL_SEARCH
from rlprune.benchmarks.benchmark import Cell
from rlprune.benchmarks.schedule import Schedule
from rlprune.cli import main as cli

SECONDS = 900.0  # more than any step takes, however busy the machine
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks processes up in /proc")


def words(out: Path, *more: str, methods: str = "uniform,random,ppo") -> list[str]:
    idle = () if "ppo" in methods else ("search.ppo.", "search.batch")
    settings = [*(text for text in SMALL_SEARCH if not text.startswith(idle)), "threads=1"]
    return [
        "benchmark", "digits", "--methods", methods, "--seeds", "1", "--evaluations", "12", "--out", str(out),
        *more, "--set", *settings,
    ]  # fmt: skip


def command(arguments: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    # What pytest can import the command can import as well, wherever the tests are run from.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    # Where the tests run in the background of a shell, Ctrl-C is ignored, and children would inherit that.
    options["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "rlprune", *arguments],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, **options,
    )  # fmt: skip


def done(arguments: Sequence[str]) -> None:
    """The same command in this process, where nothing of it is killed: starting another one takes seconds."""
    assert cli.main(list(arguments)) == 0


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=SECONDS)
    return process.returncode, output


def results_of(out: Path) -> list[dict[str, Any]]:
    rows = json.loads((out / "results.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if "seconds" not in k and k != "latency_ms"} for row in rows]


def ledger_of(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {SECONDS:.0f} s for {what}")


def children(parent: int) -> list[int]:
    """Processes of a parent that have not ended."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue
        facts = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
        started = status.with_name("cmdline").read_bytes()  # loky's tracker of resources is a child as well
        if int(facts["PPid"]) == parent and not facts["State"].startswith("Z") and b"popen_loky" in started:
            found.append(int(status.parent.name))
    return found


def ended(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def searching(out: Path, rows: int = 3) -> int:
    """How many searches have scored so many plans and are not done."""
    return sum(path.read_bytes().count(b"\n") >= rows for path in out.glob("cells/*.state/ledger.jsonl"))


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The benchmark in one process."""
    out = tmp_path_factory.mktemp("serial") / "run"
    done(words(out))
    return out


@pytest.mark.slow
@linux
@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_a_stopped_benchmark_leaves_no_worker_and_goes_on_as_if_never_stopped(
    serial: Path, tmp_path: Path, how: str
) -> None:
    out = tmp_path / "run"
    process = command(words(out, "--jobs", "2"), start_new_session=True)
    wait_for(lambda: searching(out) or process.poll() is not None, "a search")
    assert process.poll() is None, process.communicate()
    workers = children(process.pid)
    assert len(workers) == 2
    if how == "kill":
        process.kill()
    else:  # as Ctrl-C does: the whole group gets it
        os.killpg(process.pid, signal.SIGINT)
    code, output = finish(process)
    assert code == (-signal.SIGKILL if how == "kill" else 130), output
    for worker in workers:
        wait_for(lambda pid=worker: ended(pid), "the workers to end")  # type: ignore[misc]
    assert not (out / "results.json").exists()
    assert searching(out)
    # One process may go on with what two have begun.
    done(words(out, *(["--jobs", "2"] if how == "kill" else [])))
    assert results_of(out) == results_of(serial) and ledger_of(out) == ledger_of(serial)
    assert not list(out.glob("cells/*.state"))


@pytest.mark.slow
@linux
def test_the_cell_of_a_killed_worker_goes_on_in_another(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = words(out, "--jobs", "2", "--evaluations", "100", methods="random,evopress")
    process = command(arguments)
    # Both are at work, and have enough left to do.
    wait_for(lambda: searching(out) == 2 or process.poll() is not None, "two searches")
    assert process.poll() is None, process.communicate()
    os.kill(children(process.pid)[0], signal.SIGKILL)
    code, output = finish(process)
    assert code == 0 and "ended by SIGKILL (out of memory?)); its work is done again" in output, output
    done(words(tmp_path / "serial", "--evaluations", "100", methods="random,evopress"))
    assert results_of(out) == results_of(tmp_path / "serial")
    assert ledger_of(out) == ledger_of(tmp_path / "serial")


def broken() -> Any:
    return functools.partial(int, "what no worker can do")


def test_a_worker_that_cannot_start_is_said_in_one_line(
    tmp_path: Path, small_digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlprune.benchmarks import verb
    from rlprune.errors import RunError
    from rlprune.execution import base

    monkeypatch.setattr(base, "_PREPARATIONS", [broken])
    with pytest.raises(RunError, match=r"no worker could be started: .*what no worker can do") as error:
        verb.benchmark(small_digits, ["uniform"], seeds=1, evaluations=6, out=tmp_path / "run", jobs=2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "lamb"], "did you mean 'lamp'"),
        (["--methods", "owl"], "language models only"),
        (["--methods", "ppo,,lamp"], "--methods"),
        (["--seeds", "0"], "--seeds"),
        (["--checkpoints", "3", "--seeds", "2"], "--checkpoints 3: must be from 1 to the number of seeds, 2"),
        (["--jobs", "0"], "--jobs"),
        (["--jobs", "two"], "--jobs"),
        (["--jobs", "2", "--engine", "ray"], "--jobs 2: is short for processes, and the engine is ray"),
        (["--workers", "2"], "execution.workers: execution.engine is serial, so it is not used"),
        (["--engine", "proceses"], "did you mean 'processes'"),
        (["--engine", "processes", "--address", "auto"], "execution.address: execution.engine is not ray"),
        (["--evaluations", "-1"], "--evaluations"),
        (["--budgets", "0.5", "1.5"], "budget.target: 1.5"),
        (["--budgets", "0.5", "50%"], "0.5 and 50% are the same budget"),
        (["--budgets", "0.00001"], "feasible"),
        (["--budgets"], "--budgets"),
        (["--bugdets", "0.5"], "did you mean '--budgets'"),
    ],
)
def test_wrong_inputs_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "run"
    code = cli.main(["benchmark", "digits", "--out", str(out), *arguments, "--set", *SMALL_SEARCH])
    error = capsys.readouterr().err.strip()
    assert code == 2 and error.startswith("rlprune: error: ") and message in error
    assert "\n" not in error and not out.exists()


def test_several_dense_models_need_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*SMALL_SEARCH, "model.train.epochs=0"]
    out = tmp_path / "run"
    code = cli.main(["benchmark", "digits", "--out", str(out), "--checkpoints", "2", "--set", *settings])
    assert code == 2 and not out.exists()
    assert "--checkpoints 2: only 1, since no dense model is trained here" in capsys.readouterr().err


@pytest.mark.slow
def test_seeds_take_the_dense_models_in_turn(tmp_path: Path) -> None:
    """In two processes; a seed's dense model is that of the same seeds of weights and splits anywhere else."""
    options = ["--checkpoints", "2", "--seeds", "3", "--jobs", "2"]
    done(words(tmp_path / "each", *options, methods="uniform,random"))
    other = words(tmp_path / "other", "--seeds", "2", methods="uniform,random")
    done([*other, "model.seed=1", "data.seed=1"])
    each, other_rows = results_of(tmp_path / "each"), results_of(tmp_path / "other")
    found_random = [(row["seed"], row["checkpoint"]) for row in each if row["method"] == "random"]
    assert found_random == [(0, 0), (1, 1), (2, 0)]

    def found(rows: list[dict[str, Any]], method: str, seed: int) -> dict[str, Any]:
        row = next(row for row in rows if (row["method"], row["seed"]) == (method, seed))
        return {name: value for name, value in row.items() if name != "checkpoint"}

    for method in ("uniform", "random"):
        assert found(each, method, 1) == found(other_rows, method, 1)
    same, another = (found(each, "uniform", seed)["test_loss"] for seed in (2, 1))
    assert found(each, "uniform", 0)["test_loss"] == same != another
    dense = [row["test_loss"] for row in each if row["method"] == "dense"]
    assert len(set(dense)) == 2 and dense[1] == found(other_rows, "dense", 0)["test_loss"]


def test_the_longest_cells_come_first() -> None:
    schedule = Schedule(jobs=2)
    cells = [
        Cell(name, seed, 0.5) for name in ("dense", "uniform", "lamp", "random", "ppo") for seed in (0, 1)
    ]
    assert schedule.take(cells).method == "random" and schedule.time_left(cells) == ""
    schedule.took(Cell("random", 0, 0.5), 10.0)
    assert schedule.take(cells).method == "ppo"
    schedule.took(Cell("ppo", 0, 0.5), 30.0)
    schedule.took(Cell("lamp", 0, 0.5), 2.0)
    left = [cell for cell in cells if cell.seed == 1]
    order = []
    while left:
        order.append(schedule.take(left).method)
        left = [cell for cell in left if cell.method != order[-1]]
    assert order == ["ppo", "random", "dense", "uniform", "lamp"]
    # One of each: 30 + 10 + three times 2 (what is not known counts as its like), by two processes.
    assert schedule.time_left([cell for cell in cells if cell.seed == 1]) == "; about 23 s left"
