"""The one error family of rlprune, and the near-miss hint that its messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RlpruneError(Exception):
    """Base of every error that rlprune raises on purpose; its text is one line meant for a person."""


class ConfigError(RlpruneError):
    """A setting is unknown, of the wrong type or out of range."""


class GraphError(RlpruneError):
    """A model cannot be traced, or cannot be cut exactly."""


class BudgetError(RlpruneError):
    """A budget or a distribution is malformed, or the budget cannot be met."""


class DataError(RlpruneError):
    """Data is missing, empty, or not what the workload needs."""


class ArtifactError(RlpruneError):
    """A file is truncated, foreign, made by a newer version, or does not fit the model."""


class RunError(RlpruneError):
    """Part of a run has failed for a reason that is not in its input; the command's exit code is 1."""


def near_miss(name: str, allowed: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest allowed name, or "" when none is close."""
    matches = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def first_line(error: BaseException, limit: int | None = 200) -> str:
    """The first line of an error's text, at most ``limit`` characters of it; its type where it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__


def described(error: BaseException, limit: int | None = 200) -> str:
    """The type of an error and the first line of its text."""
    text = first_line(error, limit)
    return text if text == type(error).__name__ else f"{type(error).__name__}: {text}"


def one_line(error: BaseException, limit: int | None = 200) -> str:
    """All of an error's text in one line, at most ``limit`` characters of it; its type where it has no text."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
