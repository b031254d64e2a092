"""A CNN of your own with DataLoaders: train, search, fine-tune, save, load again.

    python examples/own_cnn.py [FOLDER]

The data are the 1,797 handwritten digits of scikit-learn; nothing is downloaded.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import rlprune

FOLDER = sys.argv[1] if len(sys.argv) > 1 else "runs/own-cnn"


class Block(nn.Module):
    """Two convolutions around which the input is carried: their channels have to be cut together."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.second(self.norm(self.first(x)).relu())).relu()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 3, padding=1)
        self.one, self.down, self.two = Block(24), nn.Conv2d(24, 48, 3, stride=2, padding=1), Block(48)
        self.head = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(self.stem(x).relu())
        return self.head(self.two(self.down(x).relu()).mean((2, 3)))


def loaders() -> dict[str, DataLoader]:
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16).float().view(-1, 1, 8, 8), torch.tensor(labels))
    parts = random_split(data, [1000, 197, 300, 300], torch.Generator().manual_seed(0))
    names = ("train", "calibration", "validation", "test")
    return {
        name: DataLoader(part, batch_size=100, shuffle=name == "train") for name, part in zip(names, parts)
    }


def train(model: nn.Module, batches: DataLoader, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(epochs):
        for inputs, targets in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    data, model = loaders(), Net()
    train(model, data["train"], epochs=8)
    result = rlprune.search(
        model.eval(), torch.zeros(1, 1, 8, 8), loaders=data, budget="40%", evaluations=60, out=FOLDER, resume=True,
        settings={"finish": {"epochs": 3}},
    )  # fmt: skip
    print(result)
    again = rlprune.load(f"{FOLDER}/pruned", base=Net())
    inputs, _ = next(iter(data["test"]))
    assert torch.equal(again(inputs), result.model(inputs))
    rows = {row["method"]: row for row in result.table}
    dense, ours = rows["dense"], rows["ppo"]
    print(
        f"{ours['macs'] / dense['macs']:.1%} of the MACs, test accuracy {ours['test_finetuned']:.3f} "
        f"(dense {dense['test_finetuned']:.3f}); saved in {FOLDER}/pruned, report: {FOLDER}/report.html"
    )


if __name__ == "__main__":
    main()
