"""Models that another library has put adapters around or into."""

from __future__ import annotations

import sys

from torch import nn

from ..errors import GraphError


def refuse_adapters(model: object) -> None:
    """Raise GraphError where PEFT's adapters are not merged into a model's weights (PEFT is not imported for it).

    They are layers of their own next to those that would be cut: nothing that is traced or sliced there would hold.
    """
    if "peft" not in sys.modules or not isinstance(model, nn.Module):
        return
    for name, module in model.named_modules():
        if type(module).__module__.startswith(("peft.tuners.", "peft.peft_model", "peft.mixed_model")):
            where = f" ({name!r})" if name else ""
            raise GraphError(
                f"{type(model).__name__}: holds adapters of PEFT{where}; merge first: model = model.merge_and_unload()"
            )
