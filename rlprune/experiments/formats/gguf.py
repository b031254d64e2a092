"""GGUF, which llama.cpp and what is built on it run: read back, and run where llama.cpp is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ... import __version__
from ...errors import ArtifactError
from ...language.files import llama_cpp
from ...language.files.pretrained import SOURCE, load_tokenizer, pretrained_model
from ...language.loading import PREFIX
from ...workloads.adapter import read_pruned
from .base import Export, Written, export_format, need_packages

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...language.files.gguf_layout import Layout

DTYPES = ("f32", "f16", "bf16", "q8_0")
_GENERATED = 16
_MOST_TOKENS = 64
_TEXT = (
    "A house is built from the ground up: first the walls, then the roof, and at the end 12 doors and 345 windows. "
    "Whoever moves in sees the colours of the rooms, but what keeps the rain out was laid long before."
)


@export_format("GGUF for llama.cpp (language models; extra `language`)", name="gguf", dtypes=DTYPES)
def _gguf(job: Export) -> Written:
    """Every tensor is read back; where llama-cpp-python is installed, logits and greedy tokens are compared as well."""
    need_packages(("gguf",), job.to, extra="language")
    from ...language.files.gguf_file import default_dtype, is_ours, write_gguf

    document = read_pruned(job.directory)
    if document["base"].get("source") != SOURCE:
        raise ArtifactError(f"--to gguf: {job.directory} holds no language model of transformers")
    slim = pretrained_model(job.adapter().load(job.directory, document, job.base))
    dtype = job.dtype or default_dtype(slim)
    target = job.file(".gguf" if job.dtype is None else f"-{dtype}.gguf", is_ours)
    name = str(document["base"].get("name") or "").removeprefix(PREFIX)
    written = write_gguf(
        slim,
        target,
        dtype,
        job.directory,
        name=f"{Path(name).stem or slim.config.model_type} pruned by rlprune",
        origin=_origin(name),
        version=__version__,
        check=lambda path, layout: _run(slim, path, dtype, job.directory, layout),
    )
    sizes = f"{dtype}, {_megabytes(target)}; the folder's weights {_weights_size(job.directory)}"
    return Written(target, notes=(sizes, *written.notes))


def _run(slim: PreTrainedModel, path: Path, dtype: str, folder: Path, layout: Layout) -> str:
    """What llama.cpp computes from a file beside PyTorch, in a line; ArtifactError where that is something else."""
    if not llama_cpp.is_installed():
        return f"not run: llama.cpp is not installed; {llama_cpp.INSTALL}"
    ids, text = _short_text(folder, layout.vocabulary)
    most = max(2, layout.context // 2)
    if len(ids) > most:
        ids, text = ids[:most], ""
    try:
        return llama_cpp.compare(slim, path, dtype, ids, min(_GENERATED, most), text).line()
    except llama_cpp.WrongBuild as error:
        return f"not run: {error}"


def _origin(name: str) -> Path | None:
    """The GGUF file that the dense model came from, where it is still there."""
    path = Path(name).expanduser()
    return path if path.suffix == ".gguf" and path.is_file() else None


def _short_text(folder: Path, vocabulary: int) -> tuple[list[int], str]:
    """Tokens to compare on: a short text's, or spread over the vocabulary where the folder has no tokenizer."""
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return [(7 + 31 * i) % vocabulary for i in range(_MOST_TOKENS)], ""
    ids = [int(i) for i in tokenizer(_TEXT, add_special_tokens=False)["input_ids"]]
    return (ids, _TEXT) if len(ids) <= _MOST_TOKENS else (ids[:_MOST_TOKENS], "")


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:,.1f} MB"


def _weights_size(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 1e6:,.1f} MB"
