"""What every export format is given and gives back."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ...errors import ConfigError
from ...utils.files import keep_foreign
from ...utils.pytrees import Inputs
from ...utils.registry import Registry
from ...workloads.adapter import ModelAdapter, adapter_of_base, read_pruned


@dataclass(frozen=True)
class Written:
    """What an export wrote: a file or folder, and in words what it takes to load it, where that is more than usual.

    ``notes``: sizes, checks and whatever else the user should know, a line each.
    """

    path: Path
    needs: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """An export format: one line on it, and the function that writes it and checks what it wrote.

    ``dtypes``: the number formats that it can be asked for; none where it keeps the folder's.
    """

    name: str
    summary: str
    write: Callable[[Export], Written]
    dtypes: tuple[str, ...] = ()


FORMATS: Registry[Format] = Registry("export format", source="write")


def export_format(
    summary: str, *, name: str | None = None, dtypes: Sequence[str] = ()
) -> Callable[[Callable[[Export], Written]], Callable[[Export], Written]]:
    """Register an export format under the name of the function below, or under ``name``.

    The function takes an :class:`Export`, writes the model, checks it, and says where it is. It raises ArtifactError
    where the folder holds what it cannot write. ``dtypes`` are the number formats that ``--dtype`` may ask it for.

    Raises (when applied):
        ConfigError: the name is taken, or the summary is missing.
    """
    kinds = tuple(dtypes)
    return FORMATS.decorator(
        "export_format", summary, lambda own, write: Format(own, summary, write, kinds), name
    )


@dataclass(frozen=True)
class Export:
    """One export that was asked for; see `export` for the fields."""

    directory: Path
    to: str
    out: str | Path | None = None
    example_inputs: Inputs = None
    base: nn.Module | None = None
    force: bool = False
    dtype: str | None = None

    def adapter(self) -> ModelAdapter:
        """The adapter of the saved model."""
        return adapter_of_base(read_pruned(self.directory)["base"])

    def file(self, suffix: str, is_ours: Callable[[Path], bool] = lambda path: False) -> Path:
        """The file to write: ``out``, or ``model`` with the suffix in the folder.

        ArtifactError where something lies there that neither ``is_ours`` recognises nor `force` gives up.
        """
        target = Path(self.out) if self.out is not None else self.directory / f"model{suffix}"
        keep_foreign(target, is_ours, self.force)
        return target


def need_packages(packages: Sequence[str], to: str, extra: str = "export") -> None:
    """Raise ConfigError where a package that a format needs is not installed."""
    missing = []
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise ConfigError(
            f"--to {to}: needs {', '.join(missing)}; install it with: pip install 'rlprune[{extra}]'"
        )
