"""A pruned language model compared with its dense base: costs, speeds, perplexity and zero-shot accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artifacts.documents import PlanDocument
from ..artifacts.pruned_model import example_of
from ..errors import ArtifactError
from ..pruning.space import fingerprint
from ..utils.findings import Findings
from ..utils.timing import measure
from ..workloads.base import Workload
from . import describe, zeroshot
from .files import pretrained
from .files.tokenizers import why_unreadable
from .files.without_plan import whole_space


def read_tasks(tasks: Sequence[Path]) -> None:
    """Refuse malformed question files, tasks without data, and a missing harness, before minutes of measuring."""
    for path in tasks:
        if not zeroshot.is_task_name(path):
            zeroshot.read_questions(path)
    if tasks:
        zeroshot.require_harness()
    for path in tasks:
        if zeroshot.is_task_name(path):
            zeroshot.read_named(str(path))


def compare(
    slim: nn.Module,
    directory: Path,
    plan: PlanDocument,
    workload: Workload | None,
    tasks: Sequence[Path],
    limit: int | None,
) -> Findings:
    """Perplexity, costs, speeds and zero-shot accuracy of a pruned language model compared with its dense base."""
    costs: Mapping[str, float] = plan["dense_cost"]
    before = "dense"
    if workload is None:
        dense, example = _random_base(plan, slim), example_of(plan).long()
    else:
        dense, example = workload.model, workload.example_inputs
        costs, before = _costs_before(plan, slim, directory, workload)
        stored = next(slim.parameters()).dtype
        slim = slim.to(workload.device, next(dense.parameters()).dtype)
    models = {"dense": dense, "pruned": slim}
    rows = [*_cost_rows(plan, costs, example), *_speed_rows(models, example)]
    notes = ["perplexity: give CONFIG to measure it"]
    if workload is not None:
        quality, notes = _quality_rows(workload, models)
        rows += quality
        if stored != next(slim.parameters()).dtype:
            short = [str(d).removeprefix("torch.") for d in (stored, next(slim.parameters()).dtype)]
            notes.append(f"the folder's weights are {short[0]}; both models were computed in {short[1]}")
    lines = [*describe.comparison(rows, before), *notes]
    facts: dict[str, object] = {
        "dense": {name: first for name, first, _, _ in rows},
        "pruned": {name: second for name, _, second, _ in rows},
        "notes": notes,
    }
    if tasks:
        tokenizer: Any = (workload and workload.tokenizer) or _tokenizer_of(directory, plan)
        # Without CONFIG the dense model has the right shape only, not its weights.
        known = models if workload is not None else {"pruned": slim}
        accuracies = {name: zeroshot.accuracy(m, tokenizer, tasks, limit) for name, m in known.items()}
        lines += ["", *zeroshot.table(accuracies)]
        facts["tasks"] = {name: [_plain(found) for found in every] for name, every in accuracies.items()}
    return Findings("\n".join(lines), facts)


def _plain(found: zeroshot.Accuracy) -> dict[str, object]:
    """Without the error of a mean over one question, which is no number."""
    return {name: value for name, value in asdict(found).items() if value == value}


def _costs_before(
    plan: PlanDocument, slim: nn.Module, directory: Path, workload: Workload
) -> tuple[Mapping[str, float], str]:
    """The costs of the workload's model, and its heading: "dense", or "before" where it is a pruned model itself.

    ArtifactError where the folder's model was cut from another architecture.
    """
    if fingerprint(workload.architecture) == plan["fingerprint"]:
        if workload.cut_from is None:
            return plan["dense_cost"], "dense"
        first = workload.cut_from.plan
        return {metric: first.space.cost(first.widths, metric) for metric in first.space.costs}, "before"
    # A folder whose dense model is not known counts as its own base: it may be compared with any of its vocabulary.
    given = pretrained.pretrained_model(workload.model)
    same = given.config.vocab_size == pretrained.pretrained_model(slim).config.vocab_size
    if fingerprint(slim) != plan["fingerprint"] or not same:
        raise ArtifactError(f"{directory}: was pruned from another architecture than {workload.name!r}")
    length = int((plan.get("input") or workload.example_inputs.shape)[-1])
    space = whole_space(given, "", length, False)
    return {metric: space.dense_cost(metric) for metric in space.costs}, "dense"


def _cost_rows(plan: PlanDocument, dense: Mapping[str, float], example: Tensor) -> list[describe.Row]:
    """Costs as counted when the model was saved; macs are those of the example's length then."""
    length = (plan.get("input") or example.shape)[-1]
    names = {
        "params": "params (all, tied once)",
        "block_params": "params of the blocks",
        "macs": f"macs of {length} tokens",
        "kv_cache": "KV cache, bytes a token (bf16)",
    }
    costs = plan["cost"]
    rows = [(text, dense[m], costs[m], ",.0f") for m, text in names.items() if m in costs and m in dense]
    context = describe.context_length(plan["base"].get("config", {}))
    if context and "kv_cache" in costs:
        mega = context / 1e6
        rows.append(
            (f"KV cache at {context} tokens, MB", dense["kv_cache"] * mega, costs["kv_cache"] * mega, ",.2f")
        )
    return rows


