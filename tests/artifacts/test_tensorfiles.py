"""Checkpoints written as a stream are what safetensors reads, and sizes of shards are read."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlprune.artifacts import safetensors as tensorfiles
from rlprune.errors import ConfigError


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=8),
    most=st.integers(1, 400),
    kind=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
def test_streamed_files_are_what_safetensors_reads(
    shapes: list[list[int]], most: int, kind: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    tensors = {f"t{i}": torch.randn(shape).to(kind) for i, shape in enumerate(shapes)}
    entries = {name: tensorfiles.entry_of(tensor) for name, tensor in tensors.items()}
    tensorfiles.write_checkpoint(folder, entries, lambda names: ((n, tensors[n]) for n in names), most)
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= safetensors.torch.load_file(path)
    assert found.keys() == tensors.keys()
    read = dict(tensorfiles.TensorFiles(folder).read())
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and torch.equal(read[name], tensor)
        assert found[name].dtype == tensor.dtype
    for names in tensorfiles.split(entries, most):
        assert len(names) == 1 or sum(entries[n].nbytes for n in names) <= most


def test_sizes_are_read() -> None:
    assert tensorfiles.parse_size("5GB") == 5 * 10**9 and tensorfiles.parse_size("1.5 KiB") == 1536
    assert tensorfiles.parse_size(7) == 7
    for wrong in ("", "GB", "-1", "5 TB", "0"):
        with pytest.raises(ConfigError, match="max_shard_size"):
            tensorfiles.parse_size(wrong)
