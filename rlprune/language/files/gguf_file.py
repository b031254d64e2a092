"""Writing the GGUF file of a pruned language model, and reading it back.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the gguf package writes, quantises and reads
it. Weights are written one after the other, so that a second copy of the model is never in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from ...errors import ArtifactError, described
from ...utils.arrays import Floats32
from ...utils.files import replacing_path
from . import pretrained
from .gguf_layout import FileTensor, Layout, layout_of
from .gguf_vocabulary import Vocabulary, vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MARK = "rlprune.version"
"""The metadata field that marks a file written by rlprune."""
DTYPES: Mapping[str, tuple[Kind, gguf.LlamaFileType]] = {
    "f32": (Kind.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
"""{--dtype: the type of the matrices, and what the file calls itself}; vectors are float32, as llama.cpp has them."""
_LARGEST_HALF = 65504.0

Check = Callable[[Path, Layout], str]


@dataclass(frozen=True)
class WrittenFile:
    """A file that was written and read back; ``notes`` says in a line each what a user should know of it."""

    path: Path
    layout: Layout
    dtype: str
    notes: tuple[str, ...]


def default_dtype(slim: PreTrainedModel) -> str:
    """The 16-bit type that is nearest to the model's own: bf16 for bfloat16, f16 for all others."""
    return "bf16" if pretrained.one_dtype(slim) == "bfloat16" else "f16"


def write_gguf(
    slim: PreTrainedModel,
    path: Path,
    dtype: str,
    folder: Path,
    *,
    name: str = "",
    origin: Path | None = None,
    version: str = "",
    check: Check | None = None,
) -> WrittenFile:
    """Write a pruned language model as one GGUF file, read it back, and only then move it into place.

    Args:
        slim: the pruned model, on the CPU.
        dtype: a key of `DTYPES`.
        folder: where the tokenizer's files are.
        name: what the model is called in the file.
        origin: the dense model's own GGUF file, whose vocabulary is copied where it fits.
        version: of rlprune.
        check: looks at the file before it takes its place, and says in a line what it found; raises ArtifactError
            where the file is not to be kept.

    Raises ArtifactError: a family, plan or tokenizer that llama.cpp does not read, numbers that the type cannot hold,
    a file that does not read back.
    """
    layout = layout_of(slim)
    vocabulary = vocabulary_of(folder, layout.vocabulary, origin)
    kinds = {tensor.name: _kind(tensor, dtype) for tensor in layout.tensors}
    with replacing_path(path) as fresh, _one_line_errors(path, fresh):
        _write(fresh, layout, vocabulary, kinds, dtype, name, version)
        check_file(fresh, layout, kinds)
        checked = [f"checked: all {len(layout.tensors)} tensors read back by the gguf reader"]
        checked += [check(fresh, layout)] if check is not None else []
    notes = [f"architecture {layout.architecture.name}; vocabulary {vocabulary.source}", *layout.notes]
    return WrittenFile(path, layout, dtype, (*notes, *_fallbacks(layout.tensors, kinds, dtype), *checked))


def is_ours(path: Path) -> bool:
    """Whether a file is a GGUF file that rlprune wrote."""
    try:
        return gguf.GGUFReader(path).get_field(MARK) is not None
    except (OSError, ValueError, IndexError, KeyError):
        return False


def _kind(tensor: FileTensor, dtype: str) -> Kind:
    """The type of one tensor: matrices whose rows are no whole blocks of 32 stay in float16, as llama-quant does it."""
    kind = DTYPES[dtype][0]
    if len(tensor.shape) < 2:
        return Kind.F32
    block = gguf.GGML_QUANT_SIZES[kind][0]
    return Kind.F16 if tensor.shape[-1] % block else kind


def _fallbacks(tensors: Sequence[FileTensor], kinds: Mapping[str, Kind], dtype: str) -> list[str]:
    # A single column is what stands in for a dropped part; no setting makes it longer.
    odd = [t for t in tensors if t.shape[-1] > 1 and len(t.shape) > 1 and kinds[t.name] != DTYPES[dtype][0]]
    if not odd:
        return []
    count = sum(len(t.shape) > 1 for t in tensors)
    return [
        f"{len(odd)} of {count} matrices stay in f16: their rows are no multiple of 32 ({odd[0].name}: "
        f"{odd[0].shape[-1]}); prune.runtime=llama.cpp or prune.round_to=32 keeps them whole"
    ]


