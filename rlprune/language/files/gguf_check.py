"""A written GGUF file in llama.cpp compared with the model that it was written from, for the export's last line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from . import llama_cpp
from .gguf_layout import Layout
from .pretrained import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GENERATED = 16
_MOST_TOKENS = 64
_TEXT = (
    "A house is built from the ground up: first the walls, then the roof, and at the end 12 doors and 345 windows. "
    "Whoever moves in sees the colours of the rooms, but what keeps the rain out was laid long before."
)


def run_line(slim: PreTrainedModel, path: Path, dtype: str, folder: Path, layout: Layout) -> str:
    """What llama.cpp computes from a file against PyTorch, in a line; ArtifactError where that is something else."""
    if not llama_cpp.is_installed():
        return f"not run: llama.cpp is not installed; {llama_cpp.INSTALL}"
    ids, text = _short_text(folder, layout.vocabulary)
    most = max(2, layout.context // 2)
    if len(ids) > most:
        ids, text = ids[:most], ""
    # In bfloat16 PyTorch's own rounding would be taken for llama.cpp's. float() changes the model in place.
    slim = slim.float()
    try:
        return llama_cpp.compare(slim, path, dtype, ids, min(_GENERATED, most), text).line()
    except llama_cpp.WrongBuild as error:
        return f"not run: {error}"


def _short_text(folder: Path, vocabulary: int) -> tuple[list[int], str]:
    """Tokens to compare on: a short text's, or spread over the vocabulary where the folder has no tokenizer."""
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return [(7 + 31 * i) % vocabulary for i in range(_MOST_TOKENS)], ""
    ids = [int(i) for i in tokenizer(_TEXT, add_special_tokens=False)["input_ids"]]
    return (ids, _TEXT) if len(ids) <= _MOST_TOKENS else (ids[:_MOST_TOKENS], "")
