"""Fisher-weighted elimination against exact expectations and against divergences that were really measured."""

from __future__ import annotations

import numpy as np
import torch

from helpers.language_workload import Sentences
from helpers.lm import tiny_lm
from rlprune import trace
from rlprune.evaluation.importance import compute
from rlprune.language.calibration import fisher
from rlprune.language.calibration.grams import collect, unit_consumers
from rlprune.pruning.plan import make_plan
from rlprune.pruning.surgery import prune
from rlprune.rules import RULES, Context


def _workload(variant: str = "llama") -> tuple[Sentences, object]:
    workload = Sentences(tiny_lm(variant).double())
    return workload, trace(workload.model, workload.example_inputs)


def _exact_moment(model: torch.nn.Module, module: str, ids: torch.Tensor) -> torch.Tensor:
    """The expectation over all labels of all positions, written out: mean over tokens of sum_t E_y[g g']."""
    seen: list[torch.Tensor] = []

    def hook(layer: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        seen.append(output)

    handle = model.get_submodule(module).register_forward_hook(hook)
    logs = model(ids).logits.log_softmax(-1)[0]
    handle.remove()
    total = torch.zeros(seen[0].shape[-1], seen[0].shape[-1], dtype=torch.float64)
    for position in range(len(logs)):
        for label in range(logs.shape[-1]):
            (g,) = torch.autograd.grad(logs[position, label], seen[0], retain_graph=True)
            total += logs[position, label].exp().detach() * g[0].T @ g[0]
    return total / len(logs)


def test_sampled_moments_approach_the_exact_expectation():
    workload, space = _workload()
    module = unit_consumers(space)[-1].module
    ids = workload.parts["calibration"][:1, :3]
    exact = _exact_moment(workload.model, module, ids)
    draws = [
        fisher.output_moments(workload.model, space, [(ids, ids)], seed=1000 * i)[module] for i in range(500)
    ]
    found = torch.stack(draws).mean(dim=0)
    assert torch.linalg.norm(found - exact) < 0.15 * torch.linalg.norm(exact)


def test_the_expected_divergence_is_that_of_a_small_error():
    """KL of an output that is off by d, measured, against d' F d / 2 with the exact F."""
    workload, space = _workload()
    model, module = workload.model, unit_consumers(space)[-1].module
    ids = workload.parts["calibration"][:1, :4]
    moment = _exact_moment(model, module, ids)
    error = 1e-3 * torch.randn(
        moment.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    dense = model(ids).logits.log_softmax(-1)
    handle = model.get_submodule(module).register_forward_hook(lambda m, i, o: o + error)
    off = model(ids).logits.log_softmax(-1)
    handle.remove()
    measured = (dense.exp() * (dense - off)).sum(-1).mean().item()
    # The last block's errors reach only their own position, so that the block diagonal is all there is.
    assert abs((error @ moment @ error).item() / 2 / measured - 1) < 0.02


def test_a_backward_pass_leaves_the_model_as_it_was():
    workload, space = _workload("qwen2")
    before = {n: p.clone() for n, p in workload.model.named_parameters()}
    flags = [p.requires_grad for p in workload.model.parameters()]
    first = fisher.output_moments(workload.model, space, workload.batches("calibration"), seed=3)
    again = fisher.output_moments(workload.model, space, workload.batches("calibration"), seed=3)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert [p.requires_grad for p in workload.model.parameters()] == flags
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in workload.model.named_parameters())


def test_identity_moments_give_the_plain_elimination():
    workload, space = _workload("opt")
    grams = collect(workload.model, space, workload.batches("calibration"))
    size = workload.model.config.hidden_size
    eye = {c.module: torch.eye(size, dtype=torch.float64) for c in unit_consumers(space)}
    weighted = fisher.fisher_eliminations(workload.model, space, grams, eye)
    known = workload.adapter.calibration(workload, space, workload.model)
    known.give_grams(grams)
    plain = compute("obs", workload, space, calibration=known)
    for group, found in weighted.items():
        assert np.array_equal(found.ranks, plain[group])


def test_curves_rise_from_zero_and_the_rule_prefers_what_costs_less():
    workload, space = _workload()
    measured = workload.adapter.calibration(workload, space, workload.model)
    scores = compute("obs_fisher", workload, space, calibration=measured)
    curves = measured.curves
    for group, curve in curves.items():
        assert curve.shape == (space.groups[group].width + 1,) and curve[0] == 0.0
        assert (np.diff(curve) >= 0).all()
    context = Context(space, workload.model, scores, 0.8, "params", workload, calibration=measured)
    widths = space.project(RULES["fisher"].function(context), 0.8, "params")
    uniform = space.project(np.ones(len(space.groups)), 0.8, "params")

    def expected(plan: np.ndarray) -> float:
        return sum(curves[g][space.widths[g] - plan[g]] for g in curves)

    assert expected(widths) <= expected(uniform)
    slim = prune(workload.model, make_plan(space, importance=scores, widths=widths))
    assert torch.isfinite(slim(workload.example_inputs).logits).all()
