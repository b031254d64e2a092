"""Contract 2: the cut model equals the masked dense model, the cost formula, and Torch-Pruning's own result."""

from __future__ import annotations

import copy
import functools
import warnings

import numpy as np
import pytest
import torch
import torch_pruning as tp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rlprune
from helpers.kinds import KINDS
from helpers.nets import NETS, TORCH_PRUNING_IS_WRONG, build, example
from rlprune.pruning.plan import Plan
from rlprune.pruning.surgery import attributes
from rlprune.tracing.trace import count_macs

KINDS_OF_GROUPS = {"conv", "linear", "depthwise", "grouped", "residual", "attention"}


@functools.cache
def traced(name):
    net = build(name)
    return net, rlprune.trace(net, example(), verify=False)


def random_plan(space, seed):
    rng = np.random.default_rng(seed)
    widths = rng.integers(space.minimums, space.widths + 1)
    kept = tuple(np.sort(rng.permutation(g.width)[:w]) for g, w in zip(space.groups, widths, strict=True))
    return Plan(space, widths, kept)


def outputs(model):
    """What a model gives for the example, whatever it wraps it in."""
    found = model(example())
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.filterwarnings("ignore::rlprune.tracing.BranchWarning")
@pytest.mark.parametrize("name", [*NETS, *KINDS])
class TestArchitecture:
    """Every supported architecture passes these."""

    @settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(seed=st.integers(0, 2**31))
    def test_cut_equals_masked_dense(self, name, seed):
        net, space = traced(name)
        plan = random_plan(space, seed)
        with torch.no_grad():
            got = outputs(rlprune.prune(net, plan))
            wanted = outputs(rlprune.masked(net, plan))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9 * max(1.0, float(wanted.abs().max())))

    @settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(seed=st.integers(0, 2**31))
    def test_formula_equals_torchs_counter(self, name, seed):
        net, space = traced(name)
        plan = random_plan(space, seed)
        slim = rlprune.prune(net, plan)
        assert count_macs(slim, example()) == space.cost(plan.widths, "macs")
        assert sum(p.numel() for p in slim.parameters()) == space.cost(plan.widths, "params")

    def test_masking_is_not_trivial(self, name):
        """The masked model differs from the dense one: the equality above compares something."""
        net, space = traced(name)
        with torch.no_grad():
            masked = rlprune.masked(net, random_plan(space, 1))
            assert not torch.allclose(outputs(net), outputs(masked))

    def test_dense_model_is_untouched_and_shares_nothing(self, name):
        net, space = traced(name)
        before = copy.deepcopy(net.state_dict())
        slim = rlprune.prune(net, random_plan(space, 2))
        with torch.no_grad():
            for tensor in slim.state_dict().values():
                tensor.zero_()
        for key, tensor in net.state_dict().items():
            torch.testing.assert_close(tensor, before[key], rtol=0, atol=0)

    def test_full_width_is_the_dense_model(self, name):
        net, space = traced(name)
        slim = rlprune.prune(
            net,
            rlprune.make_plan(
                space, importance=[np.ones(g.width) for g in space.groups], widths=space.widths
            ),
        )
        assert attributes(space, random_plan(space, 3))
        with torch.no_grad():
            torch.testing.assert_close(outputs(slim), outputs(net), rtol=0, atol=1e-12)

    def test_cut_model_trains(self, name):
        net, space = traced(name)
        slim = rlprune.prune(net, random_plan(space, 4)).train()
        outputs(slim).sum().backward()
        idle = {n for n, p in slim.named_parameters() if p.grad is None}
        assert all(n.startswith(("bright.", "dark.")) for n in idle) if name == "branch" else not idle

    def test_equals_torch_pruning(self, name):
        if name in KINDS:
            return  # what Torch-Pruning does not follow, or maps otherwise: the masked dense model is the oracle
        net, space = traced(name)
        plan = random_plan(space, 5)
        if name in TORCH_PRUNING_IS_WRONG:
            # The list stays honest: whoever is on it really gets another network from Torch-Pruning.
            assert not runs_like(net, plan, lambda: pruned_by_torch_pruning(net, space, plan))
            return
        theirs = pruned_by_torch_pruning(net, space, plan).state_dict()
        ours = rlprune.prune(net, plan).state_dict()
        assert set(theirs) == set(ours)
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)

    def test_groups_are_well_formed(self, name):
        _, space = traced(name)
        assert len({g.name for g in space.groups}) == len(space.groups)
        for group in space.groups:
            assert 1 <= group.minimum <= group.width and group.width > 1 and 0 <= group.depth <= 1
            assert group.members and group.kind in KINDS_OF_GROUPS
        assert space.dense_cost("macs") == count_macs(traced(name)[0], example())


def pruned_by_torch_pruning(net, space, plan):
    """The same removed channels through Torch-Pruning's own groups, one root at a time."""
    twin = copy.deepcopy(net)
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(twin, example(), verbose=False)
        for group, offset, kept in zip(space.groups, space.offsets, plan.kept, strict=True):
            gone = np.setdiff1d(np.arange(group.width), kept) + offset
            root = group.name.split("#")[0]
            cut = next(c for c in space.cuts if c.tensor == f"{root}.weight" and not c.consumer)
            channels = np.nonzero(np.isin(space.axes[cut.axis].slots, gone))[0].tolist()
            if channels:
                module = twin.get_submodule(root)
                pruner = graph.get_pruner_of_module(module).prune_out_channels
                graph.get_pruning_group(module, pruner, channels).prune()
    return twin


def runs_like(net, plan, make):
    """Whether the network that ``make`` returns runs and gives the outputs of the masked dense model."""
    try:
        with torch.no_grad():
            return torch.allclose(make()(example()), rlprune.masked(net, plan)(example()))
    except Exception:  # Torch-Pruning fails in many ways: any of them means that it does not run
        return False


def test_plan_of_another_model_is_refused():
    _, space = traced("Residual")
    with pytest.raises(rlprune.GraphError, match="'a.weight': shape .* does not fit the traced model"):
        rlprune.prune(build("Concatenation"), random_plan(space, 0))
