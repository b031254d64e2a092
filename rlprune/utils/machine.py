"""What a measurement ran on: device, threads, versions of the libraries."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = (
    "rlprune",
    "torch",
    "torchvision",
    "torch-pruning",
    "stable-baselines3",
    "gymnasium",
    "safetensors",
    "transformers",
)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def hardware() -> dict[str, Any]:
    """What figures were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or "cpu",
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "libraries": library_versions(),
    }


def processor() -> str:
    """Name of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
