"""The adapter of causal language models of transformers."""

from __future__ import annotations

import importlib.util
import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artifacts.documents import PLAN_FILE, PlanDocument
from ..artifacts.pruned_model import check_base
from ..artifacts.safetensors import check_roots
from ..config.config import Config
from ..config.training import FinishConfig, RecoveryConfig
from ..errors import ArtifactError, ConfigError
from ..importance.calibration_cache import CalibrationCache
from ..importance.unit_scores import Scores
from ..pruning.plan import Plan
from ..pruning.space import PruningSpace, fingerprint
from ..recovery.reconstruct import Reconstruction
from ..tracing.trace import ExampleInputs, TraceOptions, trace_channels
from ..utils.findings import Findings
from ..utils.memory import bound_kernel_caches, return_freed_memory
from ..workloads.adapter import (
    DefaultImportance,
    LatencySettings,
    ModelAdapter,
    RecoveryLadder,
    Repair,
    Target,
    TokenizerSource,
    Tuned,
    TuneJob,
)
from ..workloads.base import Quality, Workload, evaluate_outputs
from ..workloads.judge import Judge
from ..workloads.score_kinds import registered, task_judge
from ..workloads.scoring_format import ScoringFormat
from . import describe
from .calibration.cache import LanguageCalibration, default_importance, language_calibration
from .calibration.compensation import BiasCompensation
from .calibration.grams import group_consumers, unit_consumers
from .calibration.importance import OWN_IMPORTANCES
from .calibration.statistics import collect as collect_statistics
from .comparison import compare, read_tasks
from .dtype import scoring_dtype
from .files.folder import save_language_model
from .files.onnx import export_onnx
from .files.pretrained import SOURCE
from .files.reading import load_folder
from .files.streaming import space_of
from .files.without_plan import document_without_plan, is_folder_of_ours, plan_against_base
from .footprints import footprint
from .judge import (
    DenseAnswers,
    LanguageJudge,
    RegisteredLanguageJudge,
    StoredSequences,
    check_kind,
    token_quality,
)
from .logits import ChunkedLogs
from .runtime_lines import describe_runtimes
from .space import is_language_model, language_space
from .stored import Stored, saved_dtype, size_lines
from .structure import settle
from .task import NextToken
from .tuning.finetune import tune
from .tuning.loss import train_language

_LESSON_BATCH = 8


