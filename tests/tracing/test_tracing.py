"""What `trace` finds, protects, refuses and leaves alone."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import warnings

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import rlprune
from helpers.nets import Residual, ResidualLayerNorm, build, example
from rlprune.errors import GraphError
from rlprune.pruning.space import fingerprint
from rlprune.tracing import trace
from rlprune.tracing.process import Limits, in_child
from rlprune.tracing.trace import UnusedModuleWarning


def names(space):
    return [g.name for g in space.groups]


def test_option_a_shortcuts_shift_the_channels():
    """Stage 1 has 4 channels, stage 2 has 8: unit j of stage 1 is channel j + 2 of stage 2 and j + 6 of stage 3."""
    space = rlprune.trace(build("cifar_resnet20"), example())
    streams = {g.name: g for g in space.groups if g.kind == "residual"}
    assert [(n, g.width) for n, g in streams.items()] == [
        ("conv1", 4),
        ("layer2.0.conv2", 4),
        ("layer3.0.conv2", 8),
    ]
    cut = next(c for c in space.cuts if c.tensor == "layer3.2.conv2.weight" and c.dim == 0)
    slots = space.axes[cut.axis].slots
    first = space.offsets[names(space).index("conv1")]
    assert slots[6:10].tolist() == [first, first + 1, first + 2, first + 3]
    assert (slots[:6] != first).all()


def test_model_is_left_as_it_was():
    net = build("Residual").train()
    net.a.weight.requires_grad_(False)
    net.norm.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    rlprune.trace(net, example())
    assert (
        net.training
        and not net.norm.training
        and not net.a.weight.requires_grad
        and net.b.weight.requires_grad
    )
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and not net.a._forward_hooks


def test_frozen_models_and_no_grad_are_traced_too():
    net = build("Residual").requires_grad_(False)
    with torch.no_grad():
        assert names(rlprune.trace(net, example())) == ["stem", "a"]


def test_ignore_takes_names_and_patterns():
    space = rlprune.trace(build("resnet18"), example(), ignore=("layer4", "layer1.*.conv1"))
    assert not any(n.startswith(("layer4", "layer1.0.conv1", "layer1.1.conv1")) for n in names(space))
    assert "ignored by 'layer4'" in space.protected["layer4.0.conv1"]
    with pytest.raises(GraphError, match=r"ignore: no layer matches 'layer5'.*layer"):
        rlprune.trace(build("resnet18"), example(), ignore=("layer5",))
    with pytest.raises(GraphError, match="one string"):
        rlprune.trace(build("resnet18"), example(), ignore="fc")


def test_classifier_outputs_are_protected():
    space = rlprune.trace(build("Residual"), example())
    assert space.protected == {"head": "output of the model"}


def test_norms_over_the_channels_protect_the_residual_width():
    space = rlprune.trace(ResidualLayerNorm(), torch.randn(2, 3, 5, 4))
    assert names(space) == ["up"]
    assert "normalises over its channels" in space.protected["stem"]


def test_channels_picked_by_their_numbers_are_protected():
    class Reversed(Residual):
        def forward(self, x):
            x = self.stem(x)
            x = x[:, torch.arange(7, -1, -1)]
            x = torch.relu(self.norm(self.a(x)))
            return self.head(self.b(x).mean((2, 3)))

    space = rlprune.trace(Reversed(), example(torch.float32), verify=False)
    assert names(space) == ["a", "b"]
    assert space.protected["stem"] == "aten.index.Tensor in Reversed picks them by their numbers"


def test_what_the_labels_miss_is_protected_by_the_proof():
    """Bounds written into the code would cut a slimmer model at another channel: the check finds it, the rest is cut."""

    class Turned(Residual):
        def forward(self, x):
            x = self.stem(x)
            x = torch.cat([x[:, 4:], x[:, :4]], 1)
            x = torch.relu(self.norm(self.a(x)))
            return self.head(self.b(x).mean((2, 3)))

    space = rlprune.trace(Turned(), example(torch.float32))
    assert names(space) == ["a", "b"]
    assert "masked dense" in space.protected["stem"] or "fails" in space.protected["stem"]


def test_channels_that_are_also_an_output_are_protected():
    class Features(Residual):
        def forward(self, x):
            features = self.stem(x)
            return self.head(self.b(self.norm(self.a(features))).mean((2, 3))), features

    space = rlprune.trace(Features(), example(torch.float32))
    assert names(space) == ["a", "b"]
    assert "output" in space.protected["stem"]


def test_weight_standardised_convolutions_are_protected():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            w = self.weight
            w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
            return nn.functional.conv2d(x, w, self.bias, padding=self.padding)

    net = Residual()
    net.b = Standardised(12, 8, 3, padding=1)
    space = rlprune.trace(net, example(torch.float32))
    assert "a" not in names(space)
    assert space.protected["a"] == "'b' (Standardised) reduces over its channels"


def test_tied_weights_are_protected():
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    net[2].weight = net[1].weight
    with pytest.raises(GraphError, match="no layer of Sequential can be pruned.*shares a parameter"):
        rlprune.trace(net, torch.randn(2, 4))


def test_unused_heads_are_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        net = torchvision.models.googlenet(init_weights=False, num_classes=4)
    with pytest.warns(UnusedModuleWarning, match="aux1, aux2"):
        space = rlprune.trace(net, torch.randn(1, 3, 32, 32))
    assert space.unused == ("aux1", "aux2")


def test_the_heads_of_an_attention_are_units_and_it_is_not_unused():
    class Attentive(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))

    with warnings.catch_warnings():
        warnings.simplefilter("error", UnusedModuleWarning)
        space = rlprune.trace(Attentive(), torch.randn(2, 5, 8))
    assert [(g.name, g.kind, g.width) for g in space.groups] == [
        ("attention", "attention", 2),
        ("up", "linear", 12),
    ]


def test_forward_errors_are_one_line():
    class Broken(nn.Module):
        def forward(self, x):
            raise ValueError("first line\nsecond line")

    with pytest.raises(
        GraphError, match="the forward pass of Broken failed on the example input: first line$"
    ):
        rlprune.trace(Broken(), torch.zeros(1, 3))
    with pytest.raises(GraphError, match="the forward pass of Residual failed"):
        rlprune.trace(Residual(), torch.zeros(1, 4, 8, 8))


def test_time_limit_stops_an_endless_trace():
    started = time.monotonic()
    with pytest.raises(GraphError, match="took more than 0.2 s"):
        rlprune.trace(torchvision.models.densenet121(), torch.randn(1, 3, 32, 32), max_seconds=0.2)
    assert time.monotonic() - started < 20


def test_memory_limit_stops_a_growing_loop():
    def grow():
        hoard = []
        while True:
            hoard.append(bytearray(2**22))
            for i in range(len(hoard[-1]) // 4096):
                hoard[-1][i * 4096] = 1

    with pytest.raises(GraphError, match="growing took more than 0.3 GiB"):
        in_child(Limits("growing", 60, 0.3), grow)


def test_limits_reach_one_long_call_and_a_bare_except():
    def stubborn():
        while True:
            with contextlib.suppress(BaseException):
                time.sleep(60)

    started = time.monotonic()
    with pytest.raises(GraphError, match="stubborn took more than 0.3 s"):
        in_child(Limits("stubborn", 0.3, 100), stubborn)
    assert time.monotonic() - started < 20


def test_a_process_that_dies_is_one_line():
    with pytest.raises(GraphError, match=r"dying: its process died \(exit code -9\)"):
        in_child(Limits("dying", 60, 8), lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_what_a_process_says_comes_back():
    def work():
        warnings.warn("look", UnusedModuleWarning, stacklevel=1)
        return 7

    with pytest.warns(UnusedModuleWarning, match="look"):
        assert in_child(Limits("working", 60, 8), work) == 7
    with pytest.raises(GraphError, match="^wrong$"):
        in_child(Limits("failing", 60, 8), lambda: (_ for _ in ()).throw(GraphError("wrong")))
    with pytest.raises(GraphError, match="SystemExit"):
        in_child(Limits("leaving", 60, 8), lambda: sys.exit(3))


def test_a_long_trace_runs_in_a_process_of_its_own_and_finds_the_same(monkeypatch):
    here = rlprune.trace(build("cifar_resnet20"), example())
    monkeypatch.setattr(trace, "_LONG_PASS", 0.0)
    there = rlprune.trace(build("cifar_resnet20"), example())
    assert here.groups == there.groups and here.protected == there.protected
    assert here.cost(here.widths) == there.cost(there.widths)


def test_rounding_and_minimum_count_channels():
    space = rlprune.trace(build("Grouped"), example(), round_to=6)
    by_name = {g.name: g for g in space.groups}
    assert (by_name["grouped"].unit, by_name["grouped"].width, by_name["grouped"].step) == (3, 6, 2)
    assert by_name["last"].step == 6 and by_name["last"].minimum == 6
    widths = space.project(np.ones(len(space.groups)), 0.6)
    assert all(w % g.step == 0 or w == g.width for w, g in zip(widths, space.groups, strict=True))
    assert rlprune.trace(build("Grouped"), example(), minimum=5).groups[0].minimum == 2


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_example_inputs_may_be_a_tuple_or_a_dict(form):
    inputs = (example(),) if form == "tuple" else {"x": example()}
    assert names(rlprune.trace(build("Residual"), inputs)) == ["stem", "a"]


def test_macs_are_those_of_one_sample():
    one = rlprune.trace(build("Residual"), example()[:1])
    two = rlprune.trace(build("Residual"), example())
    assert one.dense_cost("macs") == two.dense_cost("macs")


def test_fingerprint_is_the_architecture_not_the_weights():
    other = build("Residual")
    with torch.no_grad():
        other.a.weight.mul_(2)
    assert fingerprint(other) == fingerprint(build("Residual"))
    assert fingerprint(build("Residual")) != fingerprint(build("Concatenation"))


def test_unit_costs_are_the_saving_of_one_unit():
    space = rlprune.trace(build("mobilenet_v3_small"), example())
    for metric in ("macs", "params"):
        saving = space.unit_costs(space.widths, metric)
        for g in range(len(space.groups)):
            less = space.widths.copy()
            less[g] -= 1
            assert saving[g] == space.dense_cost(metric) - space.cost(less, metric)


def test_space_after_a_cut_is_the_space_of_the_cut_model():
    net = build("cifar_resnet20")
    space = rlprune.trace(net, example())
    rng = np.random.default_rng(0)
    plan = rlprune.make_plan(
        space, importance=[rng.random(g.width) for g in space.groups], budget=0.6, distribution=np.ones(12)
    )
    slim = rlprune.prune(net, plan)
    derived, fresh = space.after(plan.kept), rlprune.trace(slim, example())
    assert derived.widths.tolist() == fresh.widths.tolist() and names(derived) == names(fresh)
    again = rlprune.make_plan(
        derived, importance=[rng.random(w) for w in derived.widths], budget=0.5, distribution=np.ones(12)
    )
    with torch.no_grad():
        a = rlprune.prune(slim, again)(example())
        b = rlprune.masked(slim, again)(example())
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
