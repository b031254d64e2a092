"""Workers of a crew: what they share, what they raise, what happens when they die, and which GPU each gets."""

from __future__ import annotations

import operator
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from rlprune.config.config import Config, load_config
from rlprune.errors import ConfigError, RunError
from rlprune.execution import (
    Crew,
    SerialExecutor,
    Shared,
    base,
    crew,
    make,
    make_executor,
    with_threads,
    worker,
)

SECONDS = 120.0


def settings(*more: str) -> Config:
    return load_config("digits", ["execution.engine=processes", "execution.workers=2", "threads=1", *more])


@pytest.fixture(scope="module")
def processes() -> Iterator[Crew]:
    executor = make_executor(settings())
    assert isinstance(executor, Crew)
    yield executor
    executor.close()


def slow_pid(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def die_once(mark: Path) -> str:
    """Killed at the first try, as by the kernel when memory is short."""
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


_HELD: list[bytes] = []


def hold(value: dict[str, int]) -> int:
    """Memory that grows, as that of a worker does that is given a model."""
    _HELD.append(b"x" * 400_000_000)
    time.sleep(1.2)  # loky looks once a second
    return os.getpid() + 0 * value["a"]


def forget_all(value: dict[str, int]) -> int:
    """What a process knows that has just been put in the place of another one."""
    worker._KEPT.clear()
    return os.getpid()


def pid_of(value: dict[str, int]) -> int:
    return os.getpid() + 0 * value["a"]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    sys.exit(3)


class Twisted(Exception):
    """Its arguments are not those of its text, so that it can be pickled and not read."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__("twisted")


def twist() -> None:
    raise Twisted(1, 2)


def test_work_is_done_elsewhere_by_as_many_as_asked_for(processes: Crew) -> None:
    pids = {work.result(SECONDS) for work in [processes.submit(slow_pid, 1.0) for _ in range(6)]}
    assert len(pids) == 2 and os.getpid() not in pids
    assert processes.submit(os.environ.get, "OMP_NUM_THREADS").result(SECONDS) == "1"


def test_a_shared_value_goes_to_each_worker_once_and_can_be_dropped(processes: Crew) -> None:
    shared, other = Shared([1, 2, 3]), Shared({"a": 1})
    assert [processes.submit(operator.getitem, shared, i).result(SECONDS) for i in range(3)] == [1, 2, 3]
    kept = [processes.submit(sorted, shared).result(SECONDS) for _ in range(2)]
    assert kept == [[1, 2, 3]] * 2
    processes.drop(shared)
    assert processes.submit(operator.getitem, other, "a").result(SECONDS) == 1
    assert processes.submit(operator.getitem, shared, 0).result(SECONDS) == 1, (
        "asked for again, it is sent again"
    )


@pytest.mark.parametrize(
    ("work", "error", "text"),
    [((operator.getitem, {}, "b"), KeyError, "b"), ((leave,), RunError, "SystemExit"),
     ((twist,), RuntimeError, "twisted")],
)  # fmt: skip
def test_what_work_raises_is_raised_here(
    processes: Crew, work: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        processes.submit(*work).result(SECONDS)
    assert processes.submit(operator.add, 1, 1).result(SECONDS) == 2


def test_work_of_a_killed_worker_is_done_again(processes: Crew, tmp_path: Path) -> None:
    other = processes.submit(slow_pid, 2.0)
    assert processes.submit(die_once, tmp_path / "mark").result(SECONDS) == "done"
    assert other.result(SECONDS) > 0


def test_work_that_kills_every_worker_is_given_up(processes: Crew) -> None:
    with pytest.raises(
        RunError, match=r"3 workers were lost over the same work: its process was ended by SIGKILL"
    ):
        processes.submit(die).result(SECONDS)
    assert processes.submit(operator.add, 1, 1).result(SECONDS) == 2


def test_what_cannot_be_sent_is_said_at_once(processes: Crew) -> None:
    with pytest.raises(TypeError, match="cannot pickle"):
        processes.submit(operator.length_hint, Shared(threading.Lock()))


def test_closing_ends_what_runs(tmp_path: Path) -> None:
    executor = make_executor(settings(), logs=tmp_path)
    running = [executor.submit(slow_pid, 300.0) for _ in range(3)]
    assert isinstance(executor, Crew)
    executor.submit(operator.add, 1, 1).cancel()
    deadline = time.monotonic() + SECONDS
    while not running[0].running() and time.monotonic() < deadline:
        time.sleep(0.1)
    started = time.monotonic()
    executor.close()
    assert time.monotonic() - started < 60
    assert all(work.done() for work in running)
    assert not list(tmp_path.iterdir()), "empty logs go"


class Actor:
    """A worker of a play: what it is told to do is written down."""

    def __init__(self, play: Play, index: int) -> None:
        self.play, self.index = play, index

    def begin(self, message: bytes) -> Future[bytes]:
        return self.play.answer(self, "begin", self.play.start)

    def work(self, message: bytes, payloads: Sequence[object]) -> Future[bytes]:
        self.play.sent.append(len(payloads))
        return self.play.answer(self, "work", lambda: worker.work(message, *payloads))  # type: ignore[arg-type]

    def end(self) -> None:
        self.play.ended.append(self.index)

    def ending(self, error: BaseException) -> str:
        return f"it said {error}"


class Play:
    """An engine whose workers die when the script says so: at the n-th begin or work."""

    name, local = "play", False

    def __init__(self, *deaths: tuple[str, int]) -> None:
        self.deaths, self.counts = set(deaths), {"begin": 0, "work": 0}
        self.sent: list[int] = []
        self.ended: list[int] = []

    def start(self, index: int | None = None) -> Any:
        return worker._packed(worker.Reply()) if index is None else Actor(self, index)

    def payload(self, packed: bytes) -> object:
        return packed

    def close(self) -> None:
        """Nothing is there."""

    def answer(self, actor: Actor, what: str, reply: Any) -> Future[bytes]:
        future: Future[bytes] = Future()
        self.counts[what] += 1
        if (what, self.counts[what]) in self.deaths:
            future.set_exception(OSError(f"no {what}"))
        else:
            future.set_result(reply())
        return future


def test_a_value_is_sent_again_to_the_worker_that_takes_a_lost_ones_place() -> None:
    play = Play(("work", 2))
    executor, shared = Crew(play, 1), Shared([5])
    assert [executor.submit(operator.getitem, shared, 0).result(SECONDS) for _ in range(3)] == [5, 5, 5]
    executor.close()
    assert play.sent == [1, 0, 1, 0], "the second try went to a new worker"


def test_workers_that_cannot_begin_are_not_tried_for_ever() -> None:
    executor = Crew(Play(*(("begin", i) for i in range(1, 20))), 3)
    work = [executor.submit(operator.add, 1, 1) for _ in range(4)]
    for each in work:
        with pytest.raises(base.NoWorkers, match="no worker could be started: it said no begin"):
            each.result(SECONDS)
    executor.close()


def test_one_that_is_lost_before_it_begins_is_replaced() -> None:
    executor = Crew(Play(("begin", 1), ("begin", 2)), 1)
    assert executor.submit(operator.add, 1, 1).result(SECONDS) == 2
    executor.close()


def test_those_that_cannot_begin_leave_the_work_to_the_others() -> None:
    executor = Crew(Play(*(("begin", i) for i in (1, 2, 3))), 2)
    assert [w.result(SECONDS) for w in [executor.submit(operator.add, i, 1) for i in range(5)]] == [
        1,
        2,
        3,
        4,
        5,
    ]
    executor.close()


def test_a_cluster_without_room_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(Play):
        def answer(self, actor: Actor, what: str, reply: Any) -> Future[bytes]:
            return Future()

    monkeypatch.setattr(crew, "START_SECONDS", 0.1)
    executor = Crew(Full(), 2)
    with pytest.raises(base.NoWorkers, match=r"not begun after 0 s; is there room for 2\?"):
        executor.submit(operator.add, 1, 1).result(SECONDS)
    executor.close()


def test_serial_work_is_done_here_and_at_once() -> None:
    executor = SerialExecutor()
    shared = Shared([1, 2])
    assert executor.submit(operator.getitem, shared, 1).result() == 2
    with pytest.raises(ZeroDivisionError):
        executor.submit(operator.truediv, 1, 0).result()
    assert executor.submit(slow_pid, 0.0).result() == os.getpid()


@pytest.mark.parametrize(
    ("gpus", "visible", "expected"),
    [
        (0, None, [None] * 4),
        (3, None, ["0", "1", "2", "0"]),
        (2, "5,7", ["5", "7", "5", "7"]),
        (0, "5", [None] * 4),
    ],
)
def test_gpus_are_given_in_turn(gpus: int, visible: str | None, expected: list[str | None]) -> None:
    found = [worker.environment(i, 1, gpus, visible).get("CUDA_VISIBLE_DEVICES") for i in range(4)]
    assert found == expected


@pytest.mark.parametrize(
    ("device", "count"), [("auto", 4), ("cuda", 4), ("cuda:1", 0), ("cpu", 0), ("mps", 0)]
)
def test_a_gpu_that_the_settings_name_is_kept(
    device: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(make.torch.cuda, "device_count", lambda: 4)
    assert make.gpus_in_turn(device) == count


def test_cores_are_shared_out_where_no_threads_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "cores", lambda: 8)
    config = load_config("tiny_llama", ["execution.engine=processes", "execution.workers=3", "threads=null"])
    assert with_threads(config).threads == 2
    assert with_threads(config.override(["execution.workers=null"])).threads == 1
    assert with_threads(config.override(["threads=5"])).threads == 5
    assert with_threads(config.override(["execution.engine=serial"])).threads is None


def test_no_such_cluster_is_one_line() -> None:
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match=r"execution.address: no Ray cluster at '127.0.0.1:1'") as error:
        make_executor(settings("execution.engine=ray", "execution.address=127.0.0.1:1"))
    assert "\n" not in str(error.value)


def test_a_worker_whose_memory_grows_stays() -> None:
    with_one = make_executor(settings("execution.workers=1"))
    assert isinstance(with_one, Crew)
    try:
        shared = Shared({"a": 1})
        pids = [with_one.submit(hold, shared).result(SECONDS) for _ in range(4)]
        assert len(set(pids)) == 1
    finally:
        with_one.close()


def test_a_worker_that_knows_nothing_counts_as_lost_and_is_told_anew() -> None:
    with_one = make_executor(settings("execution.workers=1"))
    assert isinstance(with_one, Crew)
    try:
        shared = Shared({"a": 1})
        first = with_one.submit(forget_all, shared).result(SECONDS)
        assert with_one.submit(pid_of, shared).result(SECONDS) != first
    finally:
        with_one.close()
