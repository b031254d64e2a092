"""What a model is: the one place where general code asks how to trace, measure, repair, save and describe it.

There is one adapter a wing: ``vision`` for models of images and everything that is not claimed by another wing,
``language`` for causal language models of transformers. A workload finds its adapter when it is built
(`adapter_of`); a saved folder says by its ``base`` whose it is (`adapter_of_base`).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ..artifacts.documents import PLAN_FILE, PlanDocument, read_plan
from ..config.config import Config
from ..config.training import FinishConfig, RecoveryConfig
from ..importance.calibration_cache import CalibrationCache
from ..importance.unit_scores import Scores
from ..pruning.budget import BudgetLike
from ..pruning.cost_metrics import with_registered_costs
from ..pruning.plan import Plan
from ..pruning.space import PruningSpace
from ..recovery.finetune import Progress
from ..recovery.steps import Repair as Repair
from ..tracing.trace import ExampleInputs, TraceOptions
from ..utils.findings import Findings
from ..utils.wrapped import refuse_adapters
from .scoring_format import ScoringFormat

if TYPE_CHECKING:
    from .base import Quality, Workload
    from .judge import Judge

WINGS = ("language", "vision")
"""The packages that hold an adapter and a builder, in the order in which they are asked; the last takes the rest."""


class Tokenizer(Protocol):
    """What turns raw input into a model's, as far as saving it asks."""

    def save_pretrained(self, folder: Path, /) -> object:
        """Write its files into a folder."""


TokenizerSource = Tokenizer | str | Path
"""A tokenizer, or a folder that has one."""


@dataclass(frozen=True)
class LatencySettings:
    """How models of a kind are timed against each other.

    ``batch_sizes`` in samples; ``warmup`` passes before the first one that counts; ``every_seed``: whether a
    benchmark times the plans of all seeds, or of the first; ``share``: whether models in memory together share the
    tensors that no plan cuts.
    """

    batch_sizes: tuple[int, ...]
    warmup: int
    every_seed: bool
    share: bool


@dataclass(frozen=True)
class RecoveryLadder:
    """Recoveries that `rlprune fidelity` compares: closed forms, and the best of them with gradient steps.

    ``steps`` is how many gradient steps the last one gets unless told (0 leaves it out), ``batch`` how many samples
    each of them reads.
    """

    closed: tuple[tuple[str, ...], ...]
    trained: tuple[str, ...]
    steps: int
    batch: int


@dataclass(frozen=True)
class Target:
    """What a model may cost: a budget as users give it, and its metric."""

    budget: BudgetLike
    metric: str = "macs"


