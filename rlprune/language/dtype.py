"""The number format that candidates of a causal language model are scored in."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time

import torch
from torch import Tensor, nn

from ..errors import ArtifactError
from ..utils.cache import cache_folder
from ..utils.files import read_json, write_json_atomic

_FASTER = 1.3  # how much faster bfloat16 has to be to be taken


def scoring_dtype(model: nn.Module, wanted: str) -> torch.dtype:
    """Number format that candidates of ``model`` are scored in.

    ``auto`` takes bfloat16 on a CPU only where a timed product of the model's size says that it is
    faster; the answer is kept in the cache folder, so that a resumed run decides as the first did.
    """
    first = next(model.parameters())
    if wanted != "auto":
        return torch.float32 if wanted == "float32" else torch.bfloat16
    if first.dtype != torch.float32:
        return first.dtype
    if first.device.type == "cuda":
        capable = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if capable else first.dtype
    if first.device.type != "cpu":
        return first.dtype
    return torch.bfloat16 if _bf16_is_faster(model) else first.dtype


def _bf16_is_faster(model: nn.Module) -> bool:
    widest = max(
        (p for p in model.parameters() if p.ndim == 2 and p.shape[0] < 16 * p.shape[1]), key=Tensor.numel
    )
    about = [
        torch.__version__,
        torch.get_num_threads(),
        torch.backends.cpu.get_cpu_capability(),
        *widest.shape,
    ]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
    path = cache_folder() / "dtype" / f"{key}.json"
    with contextlib.suppress(ArtifactError, KeyError, TypeError):
        return bool(read_json(path)["bfloat16"])
    times = {dtype: _product_seconds(widest.detach(), dtype) for dtype in (torch.float32, torch.bfloat16)}
    faster = times[torch.bfloat16] * _FASTER < times[torch.float32]
    with contextlib.suppress(ArtifactError):  # the cache is a convenience
        write_json_atomic(path, {"bfloat16": faster, "about": about})
    return faster


def _product_seconds(weight: Tensor, dtype: torch.dtype) -> float:
    """Fastest of a few products of 256 rows with a weight."""
    right = weight.to(dtype).t()
    left = torch.ones(256, right.shape[0], dtype=dtype)
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return min(seconds)
