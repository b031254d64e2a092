"""Which Python attributes count channels: those of known layers, and those whose values show up in operations."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from ..pruning.attributes import get_size
from ..utils.arrays import Ints
from ..utils.torch_internals import BATCH_OR_INSTANCE_NORM, CONVOLUTION
from .graph import MIXERS, Size, is_depthwise
from .layers import ChannelPad

if TYPE_CHECKING:
    from .flow import ChannelFlow

# Whole numbers of modules that say something else, even where they equal a number of channels by chance.
_NO_COUNT = re.compile(
    r"kernel|patch|window|stride|padding|dilation|img|image|resolution|grid|pool|depth|classes|num_layers|seq|"
    r"max_|position|head_dim|attention_head_size|key_dim|training|scale_factor|ratio|drop|num_patches|token"
)

_KNOWN = (
    *MIXERS,
    BATCH_OR_INSTANCE_NORM,
    *(nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.RNNBase, nn.Embedding, nn.PReLU, nn.MultiheadAttention),
    ChannelPad,
)


def found_sizes(
    model: nn.Module, flow: ChannelFlow, classes_of: Callable[[Ints], Ints], stays: Callable[[Ints], bool]
) -> tuple[Size, ...]:
    """The attributes of all modules that follow the number of channels; ``stays`` tells classes that are not cut.

    Those of torch's own layers are known. Others are guessed: they hold a number that an operation inside of the module
    gave to a dimension of channels. Where several dimensions have that number, each that may be cut is a choice.
    """
    modules = dict(model.named_modules())
    found: dict[tuple[str, str], Size] = {}
    for name, module in modules.items():
        for path, labels in _known(name, module, flow):
            if labels is not None and _holds(module, path, len(labels)):
                found[name, path] = Size(name, path, classes_of(labels), True)
    guesses: dict[tuple[str, str], list[Ints]] = defaultdict(list)
    lists = {(name, path) for name, path, _ in _split_lists(flow, modules)}
    for name, path, labels in [*_split_lists(flow, modules), *_guessed(flow, modules)]:
        if (name, path) not in found and _holds(modules[name], path, len(labels)):
            guesses[name, path].append(classes_of(labels))
    for (name, path), several in guesses.items():
        free = {c.tobytes(): c for c in several if len(np.unique(c)) > 1 and not stays(c)}
        if free:
            choices = tuple(free.values())
            read = (name, path) in lists or (name, path) in flow.read or "head" in path
            found[name, path] = Size(name, path, choices[0], False, choices, read)
    for name, path, labels in _timm(model, flow, modules):
        if _holds(modules[name], path, len(labels)):
            found[name, path] = Size(name, path, classes_of(labels), True)
    return tuple(found.values())


def _split_lists(flow: ChannelFlow, modules: dict[str, nn.Module]) -> Iterator[tuple[str, str, Ints]]:
    """(module, path, labels) of lists of sizes that a split took."""
    for name, sizes, pieces in flow.splits:
        for path in lists_of(modules[name], sizes):
            for i, labels in enumerate(pieces):
                yield name, f"{path}[{i}]", labels


def _guessed(flow: ChannelFlow, modules: dict[str, nn.Module]) -> Iterator[tuple[str, str, Ints]]:
    """(module, path, labels) of attributes that may count these labels, the likeliest first."""
    given = [(name, labels) for name, _, labels in flow.sizes]
    ways = {"in": list(flow.entered.items()), "out": list(flow.left.items()), "": given}
    for way, seen in ways.items():
        for name, labels in [*seen, *(item for w, several in ways.items() if w != way for item in several)]:
            if not isinstance(modules[name], _KNOWN):
                for path in numbers_of(modules[name], len(labels)):
                    if _way(path) == way:
                        yield name, path, labels


def _way(path: str) -> str:
    """Whether an attribute's name says that it counts what comes in or what goes out."""
    words = path.lower().split("_")
    return (
        "in"
        if {"in", "input", "inp"} & set(words)
        else "out"
        if {"out", "output", "oup"} & set(words)
        else ""
    )


