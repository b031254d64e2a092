"""How candidates compute while they are scored; what is kept for good never does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..utils.pytrees import Nest, map_tensors


@dataclass(frozen=True)
class ScoringFormat:
    """Number formats and layout of a scored candidate; the default is the dense model's own.

    ``weights`` is the format that all weights are cast to when the candidate is cut (None: theirs); ``autocast`` the
    format of its matrix products and convolutions, whose weights stay as they are (None: theirs); ``channels_last``
    whether the weights of two-dimensional convolutions lie with their channels last, which the activations follow;
    ``folded`` whether batch norms are folded into convolutions once the candidate is recovered.
    """

    weights: torch.dtype | None = None
    autocast: torch.dtype | None = None
    channels_last: bool = False
    folded: bool = False

    def put_on(self, model: nn.Module) -> nn.Module:
        """A model that was cut in this format's ``weights``, changed in place to compute in it; returns it.

        Its floating-point outputs are those of the weights' format again.
        """
        if self.channels_last:
            for module in model.modules():
                if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                    module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        if self.autocast is not None:
            hooks = _Autocast(self.autocast)
            model.register_forward_pre_hook(hooks.enter)
            model.register_forward_hook(hooks.leave, always_call=True)
        return model

    def named(self, own: torch.dtype) -> str:
        """The format in words, for a dense model in the format ``own``."""
        number = str(self.autocast or self.weights or own).removeprefix("torch.")
        further = {"channels last": self.channels_last, "batch norms folded": self.folded}
        return ", ".join([number, *(what for what, given in further.items() if given)])


class _Autocast:
    """Hooks around a model's forward pass: torch's autocast is on inside it, no matter who calls the model.

    A wrapper in the place of ``forward`` would hold the model that holds it, and a candidate's memory would wait for
    the garbage collector.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._open: list[torch.autocast] = []

    def enter(self, model: nn.Module, inputs: object) -> None:
        parameter = next(model.parameters(), None)
        context = torch.autocast("cpu" if parameter is None else parameter.device.type, self._dtype)
        context.__enter__()
        self._open.append(context)

    def leave(self, model: nn.Module, inputs: object, outputs: Nest) -> Nest:
        self._open.pop().__exit__(None, None, None)
        return map_tensors(self._widened, outputs)

    def _widened(self, tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype == self._dtype else tensor
