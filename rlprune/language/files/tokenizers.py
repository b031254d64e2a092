"""The files of a tokenizer in the folder of a pruned language model."""

from __future__ import annotations

import shutil
from pathlib import Path

from ...errors import ArtifactError, described
from ...utils.files import read_json
from ...utils.values import show_value
from ...workloads.adapter import TokenizerSource

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""What prepares pictures for a model that reads them as well as text."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a file of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def why_unreadable(folder: Path, error: BaseException) -> str:
    """Why a folder's tokenizer could not be read: what is wrong with its settings, or what the libraries said."""
    path = folder / "tokenizer_config.json"
    try:
        settings = read_json(path) if path.exists() else {}
    except ArtifactError as damage:
        return str(damage)
    if not isinstance(settings, dict):
        return f"{path}: must be a table of settings, got {show_value(settings)}"
    if settings.get("auto_map"):
        return f"{path}: auto_map: the tokenizer is code that comes with it, which is never run"
    return described(error)


def write_tokenizer(folder: Path, tokenizer: TokenizerSource | None) -> None:
    """Write a tokenizer's files; ``tokenizer`` may also be a folder that has them, or None."""
    if isinstance(tokenizer, (str, Path)):
        for name in (*TOKENIZER_FILES, *PROCESSOR_FILES):
            if (Path(tokenizer) / name).is_file():
                shutil.copyfile(Path(tokenizer) / name, folder / name)
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)
        source = Path(str(getattr(tokenizer, "name_or_path", "")))
        for name in PROCESSOR_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
