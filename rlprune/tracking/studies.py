"""The evaluation log of a run as Optuna studies, so that its dashboard opens them."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts.documents import read_plan
from ..errors import ArtifactError, ConfigError, one_line
from ..evaluation.ledger import EvaluationLog, LogRow, history_of
from ..report.results import read_results

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

_FACTS = ("cost", "loss", "metric", "error", "seconds", "samples")


def to_optuna(folder: str | Path, storage: str, name: str | None = None) -> list[str]:
    """Write what every method of a run has scored into an Optuna storage, a study a method; returns the studies' names.

    A trial's parameters are the widths, its value the score (maximised), its attributes cost, loss, metric and seconds.
    Trials of a search in stages have the widths of the last stage. Seconds of a trial are those of its scoring; when it
    began was not recorded, so trials stand one behind the other, ended when the log was last written.

    Args:
        folder: of a run, finished or not.
        storage: a URL of Optuna's storages, such as ``sqlite:///studies.db``.
        name: the studies are called ``NAME/method``; the folder's name when not given.

    Raises:
        ArtifactError: the folder holds no log of evaluations.
        ConfigError: Optuna is not installed, the storage cannot be opened, or it holds a study of that name.
    """
    path = Path(folder)
    log_file = path / "ledger.jsonl"
    if not log_file.is_file():
        raise ArtifactError(f"{path}: holds no ledger.jsonl; give the folder of a run")
    rows = EvaluationLog(log_file).rows
    names = _group_names(path, len(history_of(rows[0])[-1]) if rows else 0)
    opened = _open(storage)
    methods = list(dict.fromkeys((row["method"], row["task"]) for row in rows))
    ended = datetime.datetime.fromtimestamp(log_file.stat().st_mtime)
    written = []
    for method, task in methods:
        own = [row for row in rows if (row["method"], row["task"]) == (method, task)]
        study = "/".join(part for part in (name or path.name, method, task) if part)
        _write(opened, study, own, names, ended)
        written.append(study)
    return written


def _open(storage: str) -> BaseStorage:
    try:
        import optuna
    except ImportError:
        raise ConfigError("rlprune optuna: needs `pip install 'rlprune[benchmark]'`") from None
    try:
        return optuna.storages.get_storage(storage)
    except (
        Exception
    ) as error:  # whatever SQLAlchemy raises for a wrong URL, a missing driver or a closed door
        raise ConfigError(f"--storage: cannot open {storage!r} ({one_line(error)})") from error


def _group_names(folder: Path, count: int) -> list[str]:
    """Names of the groups: those of the result or of the plan; numbers where neither is there yet."""
    if (folder / "results.json").is_file():
        found = [str(group["name"]) for group in read_results(folder).get("groups", ())]
        if len(found) == count:
            return found
    if (folder / "pruned" / "plan.json").is_file():
        found = [str(group["name"]) for group in read_plan(folder / "pruned")["groups"]]
        if len(found) == count:
            return found
    return [f"group {number}" for number in range(count)]


def _write(
    storage: BaseStorage, study_name: str, rows: list[LogRow], names: list[str], ended: datetime.datetime
) -> None:
    """One study; its trials are finished ones."""
    import optuna

    try:
        study = optuna.create_study(storage=storage, study_name=study_name, direction="maximize")
    except optuna.exceptions.DuplicatedStudyError:
        raise ConfigError(
            f"--name: the storage holds a study {study_name!r} already; choose another"
        ) from None
    widest = [max(1, *(int(history_of(row)[-1][g]) for row in rows)) for g in range(len(names))]
    boxes: dict[str, Any] = {
        name: optuna.distributions.IntDistribution(0, top) for name, top in zip(names, widest, strict=True)
    }
    begin = ended - datetime.timedelta(seconds=sum(row["seconds"] for row in rows))
    for number, row in enumerate(rows):
        done = begin + datetime.timedelta(seconds=row["seconds"])
        widths = history_of(row)[-1]
        facts = {name: row[name] for name in _FACTS if name in row}  # type: ignore[literal-required]
        fine = math.isfinite(row["score"])
        study.add_trial(
            optuna.trial.FrozenTrial(
                number=number,
                trial_id=-1,
                state=optuna.trial.TrialState.COMPLETE if fine else optuna.trial.TrialState.FAIL,
                value=row["score"] if fine else None,
                datetime_start=begin,
                datetime_complete=done,
                params={name: int(width) for name, width in zip(names, widths, strict=True)},
                distributions=boxes,
                user_attrs=facts,
                system_attrs={},
                intermediate_values={},
            )
        )
        begin = done
