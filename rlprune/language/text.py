"""Text as token sequences: plain files, JSONL, hub data sets and Python's own help, in disjoint splits.

A text is tokenised whole. The test split is its own text (or the head of a shared one) read in order,
with the strided windows of transformers' perplexity guide where a stride is set; the other splits are
disjoint blocks of ``length`` tokens that a seed draws: calibration from one end of the shuffled blocks,
validation from the other, train from what is left between them, so that the size of one changes no other.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.names import DATA_SETS
from ..errors import ConfigError, DataError, near_miss
from ..utils.registry import Named, named_errors
from ..workloads.base import SPLITS

IGNORED = -100
"""Target of a token that is context only: the index that torch's cross-entropy leaves out."""

DRAWN = 64  # calibration and validation sequences where no number is given
_HUB_CHARACTERS = 20_000_000  # a hub data set may hold terabytes; this is plenty for calibration
_POOL = ("train", "calibration", "validation")
for _name, _summary in {
    "help_texts": "Python's own help texts, about 700 kB of English; needs no file",
    "text": "your .txt or .jsonl files, by split: data.files",
    "hub:ID": "a Hugging Face data set, hub:ID or hub:ID:CONFIG; needs data.download (extra `language`)",
}.items():
    DATA_SETS[_name] = Named(_name, _summary, wing="language")


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

    def size(self, split: str) -> int | None:
        return self.sizes[SPLITS.index(split)]


