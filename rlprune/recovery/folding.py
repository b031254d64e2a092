"""Batch norms folded into the convolutions before them, for models that are only judged."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from ..utils.modes import evaluating
from ..utils.pytrees import Inputs, call, tensors
from ..utils.torch_internals import copied

Pair = tuple[str, str]
"""Names of a convolution and of the batch norm that alone reads its output."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Largest change of an output, relative to the largest output, at which folding changes rounding alone.
_SAME = 1e-4


def foldable_pairs(model: nn.Module, example_inputs: Inputs) -> list[Pair]:
    """The pairs of a model that can be folded without any change but rounding; none where that cannot be shown.

    torch.fx follows the model; what it finds is proved on the example: a copy with all pairs folded has to give the
    same outputs.
    """
    try:
        with warnings.catch_warnings(), evaluating(model):
            warnings.simplefilter("ignore")
            pairs = _followed(model)
        if pairs and _proved(model, pairs, example_inputs):
            return pairs
    except Exception as error:  # a model of anybody's: fx refuses in many ways, and none of them matters here
        logging.getLogger(__name__).debug("no batch norm is folded: %s", error)
    return []


def fold(model: nn.Module, pairs: Sequence[Pair]) -> None:
    """Fold batch norms in place: their statistics and scales go into the convolution, and they do nothing any more."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, norm_name in pairs:
            layer, norm = modules[name], modules[norm_name]
            assert isinstance(layer, _CONVOLUTIONS) and isinstance(norm, _NORMS)
            assert norm.running_mean is not None and norm.running_var is not None
            scale = torch.rsqrt(norm.running_var + norm.eps)
            if norm.weight is not None:
                scale = scale * norm.weight
            offset = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
            offset = offset * scale if norm.bias is None else offset * scale + norm.bias
            layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
            layer.bias = nn.Parameter(offset, requires_grad=layer.weight.requires_grad)
            place, _, last = norm_name.rpartition(".")
            setattr(model.get_submodule(place), last, nn.Identity())


def _followed(model: nn.Module) -> list[Pair]:
    modules = dict(model.named_modules())
    nodes = list(torch.fx.symbolic_trace(model).graph.nodes)
    calls = Counter(str(node.target) for node in nodes if node.op == "call_module")
    pairs = []
    for node in nodes:
        if node.op != "call_module" or type(modules[str(node.target)]) not in _NORMS:
            continue
        norm, before = modules[str(node.target)], node.args[0] if node.args else None
        if not isinstance(before, torch.fx.Node) or before.op != "call_module" or norm.running_mean is None:
            continue
        once = calls[str(node.target)] == calls[str(before.target)] == 1
        if once and len(before.users) == 1 and type(modules[str(before.target)]) in _CONVOLUTIONS:
            pairs.append((str(before.target), str(node.target)))
    return pairs


def _proved(model: nn.Module, pairs: Sequence[Pair], example_inputs: Inputs) -> bool:
    folded = copied(model)
    fold(folded, pairs)
    with torch.no_grad(), evaluating(model), evaluating(folded):
        ours, theirs = list(tensors(call(folded, example_inputs))), list(tensors(call(model, example_inputs)))
    return len(ours) == len(theirs) > 0 and all(
        a.shape == b.shape and float((a - b).abs().max()) <= _SAME * float(b.abs().max())
        for a, b in zip(ours, theirs, strict=True)
    )