@dataclass(frozen=True)
class TuneJob:
    """One final fine-tune: what is random, how long, where its state lies, who is told.

    ``steps`` None takes the length of the settings; ``state`` is where a killed one goes on from. One of several
    trainings under one schedule begins after ``before`` of ``whole`` steps.
    """

    seed: int
    steps: int | None = None
    state: Path | None = None
    progress: Progress | None = None
    phase: str = "fine-tune"
    before: int = 0
    whole: int | None = None


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model, and in a line what was done to it."""

    model: nn.Module
    note: str = "no fine-tune"


@dataclass(frozen=True)
class DefaultImportance:
    """What ``prune.importance: auto`` is for a model: the name of a registered importance.

    ``reason`` says in a line why it is not `obs_fisher`; None where it is.
    """

    name: str
    reason: str | None = None

    def __str__(self) -> str:
        return self.name if self.reason is None else f"{self.name}: {self.reason}"


class ModelAdapter(abc.ABC):
    """How a kind of model is traced, measured, repaired, trained, saved and described.

    Adapters hold no state: one object serves all models of its wing.
    """

    wing: str
    """Name of the package; spaces, rules, importances and export formats carry it."""
    models: str
    """What its models are called in messages, in the plural."""
    task: str
    """Its default task (``rlprune list tasks``)."""
    guesses_task: bool = False
    """Whether a loss of the workload's own makes it likely that the outputs mean something else than by default."""
    sample_noun: str
    """What a sample of its default task is called, in the plural."""
    score_unit: str
    """What a score is a mean over, in the plural: the samples, or the tokens of text."""
    latency: LatencySettings
    ladder: RecoveryLadder
    importances: tuple[str, ...] = ()
    """The importances that only its models have; importing the adapter registers them."""
    recovery_steps: tuple[str, ...]
    """The recovery steps that its models can have (``recovery.steps``)."""
    unread: Mapping[str, tuple[str, str]] = {}
    """Settings that nothing of the wing reads: why, and what to do instead ("{model}" stands for its name)."""
    calibration: type[CalibrationCache] = CalibrationCache
    """What is measured of one of its models on a calibration split; a fresh one is empty."""
    keeps_models: bool = True
    """Whether the fine-tuned models of all methods stay in memory until a run ends."""
    costly_passes: bool = False
    """Whether backward passes over the calibration split take too long for a rule that nobody asked for."""
    unlabelled_builds: bool = True
    """Whether builds on unlabelled samples tell of a checkpoint (one row of outputs a sample)."""
    common_plans: bool = True
    """Whether a policy of several checkpoints is taught what their best plans have in common."""
    base_rule_over_budgets: str | None = None
    """The base rule of a policy for many budgets or checkpoints; None: whichever scores best."""
    one_file: bool = True
    """Whether a model is a function of tensors that one file can hold (ONNX, torch.export)."""
    equal_widths: bool = False
    """Whether all blocks can be cut to one width (``rlprune prune --same-widths``)."""

    # -- what it is ---------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def accepts(self, model: object) -> bool:
        """Whether a model is of this kind."""

    @abc.abstractmethod
    def owns(self, base: Mapping[str, object]) -> bool:
        """Whether a saved folder whose plan.json has this ``base`` is of this kind."""

    def trace(self, model: nn.Module, example_inputs: ExampleInputs, options: TraceOptions) -> PruningSpace:
        """The model's pruning space, with all costs; raises GraphError for options that this kind does not have."""
        refuse_adapters(model)
        return with_registered_costs(self.find_groups(model, example_inputs, options), model)

    @abc.abstractmethod
    def find_groups(
        self, model: nn.Module, example_inputs: ExampleInputs, options: TraceOptions
    ) -> PruningSpace:
        """The model's pruning space with the costs that the wing counts; see `trace`."""

    @abc.abstractmethod
    def space_of_plan(
        self, workload: Workload, document: PlanDocument, options: TraceOptions
    ) -> PruningSpace:
        """The space that a saved plan was made in; ArtifactError for a plan of another architecture."""

    def plan_of(self, workload: Workload, document: PlanDocument, options: TraceOptions) -> Plan:
        """The saved plan in the space of the workload's dense model; ArtifactError for one of another architecture.

        Where a second plan may be put behind it (`compose`), its space holds all that the second one may cut.
        """
        return Plan.from_dict(document, self.space_of_plan(workload, document, options))

    # -- what is measured and repaired --------------------------------------------------------------------------

    @abc.abstractmethod
    def default_importance(self, calibration: CalibrationCache) -> DefaultImportance:
        """How the units of a model are ranked where the settings leave it open (``prune.importance: auto``).

        `obs_fisher` where the expected divergence of its cuts can be measured, `taylor` elsewhere. Little is run.
        """

    @abc.abstractmethod
    def closed_form(
        self, calibration: CalibrationCache, settings: RecoveryConfig, importance: Scores | None
    ) -> Repair | None:
        """The recovery steps without gradients that change weights; None where the settings have none."""

    @abc.abstractmethod
    def gradient_steps(
        self, workload: Workload, calibration: CalibrationCache, settings: RecoveryConfig
    ) -> Callable[[nn.Module], None]:
        """The recovery step `finetune`: trains a cut model in place; the same model always gives the same weights."""

    def scoring_formats(
        self, workload: Workload, space: PruningSpace, wanted: str
    ) -> Sequence[ScoringFormat]:
        """Formats that candidates may be scored in by ``score.dtype``, the surest one last.

        Of two, the first is taken where a trial shows that it is faster and ranks plans alike
        (`Evaluator.settle_format`). ConfigError where the model cannot have what is wanted.
        """
        return [ScoringFormat()]

    def keep_memory(self) -> None:  # noqa: B027
        """Before the first candidate, in every process that scores any: settle what its libraries keep for the next."""

    def release_memory(self) -> None:  # noqa: B027  (most models leave nothing that adds up)
        """Give back what candidates of many sizes leave behind."""

    # -- the default task ---------------------------------------------------------------------------------------

    @abc.abstractmethod
    def judge(self, workload: Workload, kind: str, limit: int | None, top_k: int) -> Judge:
        """Scores candidates on the first ``limit`` validation samples by ``kind`` (see ScoreConfig)."""

    @abc.abstractmethod
    def evaluate(self, workload: Workload, model: nn.Module, split: str, limit: int | None) -> Quality:
        """Mean loss and metric of ``model`` on the first ``limit`` samples of a split; DataError where it is empty."""

    @abc.abstractmethod
    def fine_tune_length(self, settings: FinishConfig) -> tuple[int, str]:
        """How long the final fine-tune is and in what: (6, "epochs"); 0 leaves it out."""

    @abc.abstractmethod
    def fine_tune(self, workload: Workload, model: nn.Module, settings: FinishConfig, job: TuneJob) -> Tuned:
        """The final fine-tune, in place where the model fits on one device."""

    def missing_package(self, settings: FinishConfig) -> str | None:
        """Why the final fine-tune cannot run here (a package is not installed), in one line; None where it can."""
        return None

    def finish_facts(self, settings: FinishConfig) -> dict[str, Any]:
        """What a row of results.json says of the final fine-tune."""
        return {}

    # -- files ----------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def save(
        self,
        slim: nn.Module,
        plan: Plan,
        directory: Path,
        *,
        base: Mapping[str, object] | None,
        tokenizer: TokenizerSource | None,
        max_shard_size: str | int,
    ) -> None:
        """Write a pruned model into a folder, which is replaced as a whole or not at all; see `rlprune.save`."""

    @abc.abstractmethod
    def load(self, directory: Path, document: PlanDocument, base: nn.Module | None) -> nn.Module:
        """The pruned model in a folder whose plan.json is ``document``; see `rlprune.load`."""

    def onnx_file(self) -> Callable[[nn.Module, Path], object] | None:
        """What writes an ONNX file of a model that is more than a function of its inputs, and checks it; its result
        says in words what was found. None: the tensors of one call, as for every model of ``one_file``."""
        return None

    def recognises(self, directory: Path) -> bool:
        """Whether a folder that has no plan.json is a pruned model of this kind."""
        return False

    def document_of(self, directory: Path) -> PlanDocument:
        """What plan.json would say of such a folder; ArtifactError where it cannot be found out."""
        return read_plan(directory)

    def saved_dtype(self, workload: Workload, model: nn.Module, wanted: str) -> torch.dtype | None:
        """The number format that a pruned model is saved in by ``finish.dtype``; None: in its own.

        ConfigError where the format cannot hold the weights.
        """
        return None

    def size_lines(self, workload: Workload, folder: Path) -> list[str]:
        """Size and number format of the dense checkpoint and of a saved folder, a line each."""
        return []

    def rebuilds(self, document: PlanDocument) -> bool:
        """Whether `load` needs no dense model to be passed in."""
        return True

    # -- words ------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def group_lines(self, space: PruningSpace) -> list[str]:
        """The groups as a table for `rlprune inspect`."""

    @abc.abstractmethod
    def protected_lines(self, protected: Mapping[str, str]) -> list[str]:
        """What is never cut, and why, a line each."""

    @abc.abstractmethod
    def cost_lines(self, space: PruningSpace, model: nn.Module) -> list[str]:
        """Dense costs and feasible budgets, a line each; latency has a line of its own."""

    def runtime_lines(
        self, model: nn.Module, example_inputs: ExampleInputs, options: TraceOptions, budget: Target
    ) -> list[str]:
        """What each runtime allows (``prune.runtime``), and what that and rounding cost at a budget, a line each."""
        return []

    def memory_lines(
        self, config: Config, space: PruningSpace, model: nn.Module, device: torch.device
    ) -> list[str]:
        """Predicted peaks of memory of preparing and searching, a line each; none where there is no formula."""
        return []

    card_facts: Mapping[str, str] = {"library_name": "pytorch"}
    """Metadata of a model card that follows from the kind of model, as the hub spells it."""

    def loading_code(self, document: PlanDocument, repo: str) -> str:
        """What a model card says of loading the model from a repository of the hub, as Markdown."""
        base = "" if self.rebuilds(document) else ", base=model"
        code = (
            "import rlprune\nfrom huggingface_hub import snapshot_download\n\n"
            f'model = rlprune.load(snapshot_download("{repo}"){base})'
        )
        return f"```python\n{code}\n```\n\n`load_pruned.py` in the repository loads it without rlprune."

    @abc.abstractmethod
    def check_tasks(self, document: PlanDocument, directory: Path, tasks: Sequence[Path]) -> None:
        """Refuse, before minutes of measuring, question files that cannot be asked."""

    @abc.abstractmethod
    def comparison(
        self,
        directory: Path,
        document: PlanDocument,
        workload: Workload | None,
        tasks: Sequence[Path] = (),
        limit: int | None = None,
    ) -> Findings:
        """A saved pruned model compared with its dense base, as a table for `rlprune evaluate`.

        The facts hold ``dense`` and ``pruned``, {figure: value} each.
        """


