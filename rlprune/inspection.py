"""Looking without changing: what can be pruned in a model, and how good a pruned model is."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import language_figures as figures
from . import pretrained, zeroshot
from .artifacts import library_versions, load, read_plan
from .config import Config
from .errors import ArtifactError, ConfigError
from .latency import measure, processor
from .problem import timed_space
from .progress import Console
from .pruning.cost import plain_amount
from .pruning.space import PruningSpace
from .pruning.tracing import count_macs, fingerprint, trace_configured
from .workloads.base import Workload
from .workloads.build import build_workload
from .workloads.causal import PREFIX, read_config
from .workloads.zoo import rebuild


def inspect(config: Config) -> str:
    """Groups, widths, costs, protected parts and feasible budgets as text; nothing is trained or searched."""
    timed = config.budget.metric == "latency"
    if config.workload is None and config.model.name.startswith(PREFIX) and not timed:
        return _inspect_language(config, *_skeleton(config))
    workload = build_workload(config, train=False)
    if workload.language:
        return _inspect_language(config, workload.model, workload.example_inputs, workload)
    space = trace_configured(workload.model, workload.example_inputs, config.prune)
    if timed:
        space = timed_space(config, workload, space)
    units = {metric: space.unit_costs(space.widths, metric) for metric in space.costs}
    head = ["group", "kind", "width", "unit", "min", "step"]
    lines = ["{:<34} {:<10} {:>6} {:>5} {:>5} {:>5}".format(*head)]
    lines[0] += "".join(f" {'us/unit' if m == 'latency' else f'{m}/unit':>12}" for m in units)
    for i, g in enumerate(space.groups):
        sizes = f"{g.width:>6} {g.unit:>5} {g.minimum:>5} {g.step:>5}"
        costs = [f"{1e3 * c[i]:,.3f}" if m == "latency" else f"{c[i]:,.0f}" for m, c in units.items()]
        lines.append(f"{g.name:<34} {g.kind:<10} {sizes}" + "".join(f" {text:>12}" for text in costs))
    lines.append("")
    lines += [f"protected: {name}: {reason}" for name, reason in space.protected.items()]
    lines += [f"unused in eval mode: {name}" for name in space.unused]
    for metric in space.costs:
        low, dense = space.feasible(metric)
        if metric == "latency":
            lines.append(_latency_line(space))
            continue
        budgets = f"feasible budgets {low / dense:.4f} to 1 ({low:,.0f} to {dense:,.0f})"
        lines.append(f"{metric}: dense {dense:,.0f}; {budgets}")
    lines.append(_budget_line(space, config))
    return "\n".join(lines)


def resources(seconds: float) -> str:
    """What a command took: seconds, and the largest memory of this process where the system tells it."""
    try:
        import resource
    except ImportError:  # not on Windows
        return f"took {seconds:.1f} s"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"took {seconds:.1f} s, peak memory {peak / 1e6:,.0f} MB"


def evaluate(
    directory: Path, config: Config | None, tasks: Sequence[Path] = (), limit: int | None = None
) -> str:
    """A saved pruned model beside its dense base: costs, latency and, with a config, its quality on test.

    Args:
        tasks: multiple-choice files for a language model's zero-shot accuracy (see `zeroshot`).
        limit: only the first ``limit`` questions of each.
    """
    plan = read_plan(directory)
    if plan["base"].get("source") == "transformers":
        return _evaluate_language(directory, plan, config, tasks, limit)
    if tasks:
        raise ConfigError(
            f"--tasks: needs a language model, but {directory} holds {plan['base'].get('name')!r}"
        )
    workload = None
    if config is not None:
        workload = build_workload(config, progress=Console(True).training)
        dense, example = workload.model, workload.example_inputs
        slim = load(directory, base=dense).to(workload.device)
    else:
        slim, dense, example = load(directory), rebuild(plan["base"]).eval(), _example_of(plan)
    models = {"dense": dense, "pruned": slim}
    times = measure(models, example, budget_seconds=10.0)
    lines = [f"{'':<8} {'macs':>16} {'params':>14} {'ms batch 1':>11} {'ms batch 64':>12}  quality"]
    for name, model in models.items():
        quality = "(give CONFIG to measure it)"
        if workload is not None:
            with workload.test_opened():
                q = workload.evaluate(model, "test")
            quality = f"test {workload.metric_name} {q.metric:.4f}, loss {q.loss:.4f} ({q.count} samples)"
        costs = f"{count_macs(model, example):>16,.0f} {sum(p.numel() for p in model.parameters()):>14,}"
        lines.append(f"{name:<8} {costs} {times[name][1]:>11.3f} {times[name][64]:>12.3f}  {quality}")
    return "\n".join(lines)


def _skeleton(config: Config) -> tuple[nn.Module, Tensor]:
    """A named language model without its weights, however large, and token ids of the stated length."""
    found = read_config(config.model.name)
    length, longest = config.data.sequence_length, figures.context_length(found)
    if longest is not None and length > longest:
        raise ConfigError(f"data.sequence_length: {length} is longer than the model's {longest} positions")
    return pretrained.skeleton(found), torch.zeros(1, length, dtype=torch.long)


def _inspect_language(
    config: Config, model: nn.Module, example: Tensor, workload: Workload | None = None
) -> str:
    """The same for a language model: blocks that are alike in one line, costs with what they count."""
    space = trace_configured(model, example, config.prune)
    if workload is not None and config.budget.metric == "latency":
        space = timed_space(config, workload, space)
    lines = [*figures.group_lines(space), "", *figures.protected_lines(space.protected)]
    lines += [f"unused in eval mode: {name}" for name in space.unused]
    lines += figures.cost_lines(space, model)
    if "latency" in space.costs:
        lines.append(_latency_line(space))
    return "\n".join([*lines, _budget_line(space, config)])


def _budget_line(space: PruningSpace, config: Config) -> str:
    target = space.target(config.budget.target, config.budget.metric)
    metric = config.budget.metric
    return f"budget: {config.budget.target} of {metric} = {plain_amount(target, metric)}"


def _latency_line(space: PruningSpace) -> str:
    """What the latency table says, where it was measured, and how far it is from the models that it was tied to."""
    low, dense = space.feasible("latency")
    table = space.costs["latency"].table  # type: ignore[attr-defined]
    # The dense model comes first; what was measured of it is in the table as it is.
    off = sorted(abs(check["table"] / check["measured"] - 1.0) for check in table.checks[1:])
    where = f"{table.machine['device']}, {table.machine['threads']} threads, batch size {table.batch_size}"
    fit = (
        f"; off by {off[len(off) // 2]:.1%} (median) and {off[-1]:.1%} (most) on {len(off)} cut models"
        if off
        else ""
    )
    return (
        f"latency: dense {dense:,.3f} ms; feasible budgets {low / dense:.4f} to 1 ({low:,.3f} to {dense:,.3f} ms); "
        f"table of {len(table.tables)} layers on {where}{fit}"
    )


def _evaluate_language(
    directory: Path, plan: dict[str, Any], config: Config | None, tasks: Sequence[Path], limit: int | None
) -> str:
    """Perplexity, costs, speeds and zero-shot accuracy of a pruned language model beside its dense base."""
    for path in tasks:
        zeroshot.read_questions(path)  # a malformed file is refused before minutes of measuring
    if tasks:
        zeroshot.require_harness()
    workload = build_workload(config, progress=Console(True).training) if config is not None else None
    slim = load(directory)
    if workload is None:
        dense, example = _random_base(plan["base"], slim), _example_of(plan).long()
    else:
        dense, example = workload.model, workload.example_inputs
        if fingerprint(dense) != plan["fingerprint"]:
            raise ArtifactError(f"{directory}: was pruned from another architecture than {workload.name!r}")
        slim = slim.to(workload.device)
    models = {"dense": dense, "pruned": slim}
    rows = [*_cost_rows(plan, example), *_speed_rows(models, example)]
    notes = ["perplexity: give CONFIG to measure it"]
    if workload is not None:
        quality, notes = _quality_rows(workload, models)
        rows += quality
    lines = [*figures.comparison(rows), *notes]
    if tasks:
        tokenizer = getattr(workload, "tokenizer", None) or _tokenizer_of(directory, plan["base"])
        # Without CONFIG the dense model has the right shape only, not its weights.
        known = models if workload is not None else {"pruned": slim}
        accuracies = {name: zeroshot.accuracy(m, tokenizer, tasks, limit) for name, m in known.items()}
        lines += ["", *zeroshot.table(accuracies)]
    return "\n".join(lines)


def _cost_rows(plan: dict[str, Any], example: Tensor) -> list[figures.Row]:
    """Costs as counted when the model was saved; macs are those of the example's length then."""
    length = (plan.get("input") or example.shape)[-1]
    names = {
        "params": "params (all, tied once)",
        "block_params": "params of the blocks",
        "macs": f"macs of {length} tokens",
        "kv_cache": "KV cache, bytes a token (bf16)",
    }
    costs, dense = plan["cost"], plan["dense_cost"]
    rows = [(text, dense[m], costs[m], ",.0f") for m, text in names.items() if m in costs and m in dense]
    context = figures.context_length(plan["base"].get("config", {}))
    if context and "kv_cache" in costs:
        mega = context / 1e6
        rows.append(
            (f"KV cache at {context} tokens, MB", dense["kv_cache"] * mega, costs["kv_cache"] * mega, ",.2f")
        )
    return rows