@contextlib.contextmanager
def _one_line_errors(path: Path, fresh: Path) -> Iterator[None]:
    """Errors of a line that name the file by its place, not by where it is written."""
    try:
        yield
    except ArtifactError as error:
        raise type(error)(str(error).replace(str(fresh), str(path))) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"--to gguf: {path}: cannot be written ({described(error)})") from error


def _write(
    path: Path,
    layout: Layout,
    vocabulary: Vocabulary,
    kinds: Mapping[str, Kind],
    dtype: str,
    name: str,
    version: str,
) -> None:
    writer = gguf.GGUFWriter(path, layout.architecture.name)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name or "pruned model")
        writer.add_file_type(DTYPES[dtype][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_string(MARK, version or "unknown")
        layout.add_to(writer)
        vocabulary.add_to(writer)
        for tensor in layout.tensors:
            kind = kinds[tensor.name]
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind) if kind == Kind.Q8_0 else tensor.shape
            size, length = gguf.GGML_QUANT_SIZES[kind]
            count = int(np.prod(tensor.shape)) // size * length
            stored = np.dtype(np.uint8) if kind == Kind.Q8_0 else np.dtype(np.float32)
            writer.add_tensor_info(tensor.name, shape, stored, count, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in layout.tensors:
            writer.write_tensor_data(_encoded(tensor, kinds[tensor.name]))
    finally:
        writer.close()


def _encoded(tensor: FileTensor, kind: Kind) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    values = _values(tensor)
    if kind == Kind.F16 and float(np.abs(values).max(initial=0.0)) > _LARGEST_HALF:
        raise ArtifactError(
            f"--to gguf: {tensor.name!r} holds numbers beyond float16's; use --dtype bf16 or f32"
        )
    return gguf.quantize(values, kind)


def _values(tensor: FileTensor) -> Floats32:
    """A tensor's numbers as float32."""
    made: Tensor = tensor.make()
    if not bool(torch.isfinite(made).all()):
        raise ArtifactError(f"--to gguf: {tensor.name!r} holds NaN or infinite values")
    values: Floats32 = made.detach().float().contiguous().numpy()
    return values


def check_file(path: Path, layout: Layout, kinds: Mapping[str, Kind]) -> None:
    """Read a file by the gguf reader and compare every size and tensor with what was to be written.

    Raises ArtifactError: a field or tensor that is missing or differs; quantised numbers may differ by what half a step
    and the step's own rounding to float16 allow.
    """
    reader = gguf.GGUFReader(path)
    own = layout.architecture.name
    for key, wanted in (
        ("attention.head_count", layout.query_heads),
        ("attention.head_count_kv", layout.kv_heads),
        ("feed_forward_length", layout.neurons),
    ):
        entry = reader.get_field(f"{own}.{key}")
        found = None if entry is None else entry.contents()
        if found != (list(wanted) if layout.architecture.per_layer else wanted[0]):
            raise ArtifactError(f"{path}: {own}.{key} reads back as {found}, not {list(wanted)}")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    if set(stored) != {tensor.name for tensor in layout.tensors}:
        name = sorted(set(stored) ^ {tensor.name for tensor in layout.tensors})[0]
        raise ArtifactError(f"{path}: the tensor {name!r} was not to be written, or is missing")
    for tensor in layout.tensors:
        data, kind = stored[tensor.name].data, stored[tensor.name].tensor_type
        numbers = gguf.dequantize(data, kind).reshape(tensor.shape)
        _check_tensor(path, tensor.name, _values(tensor), numbers, kinds[tensor.name])


def _check_tensor(path: Path, name: str, wanted: Floats32, found: Floats32, kind: Kind) -> None:
    if kind == Kind.Q8_0:
        blocks = np.abs(wanted).reshape(-1, 32)
        # The step is the largest number / 127, kept in float16: half a step, and 127 times its rounding.
        step = blocks.max(axis=1, keepdims=True) / 127
        allowed = step * (0.5 + 127 * 2**-11) + 127 * 2.0**-25
        same = bool((np.abs(wanted - found).reshape(-1, 32) <= allowed).all())
    elif kind == Kind.BF16:
        same = np.array_equal(torch.from_numpy(wanted.copy()).bfloat16().float().numpy(), found)
    else:
        same = np.array_equal(wanted.astype(np.float16 if kind == Kind.F16 else np.float32), found)
    if not same:
        raise ArtifactError(f"{path}: the tensor {name!r} does not read back as it was written")
