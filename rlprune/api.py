"""The verbs on models and folders: trace, save, load; each asks the model's adapter."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .artifacts.safetensors import MAX_SHARD_SIZE
from .config.config import AUTO
from .pruning.cost_terms import NarrowSpaceWarning, narrow_lines
from .pruning.plan import Plan
from .pruning.space import PruningSpace
from .tracing.trace import TraceOptions
from .workloads.adapter import adapter_of, adapter_of_base, read_pruned


def trace(
    model: nn.Module,
    example_inputs: Any,
    ignore: Sequence[str] = (),
    round_to: int | str = AUTO,
    minimum: int = 1,
    verify: bool = True,
    max_seconds: float = 120.0,
    max_memory_gb: float = 8.0,
    drop: bool = False,
    hidden: bool = False,
    inexact: bool = False,
    runtime: str = "any",
) -> PruningSpace:
    """Find what can be pruned in ``model``; the model is not changed.

    A transformers causal language model is read through its family, any other model by its dependency graph.

    Args:
        example_inputs: a tensor, a list (one argument), a tuple of arguments or a dict of keyword arguments, with
            a batch dimension first; the batch size of a list of tensors is its length. Costs are those of one sample.
        ignore: names or patterns (``"layer4.*"``) of layers whose outputs keep their width.
        round_to: kept channels are a multiple of this, where a group is cut at all. "auto": 1 for models of images; for
            language models 32, or the largest power of two below that leaves 8 steps and divides the width.
        minimum: smallest number of channels kept in a group.
        verify: cut random units of all groups and compare with the masked dense model in float64; a
            group for which they differ is protected, with the reason, instead of being cut wrongly.
        max_seconds, max_memory_gb: limits on all of it, the proof as well; where it is long it runs in a process
            of its own, which is killed then.
        drop: language models: an attention or a feed-forward part may lose all of its units.
        hidden: language models: the residual width is a group too, without an exact cut.
        inexact: other models: channels that a norm or a softmax runs over are groups too, as they are in
            Torch-Pruning; their cut changes what is kept, and `space.inexact` says why.
        runtime: language models: where the model will run (``rlprune list runtimes``); only what loads there is cut.

    Warns:
        NarrowSpaceWarning: more than half of a metric stays at the smallest widths; the text names the protected
            layers that keep most of it, and why.

    Raises:
        GraphError: the model's forward fails, nothing can be pruned, or a limit is reached; the layer
            and the reason are named.
        ConfigError: a runtime that does not read the model, or not what is asked for.
    """
    options = TraceOptions(
        ignore, round_to, minimum, verify, max_seconds, max_memory_gb, drop, hidden, inexact, runtime
    )
    space = adapter_of(model).trace(model, example_inputs, options)
    for line in narrow_lines(space):
        warnings.warn(line, NarrowSpaceWarning, stacklevel=2)
    return space


def save(
    slim: nn.Module,
    plan: Plan,
    directory: str | Path,
    *,
    base: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
) -> Path:
    """Write a pruned model into a folder, which is replaced as a whole or not at all.

    A causal language model of transformers also gets config.json with the sizes of each layer, the code that
    ``AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)`` needs, and its generation config.

    Args:
        slim: what `rlprune.prune(model, plan)` made, fine-tuned or not.
        plan: the plan it was made with.
        directory: new, empty, or an earlier pruned model written by rlprune.
        base: how to build the dense architecture, ``{"source", "name", "arguments"}`` (a workload's
            `.base`). Without it, models of torchvision, timm and our zoo are recognised; for others the
            folder says that `load` needs ``base=model``. For language models only its "name" is used.
        tokenizer: the language model's tokenizer, or a folder that has one; its files are written next to it.
        max_shard_size: language models above it ("5GB", "500MB") are written as several files.

    Raises ArtifactError: tensors that do not fit the plan, NaN weights, or a folder that cannot be written.
    """
    adapter_of(slim).save(
        slim, plan, Path(directory), base=base, tokenizer=tokenizer, max_shard_size=max_shard_size
    )
    return Path(directory)


def load(directory: str | Path, base: nn.Module | None = None) -> nn.Module:
    """The pruned model in a folder, on the CPU, in eval mode.

    The folder of a language model may have been written again by other tools (``save_pretrained``, PEFT's merge, the
    Trainer): the sizes come from config.json, and plan.json may be missing.

    Args:
        base: the dense model, where the file cannot say how to build it (a model of your own); it is
            not changed, and only its architecture counts.

    Warns ForeignFolderWarning: another tool has changed the weights since, so their checksums are not compared.
    Raises ArtifactError: missing, truncated, foreign or newer files, tensors that do not fit the plan or
    the base, NaN weights.
    """
    folder = Path(directory)
    document = read_pruned(folder)
    return adapter_of_base(document["base"]).load(folder, document, base)


def load_plan(directory: str | Path, space: PruningSpace) -> Plan:
    """The plan in the folder of a pruned model, or in a plan.json, in the space of its dense model.

    Args:
        space: `rlprune.trace` of the dense model; only the architecture counts.

    Raises ArtifactError: no plan, or one of another architecture.
    """
    return Plan.from_dict(read_pruned(directory), space)
