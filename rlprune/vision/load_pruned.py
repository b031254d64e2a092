"""Loading the folder of a pruned model: what `rlprune.load` runs, and what a copy in the folder runs without rlprune.

The copy, ``load_pruned.py``, is put together by `artifacts.bundle` from the functions below and what they use.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..artifacts.bundle import bundle
from ..artifacts.documents import read_plan
from ..artifacts.pruned_model import example_of, load_pruned
from ..errors import ArtifactError
from ..utils.pytrees import call
from .rebuild import Rebuild, builder, rebuild

FILE = "load_pruned.py"
_HEAD = '''"""Loads the pruned model in this folder; needs torch, safetensors and the dense model's library, if any.

    from load_pruned import load
    model = load()                  # models of torchvision, timm and transformers, and rlprune's own
    model = load(base=MyModel())    # a model of your own: an instance of the dense one

`python load_pruned.py` loads it and prints the shapes of its outputs. Every tensor is checked against plan.json.
Written by rlprune from its own sources: the folder and this file need no rlprune.
"""'''
_TAIL = """if __name__ == "__main__":
    main()"""


def load(base: nn.Module | None = None, directory: str | Path | None = None) -> nn.Module:
    """The pruned model of a folder, on the CPU, in eval mode.

    Args:
        base: the dense model, where the folder cannot say how to build it; it is not changed.
        directory: the folder, by default the one that this file lies in.

    Raises ArtifactError: a file is missing, damaged, or fits neither the others nor the base.
    """
    folder = Path(__file__).parent if directory is None else Path(directory)
    return load_pruned(folder, read_plan(folder), base, rebuild)


def main() -> None:
    """Load the model of this file's folder and print the shapes that it gives for one sample."""
    try:
        document = read_plan(Path(__file__).parent)
        model = load()
        example = example_of(document)
    except ArtifactError as error:
        sys.exit(f"load_pruned.py: {error}")
    with torch.no_grad():
        outputs = call(model, example)
    parameters = sum(p.numel() for p in model.parameters())
    shapes = [tuple(tensor.shape) for tensor in _tensors(outputs)]
    print(f"{type(model).__name__}: {parameters:,} parameters; outputs for one sample: {shapes}")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (t for item in value.values() for t in _tensors(item))
    elif isinstance(value, (tuple, list)):
        yield from (t for item in value for t in _tensors(item))


def standalone(base: Mapping[str, object]) -> str:
    """The text of ``load_pruned.py`` for a folder whose dense model is described by ``base``."""
    return _text(builder(base))


@functools.cache
def _text(build: Rebuild) -> str:
    assert isinstance(build, FunctionType)
    # Only what builds this model travels, so that the file asks for no other library.
    return bundle([load, main, build], _HEAD, _TAIL, instead={"rebuild": build.__name__})