def _speed_rows(models: dict[str, nn.Module], example: Tensor) -> list[figures.Row]:
    """Measured medians; the models run in turns."""
    length = example.shape[-1]
    prefill = measure(models, example, batch_sizes=(1,), budget_seconds=10.0)
    prompt, tokens, rounds = figures.decoding_plan(length, figures.context_length(models["dense"].config))
    decode = figures.decoding_speed(models, example[:1, :prompt], tokens, rounds)
    return [
        (f"prefill of {length} tokens, ms", prefill["dense"][1], prefill["pruned"][1], ",.2f"),
        (f"decoding after {prompt}, tokens/s", decode["dense"], decode["pruned"], ",.1f"),
    ]


def _quality_rows(workload: Workload, models: dict[str, nn.Module]) -> tuple[list[figures.Row], list[str]]:
    with workload.test_opened():
        dense, pruned = (workload.evaluate(models[name], "test") for name in ("dense", "pruned"))
    facts = workload.protocol()["splits"]["test"]  # type: ignore[attr-defined]
    note = (
        f"test: {facts['text']}, {facts['sequences']} sequences of {facts['length']} tokens, stride "
        f"{facts['stride']}, {facts['tokens']:,} tokens scored"
    )
    return [
        (f"test {workload.metric_name}", dense.metric, pruned.metric, ",.4f"),
        ("test loss", dense.loss, pruned.loss, ",.4f"),
    ], [note]


