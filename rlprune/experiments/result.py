"""The result of a search, for further use in Python."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from ..agents.ppo.policy import PortablePolicy, load_policy
from ..api import load
from ..artifacts.documents import read_plan
from ..artifacts.policy import POLICY_FILE
from ..config.config import load_config
from ..errors import ArtifactError, ConfigError
from ..pruning.plan import Plan
from ..report import html as report
from ..report.results import read_results
from ..report.terminal import words
from ..tracing.trace import TraceOptions
from ..workloads.base import Workload

Row = Mapping[str, Any]


class PruningResult:
    """A finished search: its best plan, the pruned model, the policy, and the rows of everything it was compared with.

    It stands on the run's folder (``folder``, as `rlprune train` leaves it).

    Args:
        workload: what was searched, where the folder alone cannot tell how to build it (a model of your own).
        plan: the plan of the agent; read from the folder when not given.
        model: the pruned and fine-tuned model; read from the folder when not given.
    """

    def __init__(
        self,
        folder: Path,
        workload: Workload | None = None,
        plan: Plan | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.folder = folder
        self.workload = workload
        self.temporary: TemporaryDirectory[str] | None = None
        """A folder that is removed with this object."""
        self._plan, self._model = plan, model

    @classmethod
    def read(cls, folder: str | Path, workload: Workload | None = None) -> PruningResult:
        """The result of a finished run's folder; ArtifactError where the run is not finished."""
        found = cls(Path(folder), workload)
        read_results(found.folder)
        return found

    @property
    def plan(self) -> Plan:
        """What is kept of every group; a plan that is read from a folder needs the workload that it was made for."""
        if self._plan is None:
            document = read_plan(self.folder / "pruned")
            if self.workload is None:
                raise ArtifactError(f"{self.folder}: give PruningResult.read the workload to have its plan")
            before = self.workload.cut_from
            options = TraceOptions.of(load_config(self.folder / "config.yaml").prune)
            if before is None:
                space = self.workload.adapter.space_of_plan(self.workload, document, options)
            self._plan = Plan.from_dict(document, space if before is None else before.plan.space)
        return self._plan

    @property
    def model(self) -> nn.Module:
        """The pruned and fine-tuned model, in eval mode."""
        if self._model is None:
            base = None if self.workload is None else self.workload.architecture
            self._model = load(self.folder / "pruned", base=base)
        return self._model

    @property
    def policy(self) -> PortablePolicy | None:
        """The learned policy, for other checkpoints and budgets; None where the agent leaves none."""
        path = self.folder / "policy"
        return load_policy(path) if (path / POLICY_FILE).is_file() else None

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row for the dense model, every rule and every search: cost, score, metric and loss before and after the
        fine-tune, widths, evaluations and seconds (``rows`` of results.json)."""
        rows: list[dict[str, Any]] = [dict(row) for row in read_results(self.folder)["rows"]]
        return rows

    def report(self, path: str | Path) -> Path:
        """Write the report, one HTML file with its plots, and return its path."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(report.build(self.folder), target)
        return target

    def save(self, folder: str | Path) -> Path:
        """Copy everything into a new folder: pruned/, policy/, results.json, report.html, the ledger and the settings.

        ``rlprune.load(folder / "pruned", base=model)`` reads the model again.

        Raises ConfigError: there is something of that name already.
        """
        target = Path(folder)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"save: {target} exists already; choose another folder")
        shutil.copytree(
            self.folder, target, ignore=shutil.ignore_patterns("state", ".lock"), dirs_exist_ok=True
        )
        return target

    def __str__(self) -> str:
        """The table within 100 columns and the headline, as commands print them; ``table`` has every figure."""
        return words(read_results(self.folder), self.folder)
