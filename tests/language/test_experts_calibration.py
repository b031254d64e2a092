"""Importances and the closed form of experts, from the tokens that are sent to them, against sums written down here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rlprune
from helpers.lm import tiny_lm, tokens
from rlprune.config.training import RecoveryConfig
from rlprune.importance.importance import IMPORTANCES
from rlprune.language.calibration import grams
from rlprune.language.calibration.cache import LanguageCalibration
from rlprune.language.calibration.nested import Factors, NestedReconstruction
from rlprune.language.calibration.routing import contributions
from rlprune.language.calibration.statistics import collect
from rlprune.pruning.plan import make_plan
from rlprune.pruning.surgery import prune

RIDGE = 1e-3


class Text:
    """Two batches of random tokens as a calibration split."""

    def batches(self, split: str, limit: int | None = None) -> Iterator[tuple[Any, Any]]:
        for seed in range(2):
            ids = tokens(24, batch=4, seed=seed)
            yield ids, ids

    def loss_of(self, outputs: Any, targets: Any) -> torch.Tensor:
        return F.cross_entropy(outputs[:, :-1].flatten(0, 1).double(), targets[:, 1:].flatten())

    def outputs_for_loss(self, model: Any, inputs: Any, targets: Any) -> Any:
        return model(input_ids=inputs, use_cache=False).logits

    loss = loss_of


@pytest.fixture(scope="module")
def case() -> tuple[Any, rlprune.PruningSpace, dict[str, torch.Tensor]]:
    """A Mixtral in float64, its space, and what the second block's experts are called with over all tokens."""
    model: Any = tiny_lm("mixtral", dtype=torch.float64)
    space = rlprune.trace(model, tokens(), verify=False)
    seen: list[tuple[torch.Tensor, ...]] = []
    experts = model.model.layers[1].mlp.experts
    handle = experts.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    with torch.no_grad():
        for ids, _ in Text().batches("calibration"):
            model(input_ids=ids, use_cache=False)
    handle.remove()
    hidden, chosen, weights = (torch.cat([s[i] for s in seen]) for i in range(3))
    return model, space, {"hidden": hidden, "chosen": chosen, "weights": weights}


