"""Models as one file: how they are called while they are exported, what their tensors are named, how files are checked.

Inputs and outputs are any nests (`utils.pytrees`). The batch stays free where the exporter can follow it, else the file
takes one sample at a time; whatever was written is run on random inputs against PyTorch before it is kept.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArtifactError
from ..utils import pytrees
from ..utils.onnx_files import silent_exporter, why_not_exported
from ..utils.pytrees import Inputs
from ..utils.unfinished import fresh_folder

CHECKED_BATCHES = (1, 2, 5)
TOLERANCE = 1e-4  # of the largest output; other runtimes sum in another order, in float32
_PLAIN = (tuple, list, dict, Tensor, type(None), bool, int, float, str)

Runner = Callable[[Inputs, Mapping[str, Tensor]], list[Tensor]]
"""Runs a file: gets a model's inputs, and the tensors in them by name; returns the outputs in their order."""


@dataclass(frozen=True)
class Call:
    """How a model is called: example inputs, and whether the number of samples in them is free."""

    inputs: Inputs
    free: bool

    @property
    def args(self) -> tuple[Any, ...]:
        if isinstance(self.inputs, dict):
            return ()
        return self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)

    @property
    def kwargs(self) -> dict[str, Any]:
        return self.inputs if isinstance(self.inputs, dict) else {}

    def dynamic_shapes(self, model: nn.Module) -> Any:
        """What ``torch.export`` is told of the batch; None where it is fixed."""
        if not self.free:
            return None
        count, batch = pytrees.batch_size(self.inputs), torch.export.Dim("batch")

        def spec(value: object) -> Any:
            if isinstance(value, Tensor):
                return {0: batch} if value.ndim and value.shape[0] == count else None
            if isinstance(value, Mapping):
                return {key: spec(item) for key, item in value.items()}
            return type(value)(map(spec, value)) if isinstance(value, (tuple, list)) else None

        if self.kwargs:
            return {key: spec(item) for key, item in self.kwargs.items()}
        specs = tuple(map(spec, self.args))
        kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
        return (specs,) if kinds[:1] == [inspect.Parameter.VAR_POSITIONAL] else specs


Writer = Callable[[nn.Module, Call, Path], None]
Reader = Callable[[Path], Runner]


