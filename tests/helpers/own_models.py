"""Models of a user's own, in plain torch: what a process without rlprune imports as well."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Tagger(nn.Module):
    """A convolutional classifier with a tied pair of layers and group norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(self.body(x)).mean((2, 3)))


class TwoInputs(nn.Module):
    """An image and a vector, two outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 8, 3, padding=1)
        self.vector = nn.Linear(4, 8)
        self.joint = nn.Linear(8, 6)
        self.first, self.second = nn.Linear(6, 2), nn.Linear(6, 3)

    def forward(self, image: Tensor, vector: Tensor) -> dict[str, Tensor]:
        joined = torch.relu(self.image(image)).mean((2, 3)) + torch.relu(self.vector(vector))
        joint = torch.relu(self.joint(joined))
        return {"first": self.first(joint), "second": self.second(joint)}
