"""Settings of what a cut model receives: the recovery of candidates, the final fine-tune, and pruning in rounds."""

from __future__ import annotations

from typing import ClassVar

from ..errors import ConfigError
from .names import RECOVERY_STEPS, recovery_order
from .schema import Section, section, setting, show

SCHEDULES = ("cosine", "linear", "step", "wsd")


@section
class RecoveryConfig(Section):
    """What every candidate receives before it is scored."""

    prefix: ClassVar[str] = "recovery."

    steps: tuple[str, ...] = setting(
        ("reconstruct", "bn"), "Steps, always run in this order.", choices=RECOVERY_STEPS
    )
    statistics: str = setting(
        "corrected",
        "Step `bn`: `corrected`, the dense model's statistics changed by what the cut changes on the calibration data, "
        "or `measured`, those of the calibration data alone.",
        choices=("corrected", "measured"),
    )
    ridge: float = setting(1e-3, "Relative ridge penalty of the closed-form reconstruction.", above=0)
    shrink: float = setting(
        0.0,
        "Language models: further penalty on each input of the reconstruction, as a share of its own second moment.",
        low=0,
        high=10,
    )
    spill: str | None = setting(
        None,
        "Language models: folder in which the reconstruction's factors lie on disk, in a file that is gone with the "
        "process; null keeps them in memory.",
    )
    samples: int | None = setting(None, "Calibration samples used; null for all of the split.", low=1)
    finetune_steps: int = setting(0, "Gradient steps of the step `finetune`.", low=0)
    finetune_lr: float | None = setting(
        None,
        "Learning rate of the step `finetune`; null for 0.01 (SGD on images) or 2e-5 (AdamW on a language "
        "model).",
        above=0,
        high=10,
    )
    distill: bool = setting(True, "Whether `finetune` learns from the dense model's cached logits.")

    def __post_init__(self) -> None:
        if len(set(self.steps)) != len(self.steps):
            raise ConfigError(f"recovery.steps: {show(list(self.steps))} names a step twice")
        if "none" in self.steps and len(self.steps) > 1:
            raise ConfigError("recovery.steps: 'none' stands alone")
        if ("finetune" in self.steps) != (self.finetune_steps > 0):
            raise ConfigError(
                "recovery.finetune_steps: the step 'finetune' needs at least 1 gradient step, and only that "
                f"step uses them; got {self.finetune_steps} with recovery.steps {show(list(self.steps))}"
            )
        ordered = tuple(step for step in recovery_order() if step in self.steps)
        object.__setattr__(self, "steps", ordered or ("none",))


@section
class FinishConfig(Section):
    """Choosing the winner and its final fine-tune."""

    prefix: ClassVar[str] = "finish."

    choice: str = setting(
        "score",
        "Which of the finalists wins: the one with the best `score` on the whole validation split, or the one that is "
        "best on validation after all of them were `tuned`, each by the whole final fine-tune.",
        choices=("score", "tuned"),
    )
    candidates: int = setting(5, "Finalists of a search: so many of its best plans.", low=1)
    epochs: int = setting(0, "Epochs of the final fine-tune; 0 leaves it out.", low=0)
    start: str = setting(
        "recovered",
        "Models of images: where the fine-tune starts: `recovered` (all of recovery.steps), `statistics` (the same "
        "without closed forms), or `auto`: both are trained for a few steps, and the validation loss decides.",
        choices=("recovered", "statistics", "auto"),
    )
    method: str = setting(
        "lora",
        "Language models: `lora`, `full`, `group` (SAAP: scaled column groups and low rank) or `spp` (row and "
        "column factors).",
        choices=("lora", "full", "group", "spp"),
    )
    adapters: str = setting(
        "all",
        "Language models: what `lora`, `group` and `spp` adapt: `all` linear layers of attention and feed-forward, or "
        "`query_value`, those of queries and values (the one that holds them where they are fused).",
        choices=("all", "query_value"),
    )
    steps: int = setting(
        0, "Language models: optimizer steps of the final fine-tune; 0 leaves it out.", low=0
    )
    rank: int = setting(8, "Rank of the low-rank adapters.", low=1, high=65_536)
    alpha: float = setting(16.0, "Scale of the low-rank adapters is alpha / rank.", above=0)
    dropout: float = setting(0.05, "Dropout before the low-rank adapters.", low=0, high=0.9)
    lr: float | None = setting(
        None,
        "Peak learning rate; null for 0.02 (SGD on images), 1e-4 (AdamW on adapters) or 2e-5 (AdamW on a whole "
        "language model).",
        above=0,
        high=10,
    )
    schedule: str = setting(
        "cosine",
        "How the learning rate falls after the warm-up: `cosine` and `linear` to zero; `step` to a tenth after 60% and "
        "again after 80% of the steps; `wsd`, it stays and falls to a tenth in the last 10%.",
        choices=SCHEDULES,
    )
    warmup: float = setting(
        0.05, "Share of the steps in which the learning rate rises to its peak.", low=0, high=1
    )
    batch_size: int = setting(128, "Images (or sequences, over all processes) in a batch.", low=1)
    weight_decay: float = setting(5e-4, "L2 penalty on every weight.", low=0, high=1)
    momentum: float = setting(0.9, "Nesterov momentum of SGD.", low=0, high=0.999)
    distill: bool = setting(
        True,
        "Whether the dense model's outputs are learned in addition to the labels, where the task has a way.",
    )
    temperature: float = setting(2.0, "Temperature of the distillation.", above=0, high=100)
    soft: float = setting(
        0.75, "Share of the distillation in the loss; the labels have the rest.", above=0, high=1
    )
    mixed_precision: bool = setting(True, "Whether a GPU computes in mixed precision; a CPU never does.")
    rules: bool = setting(True, "Whether every rule gets the same fine-tune and a row in the table.")
    dtype: str = setting(
        "auto",
        "Language models: number format of the saved weights; `auto` is that of the checkpoint, and bfloat16 where "
        "that is quantised.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )


@section
class RoundsConfig(Section):
    """Pruning, training and pruning again; the training of each round is that of section `finish`."""

    prefix: ClassVar[str] = "rounds."

    count: int = setting(
        1, "Rounds, each with a search of its own on the model as the one before left it.", low=1, high=10_000
    )
    epochs: int = setting(0, "Images: epochs of training after the cut of each round.", low=0)
    steps: int = setting(0, "Language models: optimizer steps after the cut of each round.", low=0)
    schedule: str = setting(
        "each",
        "Whose the learning rate of `finish.schedule` is: `each` round's, or one over the `whole`.",
        choices=("each", "whole"),
    )
    cut: float = setting(
        0.0,
        "Largest share of the dense cost that a round cuts before everything is measured anew; 0 for all of it at "
        "once.",
        low=0,
        high=1,
    )
