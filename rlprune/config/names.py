"""What a setting may name, and others may add to: recovery steps, cost metrics, kinds of scores, data sets.

The functions behind the names are registered by upper floors: `rlprune.recovery_step`, `rlprune.cost_metric`,
`rlprune.score_kind`, `rlprune.runtime`, `rlprune.data_set`, `rlprune.text_data`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..utils.registry import Named, Registry


@dataclass(frozen=True)
class StepName(Named):
    """A recovery step; ``after`` is the shipped step that it follows, None for those before all of them."""

    after: str | None = None


RECOVERY_STEPS = Registry(
    "recovery step",
    home="language.sparse_steps",
    entries=(
        (name, StepName(name, summary))
        for name, summary in (
            ("none", "leave the cut model as it is"),
            (
                "bias",
                "put the mean of what the removed units gave into the consumers' biases (language models; no "
                "gradient)",
            ),
            ("reconstruct", "fold removed units into the kept weights by ridge regression (no gradient)"),
            ("bn", "recompute batch-norm statistics on calibration data"),
            (
                "finetune",
                "k steps of SGD (AdamW for language models), distilled from the dense model on request",
            ),
        )
    ),
)
COST_METRICS = Registry(
    "cost metric",
    home="pruning.cost_metrics",
    entries=(
        (name, Named(name, summary, wing=wing))
        for name, summary, wing in (
            ("macs", "multiply-accumulates of one sample", None),
            ("params", "parameters, each counted once", None),
            ("block_params", "parameters inside the transformer blocks", "language"),
            ("kv_cache", "bytes of keys and values for each token of context, in bfloat16", "language"),
            ("latency", "milliseconds of a forward pass on this machine (measured once)", None),
        )
    ),
)
SCORE_KINDS = Registry(
    "kind of score",
    home="workloads.score_kinds",
    entries=(
        (name, Named(name, summary))
        for name, summary in (
            (
                "kl",
                "minus the divergence from the dense model, as the task has it: -KL(dense || pruned) of classes",
            ),
            ("loss", "-validation loss"),
            ("accuracy", "the workload's metric (not for language models)"),
        )
    ),
)
RUNTIMES = Registry(
    "runtime",
    home="language.runtimes",
    entries=(
        (name, Named(name, summary, wing=wing))
        for name, summary, wing in (
            ("any", "every cut that is exact; what is saved needs our classes where layers differ", None),
            (
                "llama.cpp",
                "GGUF: heads and neurons differ by layer (families that its `deci` fits)",
                "language",
            ),
            (
                "vllm",
                "nemotron-nas (DeciLM) of vLLM: neurons differ by layer, whole attentions go but the first",
                "language",
            ),
            (
                "uniform",
                "stock transformers: one number of neurons and one of key-value heads for all blocks",
                "language",
            ),
        )
    ),
)
DATA_SETS: Registry[Named] = Registry("data set")
"""The wings register what they ship; a data set belongs to one of them."""


def recovery_order() -> list[str]:
    """All recovery steps in the order in which they run: the shipped ones, each with those registered after it."""
    further = [step for step in RECOVERY_STEPS.values() if step.function is not None]
    order = [step.name for step in further if step.after is None]
    for name, step in RECOVERY_STEPS.items():
        if step.function is None:
            order += [name, *(own.name for own in further if own.after == name)]
    return order


TRACKER_NAMES = ("mlflow", "wandb", "trackio")
"""What `search.trackers` may name; the package and the extra have the same name."""
