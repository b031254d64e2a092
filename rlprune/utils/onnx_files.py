"""ONNX files written by rlprune: the mark that identifies them, and what an error of an exporter says in one line."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import first_line, one_line

MARK = "rlprune"
"""The mark in a file written by rlprune."""


def mark_onnx(path: Path, facts: Mapping[str, str] | None = None) -> None:
    """Write into a file's metadata that it is ours, and further facts; weights in a file of their own stay there."""
    import onnx

    file = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(file, {MARK: "rlprune export", **(facts or {})})
    onnx.save(file, path)


def is_our_onnx(path: Path) -> bool:
    """Whether a file has the mark."""
    import onnx

    try:
        return any(entry.key == MARK for entry in onnx.load(path, load_external_data=False).metadata_props)
    except Exception:  # whatever it is, it is not ours
        return False


def why_not_exported(error: Exception) -> str:
    """What an exporter could not do, in one line."""
    cause = error if error.__cause__ is None else error.__cause__
    kind = type(cause).__name__
    if "DataDependent" in kind:
        return f"{kind}: its branches or the sizes of its outputs depend on the numbers that it is given"
    return f"{kind}: {first_line(cause) if len(str(cause).splitlines()) > 3 else one_line(cause)}"


@contextlib.contextmanager
def silent_exporter() -> Iterator[None]:
    """Exporters write whole graphs to standard error before they raise what is said in a line elsewhere."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # the exporter's notes on its own future
            yield
    finally:
        logging.disable(before)