def _speed_rows(models: dict[str, nn.Module], example: Tensor) -> list[describe.Row]:
    """Measured medians; the models run in turns."""
    length = example.shape[-1]
    prefill = measure(models, example, batch_sizes=(1,), budget_seconds=10.0)
    prompt, tokens, rounds = describe.decoding_plan(length, describe.context_length(models["dense"].config))
    decode = describe.decoding_speed(models, example[:1, :prompt], tokens, rounds)
    return [
        (f"prefill of {length} tokens, ms", prefill["dense"][1], prefill["pruned"][1], ",.2f"),
        (f"decoding after {prompt}, tokens/s", decode["dense"], decode["pruned"], ",.1f"),
    ]


def _quality_rows(workload: Workload, models: dict[str, nn.Module]) -> tuple[list[describe.Row], list[str]]:
    with workload.test_opened():
        dense, pruned = (workload.evaluate(models[name], "test") for name in ("dense", "pruned"))
    facts = workload.protocol().get("splits", {}).get("test")
    note = f"test: {pruned.count:,} tokens scored"
    if facts is not None and "examples" in facts:
        note = (
            f"test: {facts['text']}, {facts['sequences']} examples ({facts['examples']['format']}) of at most "
            f"{facts['length']} tokens, {facts['tokens']:,} tokens scored ({facts['scored']})"
        )
    elif facts is not None:
        note = (
            f"test: {facts['text']}, {facts['sequences']} sequences of {facts['length']} tokens, stride "
            f"{facts['stride']}, {facts['tokens']:,} tokens scored"
        )
    return [
        (f"test {workload.metric_name}", dense.metric, pruned.metric, ",.4f"),
        ("test loss", dense.loss, pruned.loss, ",.4f"),
    ], [note]


def _tokenizer_of(directory: Path, plan: PlanDocument) -> Any:
    """The tokenizer that was saved with a pruned model."""
    from transformers import AutoTokenizer

    # Stock classes refuse layers of unequal sizes, and a tokenizer needs none: the dense config will do.
    config = pretrained.build_config(plan["base"]["config"])
    try:
        return AutoTokenizer.from_pretrained(
            str(directory), config=config, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # whatever the libraries raise for broken files
        raise ArtifactError(
            f"{directory}: holds no tokenizer that can be read ({why_unreadable(directory, error)}); "
            "give CONFIG to take the dense model's"
        ) from error


def _random_base(plan: PlanDocument, slim: nn.Module) -> nn.Module:
    """The dense architecture of a pruned language model, for its speed only: the weights are noise."""
    model: nn.Module = pretrained.skeleton(pretrained.build_config(plan["base"]["config"])).to_empty(
        device="cpu"
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(0.0, 0.02, generator=generator)
            else:
                tensor.zero_()
    return model.to(next(slim.parameters()).dtype).eval()
