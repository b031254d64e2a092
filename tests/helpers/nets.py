"""Small networks, one for each way in which channels can be tied together."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

from helpers.kinds import KINDS
from rlprune.vision.zoo import build_model


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.b = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.b(torch.relu(self.norm(self.a(x))))
        return self.head(x.mean((2, 3)))


class Concatenation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.b = nn.Conv2d(3, 10, 1)
        self.c = nn.Conv2d(16, 7, 3, padding=1)
        self.norm = nn.BatchNorm2d(23)
        self.head = nn.Linear(23, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.a(x), self.b(x)], 1)
        x = torch.relu(self.norm(torch.cat([x, torch.relu(self.c(x))], 1)))
        return self.head(x.mean((2, 3)))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 9, 3)
        self.depth = nn.Conv2d(9, 9, 3, groups=9)
        self.act = nn.PReLU(9)
        self.point = nn.Conv2d(9, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.point(self.act(self.depth(self.stem(x))))).mean((2, 3)))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3)
        self.grouped = nn.Conv2d(12, 18, 3, groups=3)
        self.norm = nn.BatchNorm2d(18)
        self.last = nn.Conv2d(18, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.grouped(torch.relu(self.stem(x)))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3)
        self.down = nn.Conv2d(10, 4, 1)
        self.up = nn.Conv2d(4, 10, 1)
        self.last = nn.Conv2d(10, 6, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        gate = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.head(torch.relu(self.last(x * gate)).mean((2, 3)))


class FlattenIntoLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, stride=2)
        self.hidden = nn.Linear(6 * 7 * 7, 11)
        self.norm = nn.BatchNorm1d(11)
        self.head = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.hidden(torch.relu(self.a(x)).flatten(1)))))


class SharedModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.shared(torch.relu(self.shared(x))))
        return self.head(x.mean((2, 3)))


class Gated(nn.Module):
    """Both halves of one layer meet again: their channels are one group, offset by half the width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, dim=1)
        return self.head((a * torch.sigmoid(b)).mean((2, 3)))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.up = nn.ConvTranspose2d(6, 5, 2, stride=2)
        self.last = nn.Conv2d(5, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.last(torch.relu(self.up(torch.relu(self.stem(x)))))).mean((2, 3)))


class LayerScale(nn.Module):
    """A parameter outside of any layer, along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.scale = nn.Parameter(torch.linspace(0.5, 2.0, 8).reshape(8, 1, 1))
        self.last = nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.last(torch.relu(self.stem(x)) * self.scale)).mean((2, 3)))


class ResidualLayerNorm(nn.Module):
    """A transformer-like block: the residual width crosses a LayerNorm, the hidden layer does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.mean(1))
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(x.mean(1))


def _tiny_densenet() -> nn.Module:
    return torchvision.models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=3)


SIZE = 16
OWN: dict[str, Callable[[], nn.Module]] = {
    cls.__name__: cls
    for cls in (
        Residual, Concatenation, Depthwise, Grouped, SqueezeExcite, FlattenIntoLinear, SharedModule, Gated,
        Transposed, LayerScale,
    )
}  # fmt: skip
NETS: dict[str, Callable[[], nn.Module]] = OWN | {
    "tiny_densenet": _tiny_densenet,
    "cifar_resnet20": lambda: build_model("cifar_resnet20", 10, 3, arguments={"width": 4}),
    "cifar_googlenet": lambda: build_model("cifar_googlenet", 5, 3, arguments={"width": 0.05}),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
}
# Torch-Pruning maps the zero-padded shortcut by position and loses the second half of a gate.
TORCH_PRUNING_IS_WRONG = {"cifar_resnet20", "Gated"}


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network with lively norm layers, in eval mode."""
    torch.manual_seed(0)
    net = (NETS | KINDS)[name]().to(dtype).eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


def example(dtype: torch.dtype = torch.float64, size: int = SIZE) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))
