"""A device that is not there: tensors that say they lie on it, compute on the CPU, and tell what a real one would mind.

They say "cuda:0", on a machine without a GPU. Inside of `watched()` every operation is seen: a mixed device and a
generator of another device are refused as CUDA refuses them, float64 as mps does where ``doubles`` is False; and every
operation for which a program has to wait for the device is counted, with the line of ours that asked for it. What the
numbers are is what the CPU gives; kernels, streams and memory of a GPU are not seen.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "cuda"
DEVICE = torch.device(NAME, 0)
OURS = str(Path(__file__).parents[2] / "rlprune")
# The result's size or a value is needed on the host before anything else can be asked for.
WAITS = {
    "_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "unique_consecutive", "_unique",
    "_unique2", "unique_dim",
}  # fmt: skip
aten = torch.ops.aten


class Mixed(RuntimeError):
    """Tensors or generators of two devices in one operation."""


class NoDoubles(TypeError):
    """float64 on a device that has none."""


class Ghost(Tensor):
    """A tensor on the device; ``inner`` holds its numbers on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> Ghost:
        shape = torch.empty(0, dtype=real.dtype, device="meta").as_strided(
            real.shape, real.stride(), real.storage_offset()
        )
        found: Ghost = Tensor._make_subclass(cls, shape)
        found.inner = real
        return found

    # To C++ it is a meta tensor: no thread and no stream of a device that is not there is asked for.
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return computed(func, args, kwargs or {})

    # With these two `nn.Module.to` swaps parameters instead of writing into `.data`, which cannot carry `inner`.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *_: Any) -> Ghost:
        return Ghost(parts["inner"])

    def __repr__(self, **_: Any) -> str:
        return f"Ghost({self.inner!r})"


@dataclass
class Watch(TorchDispatchMode):
    """Sees every operation of the block."""

    doubles: bool = True
    waits: Counter[str] = field(default_factory=Counter)
    """Line of ours and operation -> how often the host waited for the device."""
    operations: int = 0
    """All operations on the device."""

    def __post_init__(self) -> None:
        super().__init__()

    def __hash__(self) -> int:
        return id(self)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return computed(func, args, kwargs or {}, self)

    @property
    def total(self) -> int:
        return sum(self.waits.values())


@contextlib.contextmanager
def watched(doubles: bool = True) -> Iterator[Watch]:
    """The device is there while the block runs."""
    watch = Watch(doubles)
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(
        True
    )  # `torch.tensor(..., device=...)` is made on the CPU and then copied
    with contextlib.ExitStack() as stack:
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        for holder, name, answer in _pretend():
            stack.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, answer)
        stack.enter_context(watch)
        yield watch


def _pretend() -> Iterator[tuple[Any, str, Any]]:
    """What programs ask of CUDA beside tensors, and what a GPU of today answers."""
    state = torch.zeros(16, dtype=torch.uint8)
    answers = {
        "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "get_device_capability": lambda *_: (9, 0),
        "is_bf16_supported": lambda *_, **__: True,
        "get_rng_state": lambda *_: state, "set_rng_state": lambda *_: None, "synchronize": lambda *_: None,
        "is_initialized": lambda: True, "manual_seed_all": lambda *_: None, "manual_seed": lambda *_: None,
        "empty_cache": lambda: None, "get_device_name": lambda *_: "a ghost",
    }  # fmt: skip
    for name, answer in answers.items():
        yield torch.cuda, name, answer
    yield torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda _: None


def computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], watch: Watch | None = None) -> Any:
    """An operation, on the CPU, with its results on the device that a real one would give them."""
    leaves = tree_leaves((args, kwargs))
    ghosts = [leaf for leaf in leaves if isinstance(leaf, Ghost)]
    named = kwargs.get("device")
    there = bool(ghosts) if named is None else torch.device(named).type in (NAME, "meta")
    _refuse_mixture(func, args, leaves, there)
    if watch is not None and (ghosts or there):
        watch.operations += 1
        if _waits(func, args, there):
            watch.waits[f"{_line()}: {func.overloadpacket.__name__}"] += 1
    real_args, real_kwargs = tree_map_only(Ghost, lambda t: t.inner, (args, kwargs))
    if named is not None:
        real_kwargs["device"] = torch.device("cpu")
    real_kwargs.pop("pin_memory", None)
    with torch.no_grad():
        out = func(*real_args, **real_kwargs)
    same = {id(ghost.inner): ghost for ghost in ghosts}

    def on_device(tensor: Tensor) -> Tensor:
        if id(tensor) in same:
            return same[id(tensor)]
        if watch is not None and not watch.doubles and tensor.dtype == torch.float64:
            raise NoDoubles(f"{func}: float64 on a device that has none, asked for by {_line()}")
        return Ghost(tensor)

    return tree_map_only(Tensor, on_device, out) if there else out


def _refuse_mixture(func: Any, args: tuple[Any, ...], leaves: list[Any], there: bool) -> None:
    """What CUDA refuses; a number on the CPU may stand beside tensors of a device, and copies go between devices."""
    generator = next((leaf for leaf in leaves if isinstance(leaf, torch.Generator)), None)
    if generator is not None and there != (generator.device.type == NAME):
        raise Mixed(f"{func}: the generator is on {generator.device}, asked for by {_line()}")
    name = func.overloadpacket.__name__
    if not there or name in ("copy_", "_to_copy", "_copy_from"):
        return
    first = args[:1] if name in ("index", "index_put_", "index_put", "_index_put_impl_") else (args, leaves)
    foreign = [
        leaf
        for leaf in tree_leaves(first)
        if isinstance(leaf, Tensor) and not isinstance(leaf, Ghost) and leaf.ndim > 0
    ]
    if foreign:
        raise Mixed(f"{func}: a tensor {tuple(foreign[0].shape)} is on the CPU, asked for by {_line()}")


def _waits(func: Any, args: tuple[Any, ...], there: bool) -> bool:
    name = func.overloadpacket.__name__
    if name in WAITS:
        return True
    if name == "_to_copy":
        return isinstance(args[0], Ghost) and not there
    if name == "copy_":
        return isinstance(args[1], Ghost) and not isinstance(args[0], Ghost)
    if name in ("index", "index_put_", "_index_put_impl_"):
        return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in tree_leaves(args[1]))
    return False


def _line() -> str:
    """The innermost line of rlprune that is being run."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(OURS):
            return f"{frame.filename.removeprefix(OURS + '/')}:{frame.lineno}"
    return "a test"
