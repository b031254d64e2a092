"""GoogLeNet (Szegedy et al. 2014, arXiv 1409.4842, table 1) for small images: torchvision's modules, another stem."""

from __future__ import annotations

from torch import Tensor, nn

# For every inception module its outputs: 1x1, 3x3 reduced, 3x3, 5x5 reduced, 5x5, projected pooling.
_STAGES = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)
_STEM = 192


class CifarGoogLeNet(nn.Module):
    """Nine inception modules in three stages behind one 3x3 convolution; each stage halves the image first.

    Shapes: (N, channels, H, W) -> (N, classes). Any H, W of at least 8 works: the head pools globally.

    Args:
        width: factor on the channels of the paper; each count is rounded, and at least 1.
    """

    def __init__(self, width: float = 1.0, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        # Here, because every command that knows architectures by name would wait for torchvision otherwise.
        from torchvision.models.googlenet import BasicConv2d, Inception

        def scaled(count: int) -> int:
            return max(1, round(width * count))

        self.width = width  # of the dense model: pruning leaves it as it is
        self.stem = BasicConv2d(channels, scaled(_STEM), kernel_size=3, padding=1)
        into, stages = scaled(_STEM), []
        for modules in _STAGES:
            layers: list[nn.Module] = [nn.MaxPool2d(3, stride=2, ceil_mode=True)]
            for outputs in modules:
                sizes = [scaled(count) for count in outputs]
                layers.append(Inception(into, *sizes))
                into = sizes[0] + sizes[2] + sizes[4] + sizes[5]
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(into, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.pool(self.stages(self.stem(x))).flatten(1))
