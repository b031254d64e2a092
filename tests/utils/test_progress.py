"""What a person sees while a long command runs."""

from __future__ import annotations

import pytest

from rlprune.utils.progress import Console


def test_a_bar_that_appears_late_takes_its_pace_from_what_it_saw(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(shown="bar")
    console.status("cells", 4, 11, "gp 84/300")
    assert console._bar is not None and (console._bar.initial, console._bar.n) == (4, 4)
    console.status("cells", 11, 11, "")
    assert console._bar is None
    printed = capsys.readouterr().err
    assert " 4/11 " in printed and " 0/11 " not in printed and "11/11" in printed
