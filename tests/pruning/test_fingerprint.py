"""The same architecture has one fingerprint, however it is wrapped or copied."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torchvision import models

from rlprune.pruning.fingerprint import fingerprint
from tests.helpers.own_models import Tagger


def test_the_fingerprint_of_a_plain_model_stays_what_saved_folders_hold() -> None:
    assert fingerprint(Tagger()) == "98d7b29768faa312abe04cb7f614bb4e"


def test_copies_of_a_traced_graph_are_the_same_architecture() -> None:
    graph = torch.fx.symbolic_trace(models.resnet18(num_classes=5))
    assert (
        fingerprint(graph)
        == fingerprint(copy.deepcopy(graph))
        == fingerprint(copy.deepcopy(copy.deepcopy(graph)))
    )
    outer = nn.Sequential(graph, nn.ReLU())
    assert fingerprint(outer) == fingerprint(copy.deepcopy(outer)) != fingerprint(graph)


def test_a_compiled_model_is_the_model() -> None:
    model = Tagger()
    known = fingerprint(model)
    assert fingerprint(torch.compile(model)) == known
    model.stem = torch.compile(model.stem)
    assert fingerprint(model) == known
    model.stem = nn.Conv2d(3, 8, 5, padding=2)
    assert fingerprint(model) != known