@cache
def adapter_named(wing: str) -> ModelAdapter:
    """The adapter of a wing, one of `WINGS`."""
    found = import_module(f"...{wing}.adapter", __name__).ADAPTER
    assert isinstance(found, ModelAdapter)
    return found


def adapters() -> list[ModelAdapter]:
    """The adapters of all wings, in the order in which they are asked."""
    return [adapter_named(wing) for wing in WINGS]


def adapter_of(model: object) -> ModelAdapter:
    """The adapter of a model; GraphError for one that PEFT has wrapped."""
    refuse_adapters(model)
    return next(found for found in adapters() if found.accepts(model))


def adapter_of_base(base: Mapping[str, object]) -> ModelAdapter:
    """The adapter of a saved folder, by the ``base`` of its plan.json."""
    return next(found for found in adapters() if found.owns(base))


def holds_pruned_model(directory: Path) -> bool:
    """Whether a folder is that of a pruned model, with its plan.json or without."""
    if (directory / PLAN_FILE).is_file():
        return True
    return directory.is_dir() and any(found.recognises(directory) for found in adapters())


def read_pruned(directory: str | Path) -> PlanDocument:
    """The checked content of plan.json, or what stands for it in a folder that other tools wrote without one.

    ``directory`` may also be the JSON file itself. Raises ArtifactError.
    """
    folder = Path(directory)
    if folder.is_dir() and not (folder / PLAN_FILE).exists():
        for found in adapters():
            if found.recognises(folder):
                return found.document_of(folder)
    return read_plan(folder)
