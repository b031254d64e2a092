"""A model run block by block: every batch is taken through one block before the next block sees the first of them.

What hooks see is what they see in a plain forward pass, to the bit and in the same order, but all of one block's comes
together, so that what is collected of it can be used up before the next block's is begun. The residual stream of every
batch waits in between. SparseGPT and GPTQ calibrate so (Frantar et al. 2022, arXiv 2210.17323).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...utils.memory import return_freed_memory
from ...utils.modes import evaluating
from ..families import UnsupportedModel, blocks_of

# Tokens of the first sequence on which the walk is compared with a plain pass.
_PROBE = 16


class Focus:
    """The tokens of the batch that is running which count in statistics of what layers read.

    Where targets leave tokens out (-100), they are those that some scored prediction can see: every token up to the one
    before the last scored one of its sequence. Prompts are read in use and count; what comes after the last answer has
    no effect on any score and does not.
    """

    def __init__(self) -> None:
        self._seen: Tensor | None = None

    def on(self, ids: Tensor, targets: object) -> None:
        """The batch that runs from now on: (B, L) ids, and targets."""
        self._seen = seen(ids, targets)

    def rows(self, x: Tensor) -> Tensor:
        """Of rows (B * L, ...), one for each token of the batch, those that count."""
        if self._seen is None or len(x) != self._seen.numel():
            return x
        return x[self._seen.flatten().to(x.device)]


def seen(ids: Tensor, targets: object) -> Tensor | None:
    """Which tokens (B, L) some scored prediction can see; None where targets leave out none, and for all of them."""
    if not isinstance(targets, Tensor) or targets.shape != ids.shape or targets.ndim != 2:
        return None
    scored = targets[:, 1:] != -100
    if bool(scored.all()):
        return None
    later = scored.flip(1).cumsum(1).flip(1) > 0  # a scored token at this place or behind it
    return torch.nn.functional.pad(later, (0, 1), value=False)


@dataclass(frozen=True)
class Part:
    """A piece of a model: its module's ``path``, and ``run``, which takes all batches through it, once, in order.

    ``look`` does so beforehand for the hooks' sake alone: the next part's inputs are still those that ``run`` gives.
    """

    path: str
    run: Callable[[], None]
    look: Callable[[], None]

    def holds(self, module: str) -> bool:
        """Whether a module lies in this part."""
        return not self.path or module.startswith(f"{self.path}.")


def parts(
    model: nn.Module, batches: Iterable[tuple[Tensor, object]], focus: Focus | None = None
) -> Iterator[Part]:
    """The blocks of a causal language model; each has to be run before the next one is taken.

    A model that has no known blocks, or whose blocks hand one another more than the residual stream, is one part: the
    plain pass. That is found out on the first few tokens. ``focus`` is told of every batch before it runs.
    """
    waiting = list(batches)
    paths = _paths(model)
    if not waiting or not paths or not _is_stream(model, paths, waiting[0][0]):
        whole = partial(run_blocks, model, waiting, focus)
        yield Part("", whole, whole)
        return
    with torch.no_grad(), evaluating(model):
        sample: list[object] = []
        streams = [_Stream.captured(model, paths, ids, sample) for ids, _ in waiting]
    for path in paths:
        move, look = (partial(_advance, model, path, streams, waiting, focus, stay) for stay in (False, True))
        yield Part(path, move, look)


def run_blocks(
    model: nn.Module, batches: Iterable[tuple[Tensor, object]], focus: Focus | None = None
) -> None:
    """Run the model over the inputs for its hooks' sake; a transformers model leaves out its LM head.

    The head costs a fifth of a small model's time and nothing that is cut reads it.
    """
    with torch.no_grad(), evaluating(model):
        for inputs, targets in batches:
            if focus is not None:
                focus.on(inputs, targets)
            _body(model, inputs)
    return_freed_memory()  # of the activations


def _body(model: nn.Module, ids: Tensor) -> None:
    body = getattr(model, "base_model", model)
    body(ids, **({"use_cache": False} if hasattr(model, "config") else {}))


def stream_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The residual stream in what a block returns."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def _paths(model: nn.Module) -> list[str]:
    try:
        return [block.path for block in blocks_of(model)]
    except (UnsupportedModel, AttributeError):  # a module of the user's own
        return []


def _advance(
    model: nn.Module,
    path: str,
    streams: Sequence[_Stream],
    batches: Sequence[tuple[Tensor, object]],
    focus: Focus | None,
    stay: bool,
) -> None:
    block = model.get_submodule(path)
    with torch.no_grad(), evaluating(model):
        for stream, batch in zip(streams, batches, strict=True):
            if focus is not None:
                focus.on(*batch)
            stream.through(block, path, stay)
    return_freed_memory()  # of the activations


class _Stream:
    """The residual stream of one batch, and what every block is called with in addition."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self._calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    @classmethod
    def captured(cls, model: nn.Module, paths: Sequence[str], ids: Tensor, sample: list[object]) -> _Stream:
        """The stream before the first block; all blocks' calls are noted while nothing is computed in them.

        ``sample`` holds what a block returned: it is filled the first time, by running one.
        """
        stream = cls()
        with contextlib.ExitStack() as stack:
            for path in paths:
                block = model.get_submodule(path)
                stack.enter_context(_replaced(block, stream._noting(path, block.forward, sample)))
            _body(model, ids)
        return stream

    def _noting(self, path: str, forward: Callable[..., Any], sample: list[object]) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if self.hidden is None:
                self.hidden = hidden
            if not sample:  # what a block returns apart from the stream, if anything
                sample.append(forward(*args, **kwargs))
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states" or args}
            self._calls[path] = args[1:], rest
            first = sample[0]
            return (hidden, *first[1:]) if isinstance(first, tuple) else hidden

        return note

    def through(self, block: nn.Module, path: str, stay: bool = False) -> None:
        """Run one block; what it was called with is let go, unless the stream is to ``stay`` where it is."""
        args, kwargs = self._calls[path]
        found = stream_of(block(self.hidden, *args, **kwargs))
        if not stay:
            del self._calls[path]
            self.hidden = found


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A module with another ``forward`` for a while; one that accelerate has put there comes back."""
    before = vars(module).get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _is_stream(model: nn.Module, paths: Sequence[str], ids: Tensor) -> bool:
    """Whether the walk gives the stream behind the last block that a plain pass gives, to the bit."""
    few = ids[:1, :_PROBE]
    plain: list[Tensor] = []
    last = model.get_submodule(paths[-1])
    handle = last.register_forward_hook(lambda module, args, output: plain.append(stream_of(output)))
    try:
        with torch.no_grad(), evaluating(model):
            _body(model, few)
    finally:
        handle.remove()
    try:
        with torch.no_grad(), evaluating(model):
            stream = _Stream.captured(model, paths, few, [])
            for path in paths:
                stream.through(model.get_submodule(path), path)
    except (TypeError, KeyError, AttributeError, RuntimeError):
        return False
    return bool(plain) and stream.hidden is not None and torch.equal(plain[0], stream.hidden)
