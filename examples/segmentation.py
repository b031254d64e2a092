"""Segmentation: a small U-Net on made-up shapes. State the task; score, loss and mIoU follow from it.

python examples/segmentation.py
"""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rlprune


def shapes(count: int, seed: int, side: int = 24) -> TensorDataset:
    """Noise with a square (class 1) or a bar (class 2) in it, and the class of each pixel."""
    generator = torch.Generator().manual_seed(seed)
    images, maps = (
        0.6 * torch.rand(count, 1, side, side, generator=generator),
        torch.zeros(count, side, side).long(),
    )
    for i in range(count):
        label = int(torch.randint(1, 3, (), generator=generator))
        high, wide = (7, 7) if label == 1 else (4, 12)
        top, left = (int(torch.randint(side - n, (), generator=generator)) for n in (high, wide))
        images[i, :, top : top + high, left : left + wide] += 0.4
        maps[i, top : top + high, left : left + wide] = label
    return TensorDataset(images, maps)


def two(channels_in: int, channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inside in (channels_in, channels):
        layers += [nn.Conv2d(inside, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down, self.bottom, self.up = two(1, width), two(width, 2 * width), two(3 * width, width)
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        beside = self.down(x)
        below = nn.functional.interpolate(self.bottom(nn.functional.max_pool2d(beside, 2)), scale_factor=2)
        return self.head(self.up(torch.cat([beside, below], dim=1)))


def main() -> None:
    torch.manual_seed(0)
    sizes = {"train": 300, "calibration": 60, "validation": 60, "test": 100}
    loaders = {
        name: DataLoader(shapes(count, seed), 20, shuffle=name == "train")
        for seed, (name, count) in enumerate(sizes.items())
    }
    model = UNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(6):
        for inputs, maps in loaders["train"]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), maps).backward()
            optimizer.step()
    result = rlprune.search(
        model.eval(), torch.zeros(1, 1, 24, 24), loaders=loaders, task="segmentation", budget="30%", evaluations=40,
        settings={"finish": {"epochs": 2, "lr": 0.01, "rules": False}, "search": {"baselines": []}},
    )  # fmt: skip
    rows = {row["method"]: row for row in result.table}
    dense, ours = rows["dense"], rows["ppo"]
    print(
        f"U-Net: {ours['macs'] / dense['macs']:.1%} of the MACs, test mIoU {ours['test']:.3f} before and "
        f"{ours['test_finetuned']:.3f} after the fine-tune (dense {dense['test_finetuned']:.3f})"
    )


if __name__ == "__main__":
    main()
