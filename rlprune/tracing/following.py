"""Run a model and follow its channels; see `flow`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..pruning.heads import as_head_attention, as_plain_attention, can_lose_heads
from ..utils.pytrees import call, tensors
from .channel_sets import ChannelSets
from .counting import without_fused_kernels
from .flow import ChannelFlow
from .graph import ExampleInputs
from .operators import FLEXIBLE, RULES
from .process import Limits


def followed(model: nn.Module, inputs: Sequence[ExampleInputs], batch: int, limits: Limits) -> ChannelFlow:
    """Run ``model`` (a copy of our own) on each of the inputs and follow its channels; the first one counts the costs.

    GraphError where a limit is reached.
    """
    flow = ChannelFlow(model, ChannelSets(), limits, RULES, FLEXIBLE, batch)
    for number, example in enumerate(inputs):
        flow.counts = number == 0
        with _opened(model), _watched(model, flow), torch.no_grad(), without_fused_kernels(), flow:
            outputs = call(model, example)
        flow.settle_channels()
        for tensor in tensors(outputs):
            for labels in flow.of(tensor):
                flow.fix(labels, "output of the model")
    _join_layers(model, flow)
    flow.even_grids()
    return flow


@contextlib.contextmanager
def _opened(model: nn.Module) -> Iterator[None]:
    """Attention of torch in plain operations, for a while."""
    attentions = [m for m in model.modules() if can_lose_heads(m)]
    encoders = [(m, m.use_nested_tensor) for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
    packed = [module.in_proj_weight is not None for module in attentions]
    for module in attentions:
        as_head_attention(module)
    for encoder, _ in encoders:
        encoder.use_nested_tensor = False
    try:
        yield
    finally:
        for module, one in zip(attentions, packed, strict=True):
            as_plain_attention(module, one)
        for encoder, nested in encoders:
            encoder.use_nested_tensor = nested


@contextlib.contextmanager
def _watched(model: nn.Module, flow: ChannelFlow) -> Iterator[None]:
    """Tell the flow which module runs, and what goes in and comes out of it."""
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, inputs: tuple[object, ...]) -> None:
        flow.stack.append((names[module], module))
        if inputs:
            flow.note_channels(flow.entered, names[module], inputs[0])

    def leave(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        flow.stack.pop()
        flow.note_channels(flow.left, names[module], output)

    handles: list[Any] = []
    for module in names:
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        del flow.stack[1:]
        for handle in handles:
            handle.remove()


def _join_layers(model: nn.Module, flow: ChannelFlow) -> None:
    """The layers and directions of a recurrent network have one number of hidden channels between them."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.RNNBase):
            continue
        rows = [
            flow.uses[f"{name}.{p}".lstrip("."), 0].labels
            for p, _ in module.named_parameters(recurse=False)
            if p.startswith(("weight_ih", "weight_hr")) and (f"{name}.{p}".lstrip("."), 0) in flow.uses
        ]
        if module.proj_size:
            # torch tells a projection by its width, which has to stay below the hidden one.
            flow.fixed += [
                (row, f"{name!r} ({type(module).__name__}) projects them to fewer") for row in rows
            ]
            continue
        for row in rows[1:]:
            flow.sets.join(rows[0], row)


def unused_modules(model: nn.Module, flow: ChannelFlow) -> tuple[str, ...]:
    """Names of the outermost modules whose parameters the forward pass in eval mode does not use."""
    idle: list[str] = []
    # By identity: a module may stand under several names, of which a forward pass knows one.
    used = {id(parameter) for name, parameter in model.named_parameters() if name in flow.order}
    for name, module in model.named_modules():
        if any(name.startswith(above + ".") for above in idle):
            continue
        parameters = list(module.parameters())
        if parameters and name and not any(id(p) in used for p in parameters):
            idle.append(name)
    return tuple(idle)
