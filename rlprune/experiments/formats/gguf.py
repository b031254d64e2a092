"""GGUF, which llama.cpp and what is built on it run: read back, and run where llama.cpp is installed."""

from __future__ import annotations

from pathlib import Path

from ... import __version__
from ...errors import ArtifactError
from ...language.files.pretrained import SOURCE, pretrained_model
from ...language.loading import PREFIX
from ...workloads.adapter import read_pruned
from .base import Export, Written, export_format, need_packages

DTYPES = ("f32", "f16", "bf16", "q8_0")


@export_format("GGUF for llama.cpp (language models; extra `language`)", name="gguf", dtypes=DTYPES)
def _gguf(job: Export) -> Written:
    """Every tensor is read back; where llama-cpp-python is installed, logits and greedy tokens are compared as well."""
    need_packages(("gguf",), job.to, extra="language")
    from ...language.files.gguf_check import run_line
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
        check=lambda path, layout: run_line(slim, path, dtype, job.directory, layout),
    )
    sizes = f"{dtype}, {_megabytes(target)}; the folder's weights {_weights_size(job.directory)}"
    return Written(target, notes=(sizes, *written.notes))


def _origin(name: str) -> Path | None:
    """The GGUF file that the dense model came from, where it is still there."""
    path = Path(name).expanduser()
    return path if path.suffix == ".gguf" and path.is_file() else None


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:,.1f} MB"


def _weights_size(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 1e6:,.1f} MB"
