"""RL-Pruner's Taylor score of filters, against the gradients of a network that is trained by hand."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rlprune
from rlprune.importance.gradient import taylor_filters


class Residual(nn.Module):
    """The filters of `first` and `second` are cut together; those of `third` are for themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.third(x + self.second(x)))
        return self.head(x.mean((2, 3)))


def test_filters_are_scored_by_their_own_weights() -> None:
    torch.manual_seed(0)
    model = Residual().double().eval()
    batches = [(torch.randn(5, 3, 8, 8).double(), torch.tensor([0, 1, 2, 1, 0])) for _ in range(2)]
    space = rlprune.trace(model, batches[0][0][:1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = taylor_filters(model, space, batches, F.cross_entropy)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.train()
    sum(F.cross_entropy(model(x), y) for x, y in batches).backward()
    own = {
        name: (layer.weight * layer.weight.grad).abs().flatten(1).sum(1).detach().numpy()
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d)
    }
    found = {g.units: s for g, s in zip(space.groups, scores, strict=True)}
    np.testing.assert_allclose(found[4], (own["first"] + own["second"]) / 2, rtol=1e-9)
    np.testing.assert_allclose(found[6], own["third"], rtol=1e-9)