def neurons(model: Any, seen: dict[str, torch.Tensor], expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What an expert of the second block reads, (T, F), and the router's weights (T,), zero elsewhere."""
    own = model.model.layers[1].mlp.experts
    gate, up = (seen["hidden"] @ own.gate_up_proj[expert].detach().T).chunk(2, dim=-1)
    weight = (seen["weights"] * (seen["chosen"] == expert)).sum(dim=-1).double()
    return F.silu(gate) * up, weight


def places(space: rlprune.PruningSpace) -> tuple[int, int]:
    """The groups of the second block's whole experts and of their neurons."""
    names = [g.name for g in space.groups]
    return names.index("model.layers.1.mlp.gate"), names.index("model.layers.1.mlp.experts")


def test_moments_are_those_of_the_weighted_neurons(case: Any) -> None:
    model, space, seen = case
    found = grams.collect(model, space, Text().batches("calibration"))
    moments = collect(model, space, Text().batches("calibration")).inputs
    for expert in range(5):
        x, w = neurons(model, seen, expert)
        gram = found[f"model.layers.1.mlp.experts.{expert}"]
        z = x * w[:, None]
        assert torch.allclose(gram.product, z.T @ z / len(z), atol=1e-12)
        assert torch.allclose(gram.mean, (w.square() @ x) / w.square().sum(), atol=1e-12)
        assert gram.count == int((w > 0).sum())
        assert gram.mass == pytest.approx(float(w.square().mean()))
        own = moments[f"model.layers.1.mlp.experts.{expert}"]
        assert np.allclose(own.second, z.square().mean(dim=0).numpy())
        assert np.allclose(own.variance, z.var(dim=0, unbiased=False).numpy())


def test_whole_experts_are_ranked_by_what_they_add(case: Any) -> None:
    model, space, seen = case
    whole, _ = places(space)
    down = model.model.layers[1].mlp.experts.down_proj.detach()
    wanted = []
    for expert in range(5):
        x, w = neurons(model, seen, expert)
        wanted.append(float((w * (x @ down[expert].T).norm(dim=-1)).mean()))
    found = contributions(model, space, Text().batches("calibration"))
    assert np.allclose(found[whole], wanted)
    cache = LanguageCalibration(Text(), space, model, recovery=RecoveryConfig())
    for name in ("wanda_sp", "flap", "obs", "obs_fisher"):
        scores = IMPORTANCES[name].function(cache)
        assert np.allclose(scores[whole], wanted)
        assert [len(s) for s in scores] == [g.units for g in space.groups]
        assert all(np.isfinite(s).all() for s in scores)


@pytest.mark.parametrize("name", ["l1", "l2", "taylor", "taylor_vector", "saap", "random"])
def test_other_importances_score_every_neuron_of_every_expert(case: Any, name: str) -> None:
    model, space, _ = case
    scores = IMPORTANCES[name].function(LanguageCalibration(Text(), space, model))
    assert [len(s) for s in scores] == [g.units for g in space.groups]
    if name == "l2":
        whole, inner = places(space)
        own = model.model.layers[1].mlp
        gate_up = own.experts.gate_up_proj.detach()
        rows = (gate_up[:, :16].square() + gate_up[:, 16:].square()).sum(dim=-1).sqrt()
        assert np.allclose(scores[inner], rows.reshape(-1).numpy())
        sums = gate_up.square().sum(dim=(1, 2)) + own.gate.weight.detach().square().sum(dim=1)
        sums += own.experts.down_proj.detach().square().sum(dim=(1, 2))  # whole experts: all that is theirs
        assert np.allclose(scores[whole], sums.sqrt().numpy())


def test_every_expert_is_mended_by_its_own_regression(case: Any) -> None:
    """The new weights are the least squares of w W x over the tokens that an expert gets, with the ridge."""
    model, space, seen = case
    whole, inner = places(space)
    cache = LanguageCalibration(Text(), space, model, recovery=RecoveryConfig())
    scores = IMPORTANCES["obs"].function(cache)
    widths = space.widths.copy()
    widths[whole], widths[inner] = 4, 9
    plan = make_plan(space, importance=scores, widths=widths)
    factors = Factors(model, RIDGE)
    mend = NestedReconstruction.of(space, cache.grams(), factors, scores)
    slim, plain = prune(model, plan), prune(model, plan)
    mend(slim, plan)
    old = model.model.layers[1].mlp.experts.down_proj.detach()
    for place, expert in enumerate(plan.kept[whole].tolist()):
        x, w = neurons(model, seen, expert)
        z = x * w[:, None]
        units = plan.kept[inner]
        kept = torch.from_numpy(units[units // 16 == expert] % 16)
        a = z.T @ z / len(z)
        ridge = RIDGE * max(1.0, 16 / int((w > 0).sum()))
        a = a + ridge * a.diagonal().mean() * torch.eye(16)
        wanted = torch.linalg.solve(a[kept][:, kept], a[kept] @ old[expert].T).T
        new: Any = slim.get_parameter("model.layers.1.mlp.experts.down_proj")[place].detach()
        assert torch.allclose(new, wanted, atol=1e-6)
        before = plain.get_parameter("model.layers.1.mlp.experts.down_proj")[place].detach()
        target = z @ old[expert].T
        errors = [float((target - z[:, kept] @ m.T).square().mean()) for m in (new, before)]
        assert errors[0] < errors[1]


def test_an_expert_that_no_token_reaches_is_left_alone() -> None:
    model: Any = tiny_lm("gpt_oss", dtype=torch.float64)
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[2] = -1e9
    space = rlprune.trace(model, tokens(), verify=False)
    inner = [g.name for g in space.groups].index("model.layers.0.mlp.experts")
    cache = LanguageCalibration(Text(), space, model, recovery=RecoveryConfig())
    scores = IMPORTANCES["obs"].function(cache)
    assert scores[inner - 1].argmin() == 2
    assert scores[inner - 1][2] == 0
    widths = space.widths.copy()
    widths[inner] = 5
    plan = make_plan(space, importance=scores, widths=widths)
    slim, plain = prune(model, plan), prune(model, plan)
    cache.reconstruction(RecoveryConfig(), scores)(slim, plan)
    new, old = (m.model.layers[0].mlp.experts for m in (slim, plain))
    assert torch.allclose(new.down_proj[2], old.down_proj[2], atol=1e-6)
    assert not torch.allclose(new.down_proj[1], old.down_proj[1], atol=1e-3)
    # An expert with a bias gets the intercept of its regression.
    assert not torch.allclose(new.down_proj_bias[1], old.down_proj_bias[1], atol=1e-6)
