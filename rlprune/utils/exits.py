"""Code of the user's that ends the program: a model, a loss, a metric, a plugin that calls ``sys.exit``."""

from __future__ import annotations

import contextlib
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError


@contextlib.contextmanager
def own_exits_named() -> Iterator[None]:
    """Turn SystemExit, and what else is neither an Exception nor Ctrl-C, into a DataError that names who raised it.

    A command that ended with the exit code of a model's forward pass would tell nobody why.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        how = f"sys.exit({error.code!r})" if isinstance(error, SystemExit) else type(error).__name__
        raise DataError(
            f"{_place(error)}: ends the program ({how}); it has to raise an error instead"
        ) from error


def is_exit(error: BaseException) -> bool:
    """Whether this is what `own_exits_named` names."""
    return not isinstance(error, (Exception, KeyboardInterrupt))


def _place(error: BaseException) -> str:
    """The last line of the user's own code, of no library's, that led to an error."""
    frames = traceback.extract_tb(error.__traceback__)
    package = str(Path(__file__).parent.parent)
    libraries = (package, *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), "<")
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    frame = (own or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}, in {frame.name}"