class LanguageAdapter(ModelAdapter):
    """Feed-forward neurons and key-value heads by family; next tokens as the default task; AdamW."""

    wing = "language"
    card_facts = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    models = "language models"
    task = NextToken.name
    sample_noun = "sequences"
    score_unit = "tokens"
    # One sequence at a time, the whole of it at once: a batch of 64 takes a CPU minutes. Twenty copies of a model's
    # embeddings would not fit next to each other.
    latency = LatencySettings((1,), warmup=1, every_seed=False, share=True)
    ladder = RecoveryLadder(
        closed=(("none",), ("bias",), ("reconstruct",), ("bias", "reconstruct")),
        trained=("reconstruct", "finetune"),
        steps=0,
        batch=_LESSON_BATCH,
    )
    importances = OWN_IMPORTANCES
    recovery_steps = ("none", "bias", "reconstruct", "bn", "finetune")
    unread = {
        "finish.epochs": ("{model} is a language model", "give finish.steps"),
        "rounds.epochs": ("{model} is a language model", "give rounds.steps"),
        **dict.fromkeys(
            ("finish.start", "recovery.statistics"),
            ("{model} is a language model, which has no batch-norm statistics", "leave it out"),
        ),
        **dict.fromkeys(
            ("finish.momentum", "model.train.momentum"),
            ("{model} is a language model, trained by AdamW", "only SGD has a momentum"),
        ),
        **dict.fromkeys(
            (
                *("model.train.label_smoothing", "data.image_size", "data.augment", "data.resize"),
                *(
                    "data.skip_corrupt",
                    "data.mean",
                    "data.std",
                    "data.transform",
                    "data.train_transform",
                    "prune.inexact",
                    "score.unlabelled",
                ),
            ),
            ("{model} is a language model", "only image models have a use for it"),
        ),
    }
    calibration = LanguageCalibration
    keeps_models = False
    costly_passes = True
    unlabelled_builds = False
    common_plans = False
    one_file = False
    equal_widths = True

    def accepts(self, model: object) -> bool:
        return isinstance(model, nn.Module) and is_language_model(model)

    def owns(self, base: Mapping[str, object]) -> bool:
        return base.get("source") == SOURCE

    def find_groups(
        self, model: nn.Module, example_inputs: ExampleInputs, options: TraceOptions
    ) -> PruningSpace:
        if not is_language_model(model):  # a model of the user's own that reads token ids
            if options.runtime != "any":
                raise ConfigError(
                    f"prune.runtime: {options.runtime!r} reads models of transformers, {type(model).__name__} is none; "
                    "allowed here: any"
                )
            return trace_channels(model, example_inputs, options)
        settle(model)
        return language_space(model, example_inputs, fingerprint(model), options)

    def space_of_plan(
        self, workload: Workload, document: PlanDocument, options: TraceOptions
    ) -> PruningSpace:
        if fingerprint(workload.model) != document["fingerprint"]:
            raise ArtifactError("plan: made for another architecture (its fingerprint differs)")
        return space_of(workload.model, document)

    def plan_of(self, workload: Workload, document: PlanDocument, options: TraceOptions) -> Plan:
        if fingerprint(workload.model) != document["fingerprint"]:
            raise ArtifactError("plan: made for another architecture (its fingerprint differs)")
        return plan_against_base(workload.model, document, options)

    def default_importance(self, calibration: CalibrationCache) -> DefaultImportance:
        """`obs_fisher` for attention heads and neurons, else `taylor`."""
        return default_importance(calibration.space)

    def closed_form(
        self, calibration: CalibrationCache, settings: RecoveryConfig, importance: Scores | None
    ) -> Repair | None:
        """Closed forms from one factor a layer, for all widths; with `bias` and `reconstruct`, an intercept."""
        own = language_calibration(calibration, "recovery.steps")
        model, space = own.model, own.space
        bias = "bias" in settings.steps
        if bias:
            group_consumers(space, "recovery.steps: 'bias'")
        if "reconstruct" in settings.steps:
            if not unit_consumers(space):
                batches = own.batches(settings.samples)
                return Reconstruction(model, space, batches, settings.ridge, importance)
            return own.reconstruction(settings, importance)
        own.forget()
        if not bias:
            return None
        inputs = collect_statistics(model, space, own.batches(settings.samples)).inputs
        means = {name: torch.from_numpy(moments.mean) for name, moments in inputs.items()}
        return BiasCompensation(model, space, means)

    def gradient_steps(
        self, workload: Workload, calibration: CalibrationCache, settings: RecoveryConfig
    ) -> Callable[[nn.Module], None]:
        return _Lesson(workload, calibration.space, settings)

    def scoring_formats(self, workload: Workload, space: PruningSpace, wanted: str) -> list[ScoringFormat]:
        return [ScoringFormat(weights=scoring_dtype(workload.model, wanted))]

    def keep_memory(self) -> None:
        bound_kernel_caches()  # on another machine nobody has yet

    def release_memory(self) -> None:
        return_freed_memory()

    def judge(self, workload: Workload, kind: str, limit: int | None, top_k: int) -> Judge:
        if workload.has_own_task:
            return task_judge(workload, kind, limit)
        check_kind(kind)
        sequences, logs = StoredSequences.read(workload, "validation", limit), ChunkedLogs()
        answers = DenseAnswers(workload.model, sequences, logs, top_k) if kind == "kl" else None
        if registered(kind, self.wing):
            return RegisteredLanguageJudge(sequences, len(sequences), logs, kind, workload.model)
        return LanguageJudge(sequences, len(sequences), answers, logs)

    def evaluate(self, workload: Workload, model: nn.Module, split: str, limit: int | None) -> Quality:
        if workload.has_own_task:
            return evaluate_outputs(workload, model, split, limit)
        return token_quality(workload, model, split, limit, ChunkedLogs())

    def fine_tune_length(self, settings: FinishConfig) -> tuple[int, str]:
        return settings.steps, "steps"

    def fine_tune(self, workload: Workload, model: nn.Module, settings: FinishConfig, job: TuneJob) -> Tuned:
        """``finish.steps`` of AdamW by transformers' Trainer (`tune`)."""
        found = tune(
            workload,
            model,
            settings,
            seed=job.seed,
            steps=job.steps,
            out=job.state,
            progress=job.progress,
            phase=job.phase,
            before=job.before,
            whole=job.whole,
        )
        if not found.steps:
            return Tuned(found.model)
        about = f"{found.steps} steps of {settings.method}, {found.tokens:,} tokens, loss {found.loss:.4f}"
        return Tuned(found.model, about)

    def missing_package(self, settings: FinishConfig) -> str | None:
        if settings.method == "lora" and importlib.util.find_spec("peft") is None:
            return "finish.method: 'lora' needs peft; pip install 'rlprune[language]'"
        return None

    def finish_facts(self, settings: FinishConfig) -> dict[str, Any]:
        return {"finish": {"method": settings.method, "steps": settings.steps}}

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
        save_language_model(slim, plan, directory, base, tokenizer, max_shard_size)

    def saved_dtype(self, workload: Workload, model: nn.Module, wanted: str) -> torch.dtype | None:
        return saved_dtype(_stored_of(workload), model, wanted)

    def size_lines(self, workload: Workload, folder: Path) -> list[str]:
        return size_lines(_stored_of(workload), folder)

    def load(self, directory: Path, document: PlanDocument, base: nn.Module | None) -> nn.Module:
        check_base(base, document, directory)
        check_roots(document["tensors"], document, str(directory / PLAN_FILE))
        model: nn.Module = load_folder(directory, document).cpu().eval()
        return model

    def onnx_file(self) -> Callable[[nn.Module, Path], object]:
        return export_onnx

    def recognises(self, directory: Path) -> bool:
        return is_folder_of_ours(directory)

    def document_of(self, directory: Path) -> PlanDocument:
        return document_without_plan(directory)

    def group_lines(self, space: PruningSpace) -> list[str]:
        return describe.group_lines(space)

    def protected_lines(self, protected: Mapping[str, str]) -> list[str]:
        return describe.protected_lines(protected)

    def cost_lines(self, space: PruningSpace, model: nn.Module) -> list[str]:
        return describe.cost_lines(space, model)

    def runtime_lines(
        self, model: nn.Module, example_inputs: ExampleInputs, options: TraceOptions, budget: Target
    ) -> list[str]:
        if not is_language_model(model):
            return []
        return describe_runtimes(model, example_inputs, options, budget)

    def memory_lines(
        self, config: Config, space: PruningSpace, model: nn.Module, device: torch.device
    ) -> list[str]:
        first = next(model.parameters())
        element = None if first.is_meta else first.element_size()
        return footprint(model, space, config, device=device.type, element=element).lines()

    def check_tasks(self, document: PlanDocument, directory: Path, tasks: Sequence[Path]) -> None:
        read_tasks(tasks)

    def loading_code(self, document: PlanDocument, repo: str) -> str:
        kinds = {"model": "AutoModelForCausalLM", "tokenizer": "AutoTokenizer"}
        calls = (
            f'{name} = {kind}.from_pretrained("{repo}", trust_remote_code=True)'
            for name, kind in kinds.items()
        )
        lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", "", *calls]
        return "\n".join(["```python", *lines, "```"])

    def comparison(
        self,
        directory: Path,
        document: PlanDocument,
        workload: Workload | None,
        tasks: Sequence[Path] = (),
        limit: int | None = None,
    ) -> Findings:
        return compare(self.load(directory, document, None), directory, document, workload, tasks, limit)


def _stored_of(workload: Workload) -> Stored | None:
    """How the dense weights are stored; None for a model that the user built."""
    found = getattr(workload, "stored", None)
    return found if isinstance(found, Stored) else None


class _Lesson:
    """The recovery step `finetune`: AdamW with the dense model as the teacher; logits of text are too large to keep.

    Every stage of an incremental pruning has text of its own: the seed is a hash of the widths it cuts.
    """

    def __init__(self, workload: Workload, space: PruningSpace, settings: RecoveryConfig) -> None:
        self._workload, self._settings = workload, settings
        self._seed = zlib.crc32(space.widths.tobytes())
        self._batches: list[tuple[Tensor, ...]] | None = None

    def __call__(self, slim: nn.Module) -> None:
        settings = self._settings
        if self._batches is None:
            generator = torch.Generator().manual_seed(self._seed)
            batches = self._workload.train_batches(generator, _LESSON_BATCH)
            self._batches = list(itertools.islice(batches, settings.finetune_steps))
        train_language(
            slim,
            self._batches,
            steps=settings.finetune_steps,
            lr=settings.finetune_lr,
            teacher=self._workload.model if settings.distill else None,
            seed=self._seed,
        )


ADAPTER = LanguageAdapter()