def named_inputs(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of a model's inputs by name: its parameters' names, ``input`` for a single tensor."""
    if isinstance(inputs, Tensor):
        return {"input": inputs}
    if isinstance(inputs, dict):
        return dict(named(inputs, ""))
    parameters = list(inspect.signature(model.forward).parameters.values())
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    found: dict[str, Tensor] = {}
    for number, value in enumerate(inputs if isinstance(inputs, tuple) else (inputs,)):
        found |= named(value, known[number] if number < len(known) else f"input_{number}")
    return found


def named(value: object, name: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a nest in the order of torch's pytrees: keys, fields or numbers after the name of the whole."""
    items: Iterator[tuple[object, object]]
    if isinstance(value, Tensor):
        yield name or "output", value
        return
    if isinstance(value, Mapping):
        items = iter(value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = zip(value._fields, value, strict=True)
    elif isinstance(value, (tuple, list)):
        items, name = iter(enumerate(value)), name or "output"
    elif dataclasses.is_dataclass(value) and not isinstance(value, (type, nn.Module)):
        items = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    else:
        return
    for key, item in items:
        yield from named(item, f"{name}_{key}" if name else str(key))


def output_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """Names of the tensors that a model returns, none of them that of an input."""
    taken = named_inputs(model, inputs)
    with torch.no_grad():
        names = [name for name, _ in named(pytrees.call(model, inputs), "")]
    return [f"{name}_out" if name in taken else name for name in names]


def plain_outputs(model: nn.Module, inputs: Inputs) -> nn.Module:
    """The model, or one that gives its outputs as a dict of tensors where they come in a class of their own.

    A file must be readable where that class (a dataclass, an output of transformers) is not known.
    """
    with torch.no_grad():
        outputs = pytrees.call(model, inputs)
    if all(type(value) in _PLAIN or hasattr(value, "_fields") for value in _nodes(outputs)):
        return model

    def forward(self: nn.Module, *args: object, **kwargs: object) -> dict[str, Tensor]:
        return dict(named(self.get_submodule("model")(*args, **kwargs), ""))

    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    wrapper: nn.Module = type(type(model).__name__, (nn.Module,), {"forward": forward})()
    wrapper.add_module("model", model)
    return wrapper.eval()


def _nodes(value: object) -> Iterator[object]:
    yield value
    if isinstance(value, (tuple, list)):
        yield from (node for item in value for node in _nodes(item))
    elif type(value) is dict:
        yield from (node for item in value.values() for node in _nodes(item))


def random_inputs(example: Inputs, count: int, generator: torch.Generator) -> Any:
    """Inputs like the example with ``count`` samples: normal numbers, and the example's own where they are integers.

    Lists of samples are images: their numbers lie between 0 and 1.
    """
    own = pytrees.batch_size(example)

    def fill(value: Tensor, draw: Callable[..., Tensor]) -> Tensor:
        numbers = draw(value.shape, generator=generator)
        return numbers.to(value.dtype) if value.is_floating_point() else value

    def made(value: Any) -> Any:
        if isinstance(value, Tensor):
            batched = value.ndim and value.shape[0] == own
            return fill(value[torch.arange(count) % own] if batched else value, torch.randn)
        if isinstance(value, list) and len(value) == own:
            return [
                pytrees.map_tensors(lambda t: fill(t, torch.rand), value[number % own])
                for number in range(count)
            ]
        if isinstance(value, Mapping):
            return {key: made(item) for key, item in value.items()}
        return type(value)(map(made, value)) if isinstance(value, (tuple, list)) else value

    return made(example)


def export_model(
    model: nn.Module,
    example: Inputs,
    target: Path,
    write: Writer | Sequence[Writer],
    read: Reader,
) -> str:
    """Write, check and only then move a file into place; returns in words what is less than asked for.

    Args:
        example: one sample or several of the model's inputs.
        write: ways to write the file, the best first; each is tried with a free batch and with a single sample.

    Raises ArtifactError where nothing can be written whose outputs are those of PyTorch.
    """
    model = plain_outputs(model, example)
    writers = write if isinstance(write, Sequence) else [write]
    # A list of samples has as many tensors as samples: no exporter leaves that open.
    lists = any(isinstance(value, list) for value in [example, *Call(example, False).args])
    ways = [(writer, free) for free in ((False,) if lists else (True, False)) for writer in writers]
    first: ArtifactError | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with fresh_folder(target) as folder:
            fresh = folder / target.name
            for writer, free in ways:
                try:
                    _attempt(model, example, fresh, writer, read, free)
                except ArtifactError as error:
                    first = first or error
                    continue
                os.replace(fresh, target)
                return "" if free else f"takes one sample at a time: {_reason(first)}"
    except OSError as error:
        raise ArtifactError(f"{target}: cannot be written ({error.strerror or error})") from error
    assert first is not None
    raise first


def _reason(error: ArtifactError | None) -> str:
    return "its argument is a list" if error is None else f"with a free batch {error}"


def _attempt(model: nn.Module, example: Inputs, path: Path, write: Writer, read: Reader, free: bool) -> None:
    # Two samples: an exporter takes a size of 1 for a constant.
    sample = random_inputs(example, 2 if free else 1, torch.Generator().manual_seed(1))
    try:
        with torch.no_grad(), silent_exporter():
            write(model, Call(sample, free), path)
        _check(model, example, read(path), CHECKED_BATCHES if free else (1,))
    except (ArtifactError, OSError):
        raise
    except Exception as error:  # exporters raise whatever their many parts raise
        raise ArtifactError(
            f"export: {type(model).__name__} cannot be exported ({why_not_exported(error)})"
        ) from error


def _check(model: nn.Module, example: Inputs, runner: Runner, batches: Sequence[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in batches:
        inputs = random_inputs(example, size, generator)
        with torch.no_grad():
            wanted = dict(named(pytrees.call(model, inputs), ""))
        found = runner(inputs, named_inputs(model, inputs))
        if len(found) != len(wanted):
            raise ArtifactError(f"export: {len(found)} outputs where PyTorch gives {len(wanted)}")
        for (name, tensor), other in zip(wanted.items(), found, strict=True):
            _compare(name, tensor, other, size)


def _compare(name: str, wanted: Tensor, found: Tensor, size: int) -> None:
    if found.shape != wanted.shape:
        raise ArtifactError(
            f"export: {name!r} has shape {tuple(found.shape)} where PyTorch gives {tuple(wanted.shape)} "
            f"at batch size {size}"
        )
    if not wanted.numel():
        return
    apart = (found.double() - wanted.double()).abs().max()
    difference = float(apart / wanted.double().abs().max().clamp_min(1e-12))
    if not difference <= TOLERANCE:
        raise ArtifactError(
            f"export: outputs differ from PyTorch by {difference:.2g} of the largest one "
            f"(allowed {TOLERANCE:g}) at batch size {size}: {name!r}"
        )
