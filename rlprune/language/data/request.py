"""What is asked of a text, and what a file gives: running text, or examples whose answers are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...workloads.base import SPLITS

DRAWN = 64  # calibration and validation sequences where no number is given


@dataclass(frozen=True)
class TextRequest:
    """What is asked of a text; sizes are sequences, None for the default (train, test: all that are left)."""

    files: Mapping[str, Any] = field(default_factory=dict)
    root: Path | None = None
    column: str = "text"
    length: int = 128
    test_length: int | None = None
    stride: int | None = None
    sizes: tuple[int | None, int | None, int | None, int | None] = (None, None, None, None)
    seed: int = 0
    download: bool = False
    format: str = "auto"
    answers_only: bool = True
    packing: bool = False
    prompt: str | None = None

    def size(self, split: str) -> int | None:
        return self.sizes[SPLITS.index(split)]


@dataclass(frozen=True)
class Text:
    """A text and what it is called in messages and reports."""

    source: str
    text: str = field(repr=False)


@dataclass(frozen=True)
class Example:
    """One row of a file: a conversation, or a prompt and its answer.

    ``line`` says where it stands in the file: "line 3". ``messages`` are {"role", "content"}; assistant turns from the
    one at ``first`` on are answers. Without messages the text is ``prompt`` and ``answer`` one behind the other.
    """

    line: str
    messages: tuple[Mapping[str, str], ...] = ()
    first: int = 0
    prompt: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Examples:
    """The examples of a file and the format that it was read in: "chat" or "instruction"."""

    source: str
    format: str
    rows: tuple[Example, ...] = field(repr=False)


Document = Text | Examples


@dataclass(frozen=True)
class Mixture:
    """Documents and, for each, the weight of its sequences in a split."""

    documents: Sequence[Document]
    weights: Sequence[float]

    @classmethod
    def of(cls, given: Document | Mixture) -> Mixture:
        """A document alone is a mixture of one."""
        return given if isinstance(given, Mixture) else cls((given,), (1.0,))

    @property
    def name(self) -> str:
        """What it is called: each source with its weight, or the only source."""
        if len(self.documents) == 1:
            return self.documents[0].source
        pairs = zip(self.documents, self.weights, strict=True)
        return ", ".join(f"{document.source} (weight {weight:g})" for document, weight in pairs)
