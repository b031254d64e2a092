"""The formats that candidates of a model of images may be scored in."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ConfigError
from ..pruning.space import PruningSpace
from ..workloads.base import Workload
from ..workloads.scoring_format import ScoringFormat
from .detection import Detection

# Multiply-accumulates of an image below which a candidate's forward passes are no bottleneck, and another layout costs
# more than it saves (ResNet-20 at 8 x 8 pixels has 2.5 million, at 32 x 32 pixels 41 million).
LEAST_MACS = 20e6


def scoring_formats(workload: Workload, space: PruningSpace, wanted: str) -> list[ScoringFormat]:
    """Formats by ``score.dtype``, the surest one last; see `ModelAdapter.scoring_formats`.

    ConfigError for bfloat16 where the model cannot have it.
    """
    first = next(workload.model.parameters(), None)
    device = workload.device.type
    single = first is not None and first.dtype == torch.float32
    large = single and "macs" in space.costs and space.dense_cost("macs") >= LEAST_MACS
    two_dimensional = any(isinstance(module, nn.Conv2d) for module in workload.model.modules())
    channels_last = large and two_dimensional
    # A folded norm's offset would be rounded to bfloat16, for every image alike: ranks suffer from that.
    sure = ScoringFormat(channels_last=channels_last and device == "cpu", folded=large)
    fast = ScoringFormat(autocast=torch.bfloat16, channels_last=channels_last)
    obstacle = _obstacle(workload, first, device)
    if wanted == "bfloat16":
        if obstacle is not None:
            raise ConfigError(f"score.dtype: no bfloat16 {obstacle}; allowed here: auto, float32")
        return [fast]
    return [fast, sure] if wanted == "auto" and large and obstacle is None else [sure]


def _obstacle(workload: Workload, first: nn.Parameter | None, device: str) -> str | None:
    """Why candidates cannot be scored in bfloat16, if so."""
    if first is None or first.dtype != torch.float32:
        kind = "no parameters" if first is None else f"{str(first.dtype).removeprefix('torch.')} weights"
        return f"for a model with {kind}, only float32 is cast"
    if device not in ("cpu", "cuda"):
        return f"on device {device!r}"
    if isinstance(workload.task_type, Detection):
        return "for task 'detection', whose boxes are computed in float32"
    return None
