"""Where texts come from, by name: files, hub data sets, Python's own help, and what is registered from outside.

How they are read, tokenised and split is `rlprune.language.data`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..config.names import DATA_SETS
from ..errors import ConfigError, DataError, near_miss
from ..utils.registry import Named, named_errors
from ..workloads.base import SPLITS
from .data.files import read_files
from .data.formats import document_of
from .data.request import DRAWN, Document, Examples, Mixture, Text, TextRequest
from .data.splits import IGNORED, TextData, TextSplit, split_text

__all__ = [
    "DRAWN",
    "IGNORED",
    "Text",
    "TextData",
    "TextRequest",
    "TextSplit",
    "help_texts",
    "is_text",
    "list_text",
    "load_text",
    "read_text",
    "split_text",
    "text_data",
]

_HUB_CHARACTERS = 20_000_000  # a hub data set may hold terabytes; this is plenty for calibration
for _name, _summary in {
    "help_texts": "Python's own help texts, about 700 kB of English; needs no file",
    "text": "your .txt, .jsonl or .json files (text, chats, instructions), by split: data.files",
    "hub:ID": "a Hugging Face data set, hub:ID or hub:ID:CONFIG; needs data.download (extra `language`)",
}.items():
    DATA_SETS[_name] = Named(_name, _summary, wing="language")


Read = Callable[[TextRequest], str | dict[str, str]]


def text_data(summary: str, *, name: str | None = None) -> Callable[[Read], Read]:
    """Register a text data set (a name for ``data.name``) under the name of the function below.

    The function takes a `TextRequest` (``root``, ``download``, ``seed``) and returns one text, which gets split, or
    {split: text} of all four splits; splits with one and the same text share it.

    Args:
        summary: one line for ``rlprune list data``.
        name: instead of the function's own.

    Raises (when applied):
        ConfigError: the name is taken, or the summary is missing.
    """
    return DATA_SETS.decorator(
        "text_data", summary, lambda own, function: Named(own, summary, function, "language"), name
    )


def list_text() -> list[tuple[str, str]]:
    """(name, one line) of every text data set."""
    DATA_SETS.complete()
    return [(name, found.summary) for name, found in DATA_SETS.items() if found.wing == "language"]


def is_text(name: str) -> bool:
    """Whether a data set's name stands for text."""
    return name.startswith("hub:") or name in [own for own, _ in list_text()]


def load_text(
    name: str, request: TextRequest, encode: Callable[[str], list[int]], tokenizer: Any = None
) -> TextData:
    """Read a text by name, tokenise it with ``encode`` and split it: `read_text`, then `split_text`."""
    return split_text(name, read_text(name, request), request, encode, tokenizer)


def read_text(name: str, request: TextRequest) -> dict[str, Document | Mixture]:
    """The documents of each split by a data set's name; splits may share some.

    Raises ConfigError for a wrong name or setting, DataError where a file is missing, broken or empty.
    """
    if name != "text" and request.files:
        raise ConfigError(f"data.files: only data.name 'text' reads files, not {name!r}")
    found = _read_by_name(name, request)
    if not any(isinstance(d, Examples) for given in found.values() for d in Mixture.of(given).documents):
        # Said, and of no effect on running text.
        for setting, value, default in (
            ("packing", request.packing, False),
            ("answers_only", request.answers_only, True),
            ("format", request.format, "auto"),
        ):
            if value != default and (setting, value) != ("format", "text"):
                raise ConfigError(
                    f"data.{setting}: is for conversations and instructions, and {name!r} gives running text; leave it "
                    "out"
                )
    return found


def _read_by_name(name: str, request: TextRequest) -> dict[str, Document | Mixture]:
    if name == "help_texts":
        return dict.fromkeys(SPLITS, Text("help_texts", help_texts()))
    if name == "text":
        return dict(read_files(request))
    if name.startswith("hub:") and name != "hub:ID":
        return dict(_hub(name, request))
    known = [own for own, _ in list_text()]
    if name in known and DATA_SETS.source(name) is not None:
        return dict(_registered(name, request))
    raise ConfigError(
        f"data.name {name!r}: a language model reads one of {', '.join(known)}{near_miss(name, known)}"
    )


def _registered(name: str, request: TextRequest) -> dict[str, Text]:
    """The text of each split that a registered function gives."""
    with named_errors("text_data", name):
        given = DATA_SETS.source(name)(request)
    if isinstance(given, str) and given:
        return dict.fromkeys(SPLITS, Text(name, given))
    if not isinstance(given, dict) or set(given) != set(SPLITS) or not all(given.values()):
        raise DataError(
            f"text_data {name!r}: must return a text, or {{split: text}} of {', '.join(SPLITS)}; none may be empty"
        )
    names = {text: f"{name} {split}" for split, text in given.items()}
    return {split: Text(names[text], text) for split, text in given.items()}


def help_texts() -> str:
    """The topics of Python's ``help()``, in the order of their names."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def _hub(name: str, request: TextRequest) -> dict[str, Document]:
    """A hub data set; its own splits where it has them, each read up to a fixed number of characters."""
    if not request.download:
        raise DataError(f"data.download: {name!r} comes from the internet; allow it with data.download=true")
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"data.name {name!r}: datasets is not installed; pip install 'rlprune[language]'")
    import datasets

    identity, _, subset = name.removeprefix("hub:").partition(":")
    try:
        there = datasets.load_dataset(identity, subset or None, streaming=True)
        parts = {"train": _pick(there, "train"), "validation": _pick(there, "validation", "train")}
        parts["calibration"], parts["test"] = parts["validation"], _pick(there, "test", "train")
        read = {part: _stream(name, there[part], part, request) for part in set(parts.values())}
    except DataError:
        raise
    except Exception as error:  # whatever the hub, its cache or a broken data set raise
        raise DataError(f"data.name {name!r}: cannot be fetched: {_line(error)}") from error
    return {split: read[parts[split]] for split in SPLITS}


def _pick(there: Mapping[str, object], *wanted: str) -> str:
    found = next((part for part in wanted if part in there), None)
    return found if found is not None else next(iter(there))


def _stream(name: str, rows: Iterable[Mapping[str, object]], part: str, request: TextRequest) -> Document:
    found, size = [], 0
    for number, row in enumerate(rows, start=1):
        found.append((f"row {number}", row))
        size += sum(len(str(value)) for value in row.values())
        if size > _HUB_CHARACTERS:
            break
    return document_of(f"{name} {part}", found, request, "data.name")


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
