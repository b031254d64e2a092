"""The text of other people's errors, in the one line that ours take."""

from __future__ import annotations

import pytest

from rlprune.errors import first_line, one_line


@pytest.mark.parametrize(
    ("text", "first", "whole"),
    [
        ("out of  memory", "out of  memory", "out of memory"),
        ("\n  size mismatch:\n\tweight", "size mismatch:", "size mismatch: weight"),
        ("", "ValueError", "ValueError"),
        (" \n ", "ValueError", "ValueError"),
        ("x" * 300, "x" * 200, "x" * 200),
    ],
)
def test_an_error_in_one_line(text: str, first: str, whole: str) -> None:
    assert first_line(ValueError(text)) == first
    assert one_line(ValueError(text)) == whole


def test_no_limit() -> None:
    assert one_line(ValueError("x" * 300), None) == first_line(ValueError("x" * 300), None) == "x" * 300