def _known(name: str, module: nn.Module, flow: ChannelFlow) -> Iterator[tuple[str, Ints | None]]:
    """What torch's own layers store."""
    weight = f"{name}.weight".lstrip(".")

    def row(parameter: str, dim: int) -> Ints | None:
        use = flow.uses.get((f"{name}.{parameter}".lstrip("."), dim))
        return use.labels if use is not None and use.roles else None

    if isinstance(module, CONVOLUTION):
        yield "in_channels", flow.inputs.get(weight)
        yield "out_channels", flow.outputs.get(weight)
        if is_depthwise(module):
            yield "groups", flow.inputs.get(weight)
    elif isinstance(module, nn.Linear):
        yield "in_features", row("weight", 1)
        yield "out_features", row("weight", 0)
    elif isinstance(module, BATCH_OR_INSTANCE_NORM):
        yield "num_features", flow.entered.get(name)
    elif isinstance(module, nn.GroupNorm):
        labels = flow.entered.get(name)
        yield "num_channels", labels
        if labels is not None:
            yield "num_groups", labels[:: module.num_channels // module.num_groups]
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) == 1:
        yield "normalized_shape", row("weight", 0)
    elif isinstance(module, nn.PReLU) and module.num_parameters > 1:
        yield "num_parameters", row("weight", 0)
    elif isinstance(module, ChannelPad):
        before, after = flow.pads.get(name, (None, None))
        yield "before", before
        yield "after", after
    elif isinstance(module, nn.Embedding):
        yield "embedding_dim", row("weight", 1)
    elif isinstance(module, nn.MultiheadAttention):
        packed = module.in_proj_weight is not None
        rows = row("in_proj_weight" if packed else "q_proj_weight", 0)
        heads = module.num_heads * module.head_dim
        yield "num_heads", None if rows is None else rows[: heads : module.head_dim]
        for path, weight_of in (("embed_dim", "q"), ("kdim", "k"), ("vdim", "v")):
            yield path, row("in_proj_weight" if packed else f"{weight_of}_proj_weight", 1)
    elif isinstance(module, nn.RNNBase):
        yield "input_size", row("weight_ih_l0", 1)
        hidden = row("weight_ih_l0", 0)
        yield "hidden_size", None if hidden is None else hidden[: module.hidden_size]


def _holds(module: nn.Module, path: str, size: int) -> bool:
    """Whether there is such a size to set."""
    try:
        return get_size(module, path) == size
    except LookupError:
        return False


def lists_of(module: nn.Module, sizes: tuple[int, ...]) -> Iterator[str]:
    """Attributes that are lists of these whole numbers."""
    for path, value in vars(module).items():
        if not path.startswith("_") and isinstance(value, (list, tuple)) and tuple(value) == sizes:
            yield path


def numbers_of(module: nn.Module, size: int) -> Iterator[str]:
    """Attributes that are this whole number."""
    for path, value in vars(module).items():
        if type(value) is int and value == size and not path.startswith("_") and not _NO_COUNT.search(path):
            yield path


def _timm(
    model: nn.Module, flow: ChannelFlow, modules: dict[str, nn.Module]
) -> Iterator[tuple[str, str, Ints]]:
    """(module, path, labels) of what timm's models tell of themselves: ``feature_info`` lists the stages, and
    ``num_features`` of the model or ``in_features`` of its head is what a new classifier reads."""
    infos: Any = getattr(model, "feature_info", None)
    if isinstance(infos, (list, tuple)):
        for i, info in enumerate(infos):
            if isinstance(info, dict) and isinstance(info.get("num_chs"), int):
                labels = flow.left.get(str(info.get("module")))
                if labels is not None:
                    yield "", f"feature_info[{i}].num_chs", labels
    layers = [(n, m) for n, m in modules.items() if isinstance(m, MIXERS)]
    if layers and hasattr(model, "reset_classifier"):
        name, last = layers[-1]
        labels = flow.inputs.get(f"{name}.weight")
        if isinstance(last, nn.Linear) and labels is not None:
            for owner in {"", name.rpartition(".")[0]}:
                for path in ("num_features", "head_hidden_size", "in_features"):
                    yield owner, path, labels


def unnamed_splits(
    model: nn.Module, flow: ChannelFlow, classes_of: Callable[[Ints], Ints]
) -> Iterator[tuple[Ints, str]]:
    """Pieces whose sizes stand in the model's code: nothing can change them.

    Pieces of one class, such as the channels of a head, go as a whole and keep their size.
    """
    modules = dict(model.named_modules())
    for name, sizes, pieces in flow.splits:
        module = modules[name]
        if any(lists_of(module, sizes)) or (len(set(sizes)) == 1 and any(numbers_of(module, sizes[0]))):
            continue
        if all(len(np.unique(classes_of(labels))) == 1 for labels in pieces):
            continue
        where = f"{name!r} ({type(module).__name__})" if name else type(module).__name__
        for labels in pieces:
            yield labels, f"{where} splits them by sizes {sizes} that none of its attributes holds"
