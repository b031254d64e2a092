"""Models of a user's own, in plain torch: what a process without rlprune imports as well."""

from __future__ import annotations

from dataclasses import dataclass

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


class _Body(nn.Module):
    """Two convolutions before two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3)
        self.head, self.side = nn.Conv2d(12, 3, 1), nn.Conv2d(12, 4, 1)

    def features(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class DictOut(_Body):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.features(x)
        return {"out": self.head(y), "aux": self.side(y)}


class TupleOut(_Body):
    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        y = self.features(x)
        return self.head(y), [self.side(y), y.mean((2, 3))]


@dataclass
class Found:
    boxes: Tensor
    labels: Tensor
    note: str = ""


class DataclassOut(_Body):
    def forward(self, x: Tensor) -> Found:
        y = self.features(x)
        return Found(self.head(y), self.side(y).argmax(1), "done")


class Masked(_Body):
    """A mask beside the image, the same name for an input and an output."""

    def forward(self, x: Tensor, mask: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"x": self.head(self.features(x * mask)) * scale}


class Words(nn.Module):
    """Token ids, with lengths of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        inside = torch.arange(ids.shape[1]) < lengths[:, None]
        hidden = torch.relu(self.body(self.words(ids))) * inside[..., None]
        return self.head(hidden.sum(1) / lengths[:, None])


class Detector(_Body):
    """A list of images, a dict for each; all images of one size, so that the number of boxes is known."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        y = self.features(torch.stack(images))
        return [
            {"boxes": b, "scores": s.amax((1, 2))} for b, s in zip(self.head(y), self.side(y), strict=True)
        ]


class OneSample(_Body):
    """Its reshape holds for a single sample only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)).reshape(1, 48)


class Crnn(nn.Module):
    """Convolutions over an image of a line, a recurrent layer over its columns, classes for each column."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.layer = nn.LSTM(12 * 4, 10, bidirectional=True, batch_first=True)
        self.head = nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.body(torch.relu(self.stem(x)))))
        y = nn.functional.max_pool2d(y, 2).permute(0, 3, 1, 2).flatten(2)
        return self.head(self.layer(y)[0])


class GroupNormNet(nn.Module):
    """A residual block with group norms, and one number for a regression."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.a, self.norm_a = nn.Conv2d(16, 24, 3, padding=1), nn.GroupNorm(6, 24)
        self.b, self.norm_b = nn.Conv2d(24, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = self.norm_b(self.b(torch.relu(self.norm_a(self.a(x)))))
        return self.head(torch.relu(x + y).mean((2, 3))).squeeze(1)
