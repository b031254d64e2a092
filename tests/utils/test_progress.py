"""What a person sees while a long command runs."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlprune.errors import ConfigError
from rlprune.utils import progress
from rlprune.utils.progress import Callback, Console, ProgressEvent, RunShare, shown_as, span


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Watcher(Callback):
    def __init__(self) -> None:
        self.events: list[ProgressEvent] = []
        self.stages: list[str] = []

    def on_progress(self, event: ProgressEvent) -> None:
        self.events.append(event)

    def on_stage(self, where: RunShare) -> None:
        self.stages.append(where.place)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "_now", made)
    return made


def test_a_bar_that_appears_late_takes_its_pace_from_what_it_saw(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(shown="bar")
    console.status("cells", 4, 11, "gp 84/300")
    assert console._bar is not None and (console._bar.initial, console._bar.n) == (4, 4)
    console.status("cells", 11, 11, "")
    assert console._bar is None
    printed = capsys.readouterr().err
    assert " 4/11 " in printed and " 0/11 " not in printed and "11/11" in printed


def test_a_second_bar_shows_the_whole_run(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(shown="bar")
    console.expect({"rules": 1.0, "ppo": 3.0})
    console.stage("rules")
    console.status("rules", 1, 2)
    assert console._whole is not None and console._whole.n == pytest.approx(0.125)
    clock.now += 10
    console.status("rules", 2, 2)
    assert console._whole is None, "it goes with the phase"
    console.stage("ppo")
    console.status("ppo", 1, 3)
    assert console._whole is not None and console._whole.n == pytest.approx(0.5)
    console.close()
    assert "run [2/2] ppo  50%" in capsys.readouterr().err


class TestStreams:
    def test_a_log_gets_a_line_now_and_then(self, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
        console = Console()
        for done in range(101):
            console.status("search", done, 100, f"best score {done}")
            clock.now += 1.0
        lines = capsys.readouterr().err.splitlines()
        assert lines == [f"search: {n} of 100 ({n}%), best score {n}" for n in (20, 40, 60, 80, 100)]

    def test_what_is_short_is_one_line(self, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
        console = Console()
        for phase in ("rules", "search"):
            for done in range(1, 4):
                console.status(phase, done, 3)
        assert capsys.readouterr().err == "rules: 3 of 3 (100%)\nsearch: 3 of 3 (100%)\n"

    def test_a_terminal_gets_bars(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = Terminal()
        monkeypatch.setattr("sys.stderr", stream)
        Console().status("search", 3, 3)
        assert "100%|" in stream.getvalue()

    @pytest.mark.parametrize("way", ["option", "variable", "argument"])
    def test_nothing_is_shown_where_that_is_asked_for(
        self, way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv(progress.VARIABLE, "none" if way == "variable" else "lines")
        with shown_as("none" if way == "option" else None):
            console = Console(visible=way != "argument")
            console.expect({"search": 1})
            console.stage("search")
            console.status("search", 3, 3)
            console.note("found")
        assert capsys.readouterr() == ("", "")

    def test_the_option_is_stronger_than_the_variable(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv(progress.VARIABLE, "none")
        with shown_as("lines"):
            Console().status("search", 3, 3)
        assert capsys.readouterr().err == "search: 3 of 3 (100%)\n"
        Console().status("search", 3, 3)
        assert capsys.readouterr().err == ""

    def test_ways_that_nobody_knows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(progress.VARIABLE, "line")
        with pytest.raises(
            ConfigError, match="RLPRUNE_PROGRESS: 'line' is not one of .*did you mean 'lines'"
        ):
            Console()


class TestRuns:
    def watched(self, clock: Clock, seconds: dict[str, float], **work: float) -> Watcher:
        """A run whose stages are counted in 10 steps, each stage taking its seconds."""
        watcher = Watcher()
        watcher.expect(work)
        for name in work:
            watcher.stage(name)
            for step in range(1, 11):
                clock.now += seconds[name] / 10
                watcher.status(f"phase of {name}", step, 10)
        return watcher

    def test_stages_shares_and_time_left(self, clock: Clock) -> None:
        found = self.watched(
            clock, {"rules": 10.0, "search": 80.0, "finish": 10.0}, rules=1, search=8, finish=1
        )
        assert found.stages == ["[1/3] rules", "[2/3] search", "[3/3] finish"]
        runs = [event.run for event in found.events]
        assert [run.share for run in runs if run] == pytest.approx(
            [n / 100 for n in range(1, 11)]
            + [0.1 + n / 12.5 for n in range(1, 11)]
            + [0.9 + n / 100 for n in range(1, 11)]
        )
        assert all(run.seconds_left == pytest.approx(100 * (1 - run.share)) for run in runs if run)
        assert str(runs[14]) == "run 50%, about 50 s left"

    def test_a_pace_that_differs_mends_the_time_left(self, clock: Clock) -> None:
        """A search four times slower than the rules promised: its own pace says when it is done."""
        found = self.watched(clock, {"rules": 10.0, "search": 320.0}, rules=1, search=8)
        assert found.events[9].run.seconds_left == pytest.approx(80)
        assert found.events[14].run.seconds_left == pytest.approx(160)
        assert found.events[-1].run.seconds_left == pytest.approx(0)

    def test_parts_of_a_stage_add_up(self, clock: Clock) -> None:
        watcher = Watcher()
        watcher.expect({"finish": 4})
        for number in range(4):
            watcher.stage("finish", number, 4)
            clock.now += 5
            watcher.status(f"fine-tune {number}", 1, 2)
            clock.now += 5
            watcher.status(f"fine-tune {number}", 2, 2)
        shares = [event.run.share for event in watcher.events if event.run]
        assert shares == [n / 8 for n in range(1, 9)] and watcher.stages == ["[1/1] finish"]

    def test_a_resumed_stage_takes_its_pace_from_what_it_saw(self, clock: Clock) -> None:
        watcher = Watcher()
        watcher.expect({"search": 100})
        watcher.stage("search")
        watcher.status("ppo", 50, 100)
        clock.now += 10
        watcher.status("ppo", 60, 100)
        run = watcher.events[-1].run
        assert run is not None and run.share == 0.6 and run.seconds_left == pytest.approx(40)

    def test_without_stages_nothing_is_said_of_a_run(self) -> None:
        watcher = Watcher()
        watcher.stage("rules")
        watcher.status("rules", 1, 2)
        assert watcher.stages == [] and watcher.events[0].run is None

    @given(st.floats(0, 1e6))
    def test_spans_are_short(self, seconds: float) -> None:
        assert len(span(seconds)) <= 12
        assert (span(40), span(200), span(7500)) == ("40 s", "3 min", "2 h 5 min")


def test_a_call_from_python_shows_bars_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """`rlprune.search` in a program was silent for minutes."""
    monkeypatch.delenv(progress.VARIABLE, raising=False)
    assert type(progress.default_callback()) is Callback
    monkeypatch.setattr(progress, "_stderr", Terminal)
    shown = progress.default_callback()
    assert isinstance(shown, Console) and shown.shown == "bar"
    monkeypatch.setenv(progress.VARIABLE, "none")
    quiet = progress.default_callback()
    assert isinstance(quiet, Console) and quiet.shown == "none"