@dataclass(frozen=True)
class TextSplit:
    """Windows of one token stream.

    ``tokens`` (T,) int64; window i is ``tokens[starts[i] : starts[i] + length]`` (the last one may be
    shorter where windows overlap); the first ``overlap`` tokens of every window but the first were scored
    in the window before and are context only. ``source`` names the text.
    """

    source: str
    tokens: Tensor
    starts: tuple[int, ...]
    length: int
    overlap: int = 0

    def __len__(self) -> int:
        return len(self.starts)

    def window(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) and targets (B, L) of the windows ``start`` to ``stop``, all of one length."""
        ids = torch.stack([self.tokens[s : s + self.length] for s in self.starts[start:stop]])
        if not self.overlap:
            return ids, ids
        targets = ids.clone()
        targets[1 if start == 0 else 0 :, : self.overlap] = IGNORED
        return ids, targets

    def cuts(self, size: int, stop: int | None = None) -> list[tuple[int, int]]:
        """The windows up to ``stop`` as batches (from, to) of at most ``size`` windows of one length each."""
        count = len(self) if stop is None else min(stop, len(self))
        short = self.starts[count - 1] + self.length > len(self.tokens) if count else False
        whole = count - 1 if short else count
        cuts = [(i, min(i + size, whole)) for i in range(0, whole, size)]
        return [*cuts, (whole, count)] if short else cuts

    @property
    def scored(self) -> int:
        """Number of tokens that a loss over all windows counts (a window's very first token has no context)."""
        seen = [min(s + self.length, len(self.tokens)) - s for s in self.starts]
        return sum(n - (self.overlap if self.overlap and i else 1) for i, n in enumerate(seen))


@dataclass(frozen=True)
class TextData:
    """A tokenised text and its four disjoint splits."""

    name: str
    splits: dict[str, TextSplit]
    seed: int = 0

    def largest_id(self) -> int:
        """The largest token id of all splits."""
        return max(int(s.tokens.max()) for s in self.splits.values())


@dataclass(frozen=True)
class Text:
    """A text and what it is called in messages and reports."""

    source: str
    text: str = field(repr=False)


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


def load_text(name: str, request: TextRequest, encode: Callable[[str], list[int]]) -> TextData:
    """Read a text by name, tokenise it with ``encode`` and split it: `read_text`, then `split_text`."""
    return split_text(name, read_text(name, request), request, encode)


def read_text(name: str, request: TextRequest) -> dict[str, Text]:
    """The text of each split by a data set's name; splits may share one.

    Raises ConfigError for a wrong name or setting, DataError where a file is missing, broken or empty.
    """
    if name != "text" and request.files:
        raise ConfigError(f"data.files: only data.name 'text' reads files, not {name!r}")
    if name == "help_texts":
        return dict.fromkeys(SPLITS, Text("help_texts", help_texts()))
    if name == "text":
        return _files(request)
    if name.startswith("hub:") and name != "hub:ID":
        return _hub(name, request)
    known = [own for own, _ in list_text()]
    if name in known and DATA_SETS.source(name) is not None:
        return _registered(name, request)
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


def split_text(
    name: str, texts: Mapping[str, Text], request: TextRequest, encode: Callable[[str], list[int]]
) -> TextData:
    """Tokenise each text whole and split it; DataError where it is too short for the splits."""
    splits: dict[str, TextSplit] = {}
    for source in dict.fromkeys(text.source for text in texts.values()):
        users = [split for split in SPLITS if texts[split].source == source]
        tokens = torch.tensor(encode(texts[users[0]].text), dtype=torch.int64)
        end = 0
        if "test" in users:
            test = splits["test"] = _in_order(source, tokens, request, shared=len(users) > 1)
            end = min(test.starts[-1] + test.length, len(tokens))
        drawn = [split for split in _POOL if split in users]
        if drawn:
            splits |= _drawn(source, tokens, end, drawn, request)
    return TextData(name, {split: splits[split] for split in SPLITS}, request.seed)


def help_texts() -> str:
    """The topics of Python's ``help()``, in the order of their names."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def _files(request: TextRequest) -> dict[str, Text]:
    """The text of each split; splits without a file of their own share one of the others'."""
    for split, value in request.files.items():
        if split not in SPLITS:
            allowed = ", ".join(SPLITS)
            raise ConfigError(
                f"data.files.{split}: unknown split{near_miss(split, SPLITS)}; allowed: {allowed}"
            )
        if not isinstance(value, str) or not value:
            raise ConfigError(f"data.files.{split}: expected a path, got {value!r}")
    own = [split for split in _POOL if split in request.files]
    if not own:
        example = "data.files={calibration: valid.txt, test: test.txt}"
        raise ConfigError(
            f"data.files: required for data.name 'text', and not for the test split alone ({example})"
        )
    paths = {s: _resolved(request.files.get(s, request.files[own[0]]), request.root) for s in SPLITS}
    texts = {
        path: Text(str(path), _read_file(path, request.column)) for path in dict.fromkeys(paths.values())
    }
    return {split: texts[path] for split, path in paths.items()}


def _resolved(path: str, root: Path | None) -> Path:
    # Two names of one file must not pass for two texts.
    return ((root or Path()) / Path(path).expanduser()).resolve()


def _read_file(path: Path, column: str) -> str:
    if path.is_dir():
        raise DataError(f"data.files: {path} is a folder, not a .txt or .jsonl file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"data.files: {path}: no such file") from None
    except OSError as error:
        raise DataError(f"data.files: {path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"data.files: {path}: not UTF-8 text (byte {error.start})") from None
    if path.suffix in (".jsonl", ".ndjson"):
        text = "\n\n".join(_documents(path, text, column))
    if not text.strip():
        raise DataError(f"data.files: {path}: holds no text")
    return text


def _documents(path: Path, text: str, column: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"data.files: {path}: line {number} is not JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            keys = [str(k) for k in row] if isinstance(row, dict) else []
            has = f"it has {', '.join(keys[:5])}{near_miss(column, keys)}" if keys else "it is no object"
            raise DataError(f"data.column: {path}: line {number} has no text field {column!r}; {has}")
        documents.append(row[column])
    return documents


def _hub(name: str, request: TextRequest) -> dict[str, Text]:
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
        read = {part: _stream(name, there[part], part, request.column) for part in set(parts.values())}
    except DataError:
        raise
    except Exception as error:  # whatever the hub, its cache or a broken data set raise
        raise DataError(f"data.name {name!r}: cannot be fetched: {_line(error)}") from error
    return {split: read[parts[split]] for split in SPLITS}


def _pick(there: Mapping[str, object], *wanted: str) -> str:
    found = next((part for part in wanted if part in there), None)
    return found if found is not None else next(iter(there))


def _stream(name: str, rows: Iterable[Mapping[str, object]], part: str, column: str) -> Text:
    documents, size = [], 0
    for row in rows:
        text = row.get(column)
        if not isinstance(text, str):
            keys = [str(k) for k in row]
            raise DataError(
                f"data.column: {name!r} has no text field {column!r}; it has {', '.join(keys[:5])}"
                f"{near_miss(column, keys)}"
            )
        documents.append(text)
        size += len(text)
        if size > _HUB_CHARACTERS:
            break
    return Text(f"{name} {part}", "\n\n".join(documents))


def _in_order(source: str, tokens: Tensor, request: TextRequest, *, shared: bool) -> TextSplit:
    """The test split: windows from the text's beginning, as in transformers' perplexity guide."""
    length = request.test_length or request.length
    stride = request.stride or length
    if stride > length:
        raise ConfigError(f"data.stride: {stride} is more than the {length} tokens of a test sequence")
    starts = [s for s in range(0, len(tokens), stride) if s + length <= len(tokens)]
    # Overlapping windows end with a shorter one that reaches the last token; blocks leave the rest out.
    if stride < length and starts and starts[-1] + length < len(tokens):
        starts.append(starts[-1] + stride)
    wanted = request.size("test")
    if wanted is None:
        wanted = max(1, len(starts) // 10) if shared else max(1, len(starts))
    if wanted > len(starts):
        raise DataError(
            f"data.test: {wanted} sequences of {length} tokens asked for, but {source} has only "
            f"{len(tokens)} tokens ({len(starts)} sequences)"
        )
    return TextSplit(source, tokens, tuple(starts[:wanted]), length, length - stride)


def _drawn(
    source: str, tokens: Tensor, begin: int, users: list[str], request: TextRequest
) -> dict[str, TextSplit]:
    """Disjoint blocks behind ``begin``: calibration from the front of a shuffle, validation from its end."""
    length = request.length
    count = (len(tokens) - begin) // length
    size = {s: request.size(s) for s in users}
    default = max(1, min(DRAWN, count // (2 * len(users))))
    wanted = {s: (default if s != "train" else 1) if size[s] is None else int(size[s] or 0) for s in users}
    if sum(wanted.values()) > count:
        asked = " + ".join(f"{n} {s}" for s, n in wanted.items())
        raise DataError(
            f"data.{max(wanted, key=lambda s: wanted[s])}: {asked} sequences of {length} tokens do not fit: "
            f"{source} has {len(tokens) - begin} tokens ({count} sequences) for them"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(request.seed)).tolist()
    front, back = wanted.get("calibration", 0), count - wanted.get("validation", 0)
    middle = order[front:back]
    blocks = {"calibration": order[:front], "validation": order[back:], "train": middle[: size.get("train")]}
    return {
        s: TextSplit(source, tokens, tuple(begin + length * block for block in blocks[s]), length)
        for s in users
    }


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
