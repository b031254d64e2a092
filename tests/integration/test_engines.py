"""Whole runs on every engine leave what `serial` leaves, also where a worker, a node or the driver is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.small import SMALL_RUN
from rlprune.cli import main as cli

SECONDS = 600.0
LONG = 60
"""Evaluations of a search that takes long enough for something to be killed in it."""
WORKERS = ("--engine", "processes", "--workers", "2")


def words(out: Path, agent: str, *more: str, evaluations: int = 24) -> list[str]:
    idle = () if agent == "ppo" else ("search.ppo.", "search.batch")
    settings = [
        text for text in SMALL_RUN if not text.startswith((*idle, "search.evaluations", "finish.epochs"))
    ]
    settings += [
        f"search.agent={agent}",
        f"search.evaluations={evaluations}",
        "search.baselines=[]",
        "threads=1",
    ]
    return ["train", "digits", "--out", str(out), *more, "--set", *settings]


def ledger_of(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def left(out: Path) -> tuple[Any, ...]:
    """What a run leaves that has to be the same: ledger, plan, and the bytes of the weights."""
    from safetensors.torch import load_file

    weights = {
        name: t.numpy().tobytes() for name, t in load_file(out / "pruned" / "model.safetensors").items()
    }
    return ledger_of(out), json.loads((out / "pruned" / "plan.json").read_text()), weights


def run(words: list[str]) -> None:
    assert cli.main(words) == 0


def started(words: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "rlprune", *words],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
    )  # fmt: skip


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if found := condition():
            return found
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("waited for too long")


def rows_of(out: Path) -> int:
    path = out / "ledger.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(
    scope="module", params=["evopress", *(pytest.param(n, marks=pytest.mark.slow) for n in ("random", "ppo"))]
)
def serial(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp(request.param) / "serial"
    run(words(out, request.param))
    return request.param, out


def test_processes_leave_what_one_process_leaves(serial: tuple[str, Path], tmp_path: Path) -> None:
    agent, before = serial
    run(words(tmp_path / "run", agent, *WORKERS))
    assert left(tmp_path / "run") == left(before)
    assert not list((tmp_path / "run" / "state").glob("worker-*")), "empty logs go"


@pytest.mark.slow
def test_ray_on_two_nodes_leaves_what_one_process_leaves(
    serial: tuple[str, Path], tmp_path: Path, cluster: Any
) -> None:
    agent, before = serial
    run(words(tmp_path / "run", agent, "--engine", "ray", "--address", cluster.address))
    assert left(tmp_path / "run") == left(before)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each on this machine."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # Ray's guard ends workers by the memory of the whole machine, whoever takes it.
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        made.add_node(num_cpus=1)
        made.wait_for_nodes()
        yield made
        made.shutdown()


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("long") / "serial"
    run(words(out, "random", evaluations=LONG))
    return out


def actors() -> list[int]:
    """Processes of Ray's that run our actor."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = line.read_bytes()
        except OSError:
            continue
        if text.startswith(b"ray::Actor"):
            found.append(int(line.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks processes up in /proc")
@pytest.mark.parametrize("killed", ["worker", "node", "driver"])
def test_ray_survives_the_death_of_a_worker_a_node_and_the_driver(
    killed: str, long: Path, tmp_path: Path, cluster: Any
) -> None:
    out = tmp_path / "run"
    arguments = words(out, "random", "--engine", "ray", "--address", cluster.address, evaluations=LONG)
    process = started(arguments)
    wait_for(lambda: rows_of(out) > 45 and len(actors()) == 2, process)
    if killed == "worker":
        os.kill(actors()[0], signal.SIGKILL)
    elif killed == "node":
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    else:
        process.kill()
    output, _ = process.communicate(timeout=SECONDS)
    if killed == "node":
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
    # The driver of a node that goes away ends with it; another node takes only the work along that it had in hand.
    own = killed == "node" and process.returncode != 0 and "Raylet is terminated" in output
    if killed == "driver" or own:
        assert process.returncode != 0 and rows_of(out) < rows_of(long), output
        output, _ = (process := started([*arguments, "--resume"])).communicate(timeout=SECONDS)
    assert process.returncode == 0, output
    assert left(out) == left(long)


@pytest.mark.slow
def test_a_killed_driver_takes_its_processes_along_and_another_goes_on(long: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = started(words(out, "random", *WORKERS, evaluations=LONG))
    wait_for(lambda: rows_of(out) > 45, process)
    process.kill()
    process.communicate(timeout=SECONDS)
    assert rows_of(out) < rows_of(long)
    run(words(out, "random", "--resume", evaluations=LONG))  # without workers: it is the same run
    assert left(out) == left(long)
