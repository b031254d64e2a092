"""The files of a tokenizer in the folder of a pruned language model."""

from __future__ import annotations

import shutil
from pathlib import Path

from ...workloads.adapter import TokenizerSource

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a file of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def write_tokenizer(folder: Path, tokenizer: TokenizerSource | None) -> None:
    """Write a tokenizer's files; ``tokenizer`` may also be a folder that has them, or None."""
    if isinstance(tokenizer, (str, Path)):
        for name in TOKENIZER_FILES:
            if (Path(tokenizer) / name).is_file():
                shutil.copyfile(Path(tokenizer) / name, folder / name)
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)