def _tokenizer_of(directory: Path, base: dict[str, Any]) -> Any:
    """The tokenizer that was saved with a pruned model."""
    from transformers import AutoTokenizer

    # Stock classes refuse layers of unequal sizes, and a tokenizer needs none: the dense config will do.
    config = pretrained.build_config(base["config"])
    try:
        return AutoTokenizer.from_pretrained(str(directory), config=config, local_files_only=True)
    except Exception as error:  # whatever the libraries raise for broken files
        raise ArtifactError(
            f"{directory}: holds no tokenizer that can be read; give CONFIG to take the dense model's"
        ) from error


def _random_base(base: dict[str, Any], slim: nn.Module) -> nn.Module:
    """The dense architecture of a pruned language model, for its speed only: the weights are noise."""
    model = pretrained.skeleton(pretrained.build_config(base["config"])).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(0.0, 0.02, generator=generator)
            else:
                tensor.zero_()
    return model.to(next(slim.parameters()).dtype).eval()


def hardware() -> dict[str, Any]:
    """What figures were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or "cpu",
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "libraries": library_versions(),
    }


def _example_of(plan: dict[str, Any]) -> torch.Tensor:
    shape = plan.get("input")
    if not shape:
        raise ArtifactError("plan.json: does not say the input's shape; give CONFIG")
    return torch.zeros(1, *shape[1:])
