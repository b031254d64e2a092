"""Memory that a search gives back, in fresh processes: what a library caches stays in this one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHAPES = """
import sys
import torch
from rlprune.utils.memory import bound_kernel_caches, return_freed_memory

if sys.argv[1] == "bounded":
    bound_kernel_caches()
torch.set_num_threads(1)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

def run(first, last):
    x = torch.zeros(64, 256, dtype=torch.bfloat16)
    for width in range(first, last):
        torch.nn.functional.linear(x, torch.zeros(width, 256, dtype=torch.bfloat16))
    return_freed_memory()
    return resident()

with torch.no_grad():
    before = run(300, 440)
    print(run(440, 740) - before)
"""


def grown(how: str) -> float:
    """MiB that 300 shapes of products in bfloat16 leave behind."""
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    words = [sys.executable, "-c", SHAPES, how]
    return float(subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_products_of_many_shapes_leave_nothing_behind() -> None:
    free = grown("free")
    assert grown("bounded") < max(10.0, 0.3 * free), free


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlprune.utils.memory import bound_kernel_caches

    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    bound_kernel_caches()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7" and os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"


def test_a_process_that_gets_a_language_model_bounds_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlprune.language.adapter import LanguageAdapter

    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    LanguageAdapter().keep_memory()
    assert os.environ["LRU_CACHE_CAPACITY"] == os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"


FAULTS = """
import resource
import sys
import torch
from rlprune.utils.memory import keep_large_blocks, settle_heap

def run(passes):
    size = 2**24 if sys.argv[1].startswith("large") else 3 * 2**18
    for _ in range(passes):
        [torch.ones(size) for _ in range(4)]  # alive together, like the outputs of neighbouring layers
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "settled":
    settle_heap()
if sys.argv[1] == "large and kept":
    keep_large_blocks()
before = run(3)
print(run(10) - before)
"""


def faults(how: str) -> int:
    """Pages of 4 KiB that ten passes ask the system for: a tensor of a pass has 768 of them, a large one 16,384."""
    words = [sys.executable, "-c", FAULTS, how]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    return int(subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's thresholds")
def test_no_pass_of_a_settled_process_pays_for_its_pages_again() -> None:
    assert faults("settled") < 768
    # Where the system lays out a young process's heap is chance, and some layouts are settled from the start.
    assert any(faults("young") > 768 for _ in range(6))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's thresholds")
def test_large_blocks_are_kept() -> None:
    assert faults("large") > 16_384  # glibc maps blocks above 32 MiB anew, whatever was freed before
    assert faults("large and kept") < 768
