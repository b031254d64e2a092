"""Small networks with what image classifiers of the first generation do not have; each takes (N, 3, 16, 16)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


class Between(nn.Module):
    """A stem of 12 channels, something in the middle, and a head behind ``width`` channels."""

    def __init__(self, middle: nn.Module | None = None, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.middle = nn.Identity() if middle is None else middle
        self.last = nn.Conv2d(width, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.last(self.between(torch.relu(self.stem(x))))).mean((2, 3)))

    def between(self, x: Tensor) -> Tensor:
        return self.middle(x)


class Recurrent(nn.Module):
    """Convolutions that are read column by column, as in a CRNN."""

    def __init__(self, kind: type[nn.RNNBase], **options: int | bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=4, padding=1)
        self.recurrent = kind(6, 5, batch_first=True, **options)  # type: ignore[arg-type]
        width = int(options.get("proj_size") or 5) * (2 if options.get("bidirectional") else 1)
        self.mix, self.head = nn.Linear(width, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x)).mean(2).transpose(1, 2)
        return self.head(torch.relu(self.mix(self.recurrent(x)[0])))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, stride=4)
        self.place = nn.Parameter(torch.randn(1, 17, 12) * 0.1)
        self.token = nn.Parameter(torch.randn(1, 1, 12) * 0.1)
        self.norm = nn.LayerNorm(12)
        self.attention = self.made()
        self.up, self.down, self.head = nn.Linear(12, 10), nn.Linear(10, 12), nn.Linear(12, 3)

    def made(self) -> nn.Module:
        return nn.MultiheadAttention(12, 4, batch_first=True)

    def attend(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        x = x + self.attend(self.norm(x))
        return self.head((x + self.down(F.gelu(self.up(x))))[:, 0])


class OwnAttention(nn.Module):
    """Queries, keys and values of one linear layer, as timm writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 3
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, -1))


class OwnTransformer(Transformer):
    def made(self) -> nn.Module:
        return OwnAttention()

    def attend(self, x: Tensor) -> Tensor:
        return self.attention(x)


class Sizes(nn.Module):
    """Splits by sizes that it keeps in a list, as mixed convolutions do."""

    def __init__(self) -> None:
        super().__init__()
        self.splits = [5, 7]
        self.paths = nn.ModuleList([nn.Conv2d(n, 6, 3, padding=1) for n in self.splits])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([p(y) for p, y in zip(self.paths, x.split(self.splits, 1), strict=True)], 1)


class Halves(nn.Module):
    """Splits by a width that it keeps, and goes on with one half, as YOLO's C2f does."""

    def __init__(self) -> None:
        super().__init__()
        self.c = 6
        self.first, self.block = nn.Conv2d(12, 12, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.second = nn.Conv2d(18, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).split((self.c, self.c), 1))
        parts.append(torch.relu(self.block(parts[-1])))
        return self.second(torch.cat(parts, 1))


class Select(nn.Module):
    """Two paths weighted against each other by a softmax for each channel, as in selective kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList([nn.Conv2d(12, 12, k, padding=k // 2) for k in (1, 3)])
        self.squeeze, self.weigh = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([path(x) for path in self.paths], 1)
        weights = self.weigh(torch.relu(self.squeeze(both.sum(1).mean((2, 3), keepdim=True))))
        weights = weights.view(len(x), 2, weights.shape[1] // 2, 1, 1).softmax(1)
        return (both * weights).sum(1)


class Deformable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Conv2d(12, 18, 3, padding=1)
        self.deform = torchvision.ops.DeformConv2d(12, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.deform(x, self.offset(x))


class Film(nn.Module):
    """Scale and shift of every channel, predicted from the whole image (feature-wise linear modulation)."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Linear(12, 24)

    def forward(self, x: Tensor) -> Tensor:
        gamma, beta = self.condition(x.mean((2, 3))).chunk(2, 1)
        return x * (1 + gamma[..., None, None]) + beta[..., None, None]


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)


class Repeat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(2, 1)


class Pick(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.own(x), torch.index_select(x, 1, torch.tensor([3, 1, 0]))], 1)


class Scaled(nn.Module):
    """Per-channel numbers in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 2, 12).view(1, 12, 1, 1))
        self.register_buffer("blur", torch.rand(12, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x * self.scale, self.blur, padding=1, groups=x.shape[1])


class Branch(Between):
    """What runs depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.bright, self.dark = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 3, padding=1)
        self.is_bright = False

    def forward(self, x: Tensor) -> Tensor:
        self.is_bright = bool(x.mean() > 0)
        return super().forward(x)

    def between(self, x: Tensor) -> Tensor:
        return self.bright(x) if self.is_bright else self.dark(x)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=16, image_size=16,
        patch_size=4, num_labels=3,
    )  # fmt: skip
    return ViTForImageClassification(config)


def _frozen() -> nn.Module:
    return nn.Sequential(nn.Conv2d(12, 12, 3), torchvision.ops.FrozenBatchNorm2d(12))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "instance_norm": lambda: Between(nn.InstanceNorm2d(12, affine=True, track_running_stats=True)),
    "plain_instance_norm": lambda: Between(nn.InstanceNorm2d(12)),
    "group_norm": lambda: Between(nn.GroupNorm(4, 12)),
    "group_norm_of_channels": lambda: Between(nn.GroupNorm(12, 12)),
    "frozen_batch_norm": lambda: Between(_frozen()),
    "lstm": lambda: Recurrent(nn.LSTM),
    "lstm_of_two_ways_and_layers": lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "lstm_with_projection": lambda: Recurrent(nn.LSTM, proj_size=3),
    "gru": lambda: Recurrent(nn.GRU, bias=False),
    "rnn": lambda: Recurrent(nn.RNN),
    "multihead_attention": Transformer,
    "own_attention": OwnTransformer,
    "hugging_face_vit": _vit,
    "split_by_a_list": lambda: Between(Sizes()),
    "split_by_a_width": lambda: Between(Halves()),
    "selective_kernel": lambda: Between(Select()),
    "deformable_convolution": lambda: Between(Deformable()),
    "film": lambda: Between(Film()),
    "channel_shuffle": lambda: Between(Shuffle()),
    "pixel_shuffle": lambda: Between(nn.PixelShuffle(2), width=3),
    "repeat_interleave": lambda: Between(Repeat(), width=24),
    "index_select": lambda: Between(Pick(), width=15),
    "buffers": lambda: Between(Scaled()),
    "depthwise_with_multiplier": lambda: Between(nn.Conv2d(12, 24, 3, groups=12), width=24),
    "transposed_groups": lambda: Between(nn.ConvTranspose2d(12, 18, 3, groups=3), width=18),
    "circular_padding": lambda: Between(nn.Conv2d(12, 12, 3, padding=1, padding_mode="circular")),
    "gated_linear_unit": lambda: Between(nn.GLU(1), width=6),
    "branch": Branch,
}
