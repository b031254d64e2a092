"""What makes two models the same architecture, as one short hash."""

from __future__ import annotations

import hashlib

from torch import fx, nn

_COMPILED = "_orig_mod"
"""The name under which ``torch.compile`` keeps the module that it wraps."""


def fingerprint(model: nn.Module) -> str:
    """A hash of the architecture: names, shapes and layer types, not the values of the weights.

    A module and what ``torch.compile`` makes of it are the same. A traced graph (``torch.fx``) counts as such,
    whatever its class is called: each copy of one has a class of its own.
    """
    digest = hashlib.sha256()
    shapes = {_plain(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in sorted(shapes.items()):
        digest.update(f"{name}{shape};".encode())
    for name, module in model.named_modules():
        if _COMPILED not in dict(module.named_children()):
            kind = "GraphModule" if isinstance(module, fx.GraphModule) else type(module).__name__
            digest.update(f"{_plain(name)}:{kind};".encode())
    return digest.hexdigest()[:32]


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` has wrapped, or the model itself."""
    return dict(model.named_children()).get(_COMPILED, model)


def _plain(name: str) -> str:
    """The name that a tensor or a module has where nothing is compiled."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)
