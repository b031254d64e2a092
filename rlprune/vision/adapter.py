"""The adapter of models of images, and of every model that no other wing claims."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..artifacts.documents import PlanDocument
from ..artifacts.pruned_model import example_of, load_pruned, save_pruned
from ..config.config import Config
from ..config.training import FinishConfig, RecoveryConfig
from ..errors import ArtifactError, ConfigError, GraphError, near_miss
from ..importance.calibration_cache import CalibrationCache
from ..importance.unit_scores import Scores
from ..pruning.fingerprint import uncompiled
from ..pruning.inputs import describe_inputs
from ..pruning.plan import Plan
from ..pruning.space import PruningSpace
from ..pruning.surgery import attributes
from ..recovery.finetune import Item, Schedule, Watch, fit
from ..recovery.processes import team_of
from ..recovery.reconstruct import Reconstruction
from ..tracing.trace import ExampleInputs, TraceOptions, count_macs, trace_channels
from ..utils.findings import Findings
from ..utils.memory import keep_large_blocks
from ..utils.modes import evaluating
from ..utils.timing import DEFAULT_BATCH_SIZES, measure
from ..workloads.adapter import (
    DefaultImportance,
    LatencySettings,
    ModelAdapter,
    RecoveryLadder,
    Repair,
    TokenizerSource,
    Tuned,
    TuneJob,
)
from ..workloads.base import Quality, Workload, evaluate_outputs
from ..workloads.judge import Judge
from ..workloads.score_kinds import task_judge
from ..workloads.scoring_format import ScoringFormat
from .calibration import VisionCalibration
from .detection import Detection
from .identify import identify
from .load_pruned import FILE, standalone
from .rebuild import builder, rebuild, rebuild_given
from .scoring import scoring_formats

SGD_LR = 0.02
"""Peak learning rate of the final fine-tune where the settings leave it open."""
_LESSON_LR = 0.01
_LESSON_BATCH = 64
_LESSON_STEPS = 20


class VisionAdapter(ModelAdapter):
    """Channels found by the dependency graph; classes as the default task; SGD with distillation."""

    wing = "vision"
    models = "models of images"
    task = "classification"
    tasks = ("classification", Detection.name)
    guesses_task = True
    sample_noun = "images"
    score_unit = "images"
    latency = LatencySettings(DEFAULT_BATCH_SIZES, warmup=3, every_seed=True, share=False)
    ladder = RecoveryLadder(
        closed=(("none",), ("bn",), ("reconstruct",), ("reconstruct", "bn")),
        trained=("reconstruct", "bn", "finetune"),
        steps=_LESSON_STEPS,
        batch=_LESSON_BATCH,
    )
    recovery_steps = ("none", "reconstruct", "bn", "finetune")
    calibration = VisionCalibration
    unread = dict.fromkeys(
        (
            *(
                "finish.method",
                "finish.adapters",
                "finish.rank",
                "finish.alpha",
                "finish.dropout",
                "finish.dtype",
            ),
            *("score.top_k", "prune.drop", "prune.hidden", "prune.runtime", "recovery.shrink", "model.dtype"),
            *("recovery.spill", "model.device_map"),
            *("data.files", "data.column", "data.sequence_length", "data.test_length", "data.stride"),
            *("data.format", "data.answers_only", "data.packing", "data.prompt"),
        ),
        ("only for language models", "{model} is none"),
    ) | {
        "finish.steps": ("{model} is fine-tuned by epochs", "give finish.epochs"),
        "rounds.steps": ("{model} is trained by epochs", "give rounds.epochs"),
    }
    # No rule is the best one at all budgets or on all checkpoints, and from uniform the best plans of all of them are
    # within an action's reach.
    base_rule_over_budgets = "uniform"

    def accepts(self, model: object) -> bool:
        return True

    def owns(self, base: Mapping[str, object]) -> bool:
        return True

    def find_groups(
        self, model: nn.Module, example_inputs: ExampleInputs, options: TraceOptions
    ) -> PruningSpace:
        for name in ("drop", "hidden"):
            if getattr(options, name):
                raise GraphError(f"prune.{name}: only for language models; {type(model).__name__} is none")
        if options.runtime != "any":
            raise ConfigError(
                f"prune.runtime: {options.runtime!r} is for language models, {type(model).__name__} is none; "
                "allowed here: any"
            )
        space = trace_channels(model, example_inputs, options)
        return replace(space, inputs=describe_inputs(example_inputs))

    def space_of_plan(
        self, workload: Workload, document: PlanDocument, options: TraceOptions
    ) -> PruningSpace:
        space = self.trace(workload.model, workload.example_inputs, options)
        if document["fingerprint"] == space.fingerprint:  # else Plan.from_dict says that it is another model
            _same_groups(document, space)
        return space

    def default_importance(self, calibration: CalibrationCache) -> DefaultImportance:
        """`obs_fisher` unless `VisionCalibration.obstacle` names a reason against it."""
        if not isinstance(calibration, VisionCalibration):
            return DefaultImportance("taylor", "nothing is expected of cuts of such a model")
        obstacle = calibration.obstacle()
        return DefaultImportance("obs_fisher" if obstacle is None else "taylor", obstacle)

    def closed_form(
        self, calibration: CalibrationCache, settings: RecoveryConfig, importance: Scores | None
    ) -> Repair | None:
        if "bias" in settings.steps:
            raise ConfigError(
                "recovery.steps: 'bias' works on attention and feed-forward groups of language models"
            )
        if "reconstruct" not in settings.steps:
            return None
        grams = calibration.take_grams() if isinstance(calibration, VisionCalibration) else None
        batches = calibration.batches(settings.samples)
        return Reconstruction(
            calibration.model, calibration.space, batches, settings.ridge, importance, grams
        )

    def gradient_steps(
        self, workload: Workload, calibration: CalibrationCache, settings: RecoveryConfig
    ) -> Callable[[nn.Module], None]:
        return _Lesson(workload, calibration.model, settings)

    def keep_memory(self) -> None:
        keep_large_blocks()

    def scoring_formats(self, workload: Workload, space: PruningSpace, wanted: str) -> list[ScoringFormat]:
        return scoring_formats(workload, space, wanted)

    def judge(self, workload: Workload, kind: str, limit: int | None, top_k: int) -> Judge:
        return task_judge(workload, kind, limit)

    def evaluate(self, workload: Workload, model: nn.Module, split: str, limit: int | None) -> Quality:
        return evaluate_outputs(workload, model, split, limit)

    def fine_tune_length(self, settings: FinishConfig) -> tuple[int, str]:
        return settings.epochs, "epochs"

    def fine_tune(self, workload: Workload, model: nn.Module, settings: FinishConfig, job: TuneJob) -> Tuned:
        """``finish.epochs`` of SGD, or ``job.steps`` steps of it."""
        if not (settings.epochs if job.steps is None else job.steps):
            return Tuned(model)
        steps = job.steps
        if steps is None:
            steps = settings.epochs * workload.train_steps(settings.batch_size)
        distill = None
        if settings.distill:
            distill = workload.distill_targets(workload.model, settings.temperature, settings.soft)
        result = fit(
            model,
            lambda generator: workload.train_batches(generator, settings.batch_size),
            workload.loss_of,
            Schedule(
                steps,
                SGD_LR if settings.lr is None else settings.lr,
                settings.momentum,
                settings.weight_decay,
                settings.warmup,
                settings.mixed_precision,
                settings.schedule,
                0 if job.whole is None else job.before,
                job.whole,
            ),
            distill=distill,
            forward=workload.outputs_for_loss,
            generator=torch.Generator().manual_seed(job.seed + job.before),
            watch=Watch(job.progress, job.phase, job.state),
            team=team_of(workload.device),
        )
        left_out = settings.distill and distill is None
        note = (
            f"; without distillation, which task {workload.task_type.name!r} has none of" if left_out else ""
        )
        return Tuned(model, f"{result.steps} steps of SGD, loss {result.loss:.4f}{note}")

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
        if tokenizer is not None:
            raise ArtifactError(
                f"save: a tokenizer was given, but {type(slim).__name__} is no language model"
            )
        known = {"source": "given"} if base is None else dict(base)
        if known["source"] == "given":
            space = plan.space
            dense, changed = space.dense_cost("params"), attributes(space, plan)
            known = identify(uncompiled(slim), space.fingerprint, dense, changed) or known
        save_pruned(slim, plan, directory, known, {FILE: standalone(known)})

    def load(self, directory: Path, document: PlanDocument, base: nn.Module | None) -> nn.Module:
        return load_pruned(directory, document, base, rebuild)

    def rebuilds(self, document: PlanDocument) -> bool:
        return builder(document["base"]) is not rebuild_given

    def memory_lines(
        self, config: Config, space: PruningSpace, model: nn.Module, device: torch.device
    ) -> list[str]:
        """That there is no formula, and why: activations, not weights, are most of what such a model takes."""
        return [
            "memory: not predicted for such a model: most of it is what layers keep of a batch, which depends on the "
            "graph; a smaller data.batch_size takes less"
        ]

    def group_lines(self, space: PruningSpace) -> list[str]:
        units = {metric: space.unit_costs(space.widths, metric) for metric in space.costs}
        head = ["group", "kind", "width", "unit", "min", "step"]
        lines = ["{:<34} {:<10} {:>6} {:>5} {:>5} {:>5}".format(*head)]
        lines[0] += "".join(f" {'us/unit' if m == 'latency' else f'{m}/unit':>12}" for m in units)
        for i, g in enumerate(space.groups):
            sizes = f"{g.width:>6} {g.unit:>5} {g.minimum:>5} {g.step:>5}"
            costs = [f"{1e3 * c[i]:,.3f}" if m == "latency" else f"{c[i]:,.0f}" for m, c in units.items()]
            lines.append(f"{g.name:<34} {g.kind:<10} {sizes}" + "".join(f" {text:>12}" for text in costs))
        return lines

    def protected_lines(self, protected: Mapping[str, str]) -> list[str]:
        return [f"protected: {name}: {reason}" for name, reason in protected.items()]

    def cost_lines(self, space: PruningSpace, model: nn.Module) -> list[str]:
        lines = []
        for metric in (m for m in space.costs if m != "latency"):
            low, dense = space.feasible(metric)
            budgets = f"feasible budgets {low / dense:.4f} to 1 ({low:,.0f} to {dense:,.0f})"
            lines.append(f"{metric}: dense {dense:,.0f}; {budgets}")
        return lines

    def check_tasks(self, document: PlanDocument, directory: Path, tasks: Sequence[Path]) -> None:
        if tasks:
            name = document["base"].get("name")
            raise ConfigError(f"--tasks: needs a language model, but {directory} holds {name!r}")

    def comparison(
        self,
        directory: Path,
        document: PlanDocument,
        workload: Workload | None,
        tasks: Sequence[Path] = (),
        limit: int | None = None,
    ) -> Findings:
        if workload is not None:
            dense, example = workload.model, workload.example_inputs
            slim = self.load(directory, document, workload.architecture).to(workload.device)
        else:
            slim = self.load(directory, document, None)
            dense, example = rebuild(document["base"]).eval(), example_of(document)
        models = {"dense": dense, "pruned": slim}
        times = measure(models, example, budget_seconds=10.0)
        lines = [f"{'':<8} {'macs':>16} {'params':>14} {'ms batch 1':>11} {'ms batch 64':>12}  quality"]
        facts: dict[str, dict[str, float]] = {}
        for name, model in models.items():
            quality = "(give CONFIG to measure it)"
            macs, params = count_macs(model, example), sum(p.numel() for p in model.parameters())
            ms = times[name]
            facts[name] = {"macs": macs, "params": params, "ms_batch_1": ms[1], "ms_batch_64": ms[64]}
            if workload is not None:
                with workload.test_opened():
                    q = workload.evaluate(model, "test")
                quality = f"test {workload.metric_name} {q.metric:.4f}, loss {q.loss:.4f} ({q.count} samples)"
                facts[name] |= {
                    f"test_{workload.metric_name}": q.metric,
                    "test_loss": q.loss,
                    "samples": q.count,
                }
            lines.append(f"{name:<8} {macs:>16,.0f} {params:>14,} {ms[1]:>11.3f} {ms[64]:>12.3f}  {quality}")
        return Findings("\n".join(lines), {**facts})


class _Lesson:
    """The recovery step `finetune`: SGD on a few batches, with the dense model's outputs computed once."""

    def __init__(self, workload: Workload, model: nn.Module, settings: RecoveryConfig) -> None:
        self._workload, self._model, self._settings = workload, model, settings
        self._batches: list[Item] | None = None
        self._distill = workload.distill_targets(None) if settings.distill else None
        if "finetune" in settings.steps and settings.distill and self._distill is None:
            raise ConfigError(
                f"recovery.distill: the task {workload.task_type.name!r} has no distillation loss"
            )

    def __call__(self, slim: nn.Module) -> None:
        settings = self._settings
        if self._batches is None:
            self._batches = self._with_outputs(settings.finetune_steps)
        lesson = self._batches
        fit(
            slim,
            lambda generator: lesson,
            self._workload.loss_of,
            Schedule(
                settings.finetune_steps, _LESSON_LR if settings.finetune_lr is None else settings.finetune_lr
            ),
            distill=self._distill,
            forward=self._workload.outputs_for_loss,
            watch=Watch(phase="recovery"),
        )

    def _with_outputs(self, steps: int) -> list[Item]:
        """The first train batches of a fixed shuffle with the dense model's outputs on them."""
        generator = torch.Generator().manual_seed(0)
        batches = itertools.islice(self._workload.train_batches(generator, _LESSON_BATCH), steps)
        outputs = self._workload.outputs_for_loss
        with torch.no_grad(), evaluating(self._model):
            return [(inputs, targets, outputs(self._model, inputs, targets)) for inputs, targets in batches]


def _same_groups(document: PlanDocument, space: PruningSpace) -> None:
    """The settings may protect (prune.ignore) other layers than the plan's did."""
    theirs, ours = [group["name"] for group in document["groups"]], [group.name for group in space.groups]
    for name in theirs:
        if name not in ours:
            raise ArtifactError(
                f"plan: cuts {name!r}, which prune.ignore protects here{near_miss(name, ours)}"
            )
    if theirs != ours:
        raise ArtifactError("plan: its groups come in another order than the model's")


ADAPTER = VisionAdapter()
