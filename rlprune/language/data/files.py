"""The files of ``data.files``: which a split reads, with which weight, and what stands in them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...config.config import TEXT_FORMATS
from ...config.schema import show
from ...errors import ConfigError, DataError, near_miss
from ...utils.reading import special_kind
from ...workloads.base import SPLITS
from .formats import Row, document_of
from .request import Document, Mixture, Text, TextRequest

POOL = ("train", "calibration", "validation")
_FIELDS = ("path", "weight", "format", "column")
_LINES, _LIST = (".jsonl", ".ndjson"), (".json",)
_TABLE, _PACKED = "a table", "packed"
_OTHERS = {
    **dict.fromkeys((".csv", ".tsv", ".parquet", ".arrow", ".xlsx"), _TABLE),
    **dict.fromkeys((".gz", ".zip", ".xz", ".bz2", ".zst", ".tar", ".tgz"), _PACKED),
}
"""What is no text, or would be read as one by mistake."""


@dataclass(frozen=True)
class _File:
    path: Path
    weight: float
    format: str
    column: str


def read_files(request: TextRequest) -> dict[str, Mixture]:
    """The documents of each split; splits that name no file share those of another one.

    Raises ConfigError for a wrong entry of ``data.files``, DataError for a file that is missing, broken or empty.
    """
    given = {split: _entries(split, value, request) for split, value in request.files.items()}
    own = [split for split in POOL if split in given]
    if not own:
        example = "data.files={calibration: valid.txt, test: test.txt}"
        raise ConfigError(
            f"data.files: required for data.name 'text', and not for the test split alone ({example})"
        )
    files = {split: given.get(split, given[own[0]]) for split in SPLITS}
    ways: dict[Path, _File] = {}
    for file in (file for entries in files.values() for file in entries):
        other = ways.setdefault(file.path, file)
        if (other.format, other.column) != (file.format, file.column):
            raise ConfigError(
                f"data.files: {file.path} is given twice, with another format or column each time"
            )
    read = {path: _document(file, request) for path, file in ways.items()}
    return {
        split: Mixture([read[file.path] for file in entries], [file.weight for file in entries])
        for split, entries in files.items()
    }


def _entries(split: str, value: object, request: TextRequest) -> list[_File]:
    if split not in SPLITS:
        allowed = ", ".join(SPLITS)
        raise ConfigError(f"data.files.{split}: unknown split{near_miss(split, SPLITS)}; allowed: {allowed}")
    several = isinstance(value, (list, tuple))
    items: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    if not items:
        raise ConfigError(f"data.files.{split}: an empty list; name a file, or leave the split out")
    found = [
        _entry(f"data.files.{split}{f'[{number}]' if several else ''}", item, request)
        for number, item in enumerate(items)
    ]
    for number, file in enumerate(found):
        if file.path in [other.path for other in found[:number]]:
            raise ConfigError(f"data.files.{split}: {file.path} stands there twice; give it one weight")
    return found


def _entry(where: str, item: object, request: TextRequest) -> _File:
    fields: Mapping[str, Any] = item if isinstance(item, Mapping) else {"path": item}
    for name in fields:
        if name not in _FIELDS:
            raise ConfigError(
                f"{where}.{name}: unknown{near_miss(name, _FIELDS)}; allowed: {', '.join(_FIELDS)}"
            )
    path = fields.get("path")
    if not isinstance(path, str) or not path:
        raise ConfigError(f"{where}: expected a path, or {{path: FILE, weight: NUMBER}}, got {show(item)}")
    weight = fields.get("weight", 1)
    numeric = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not numeric or not (math.isfinite(weight) and weight > 0):
        raise ConfigError(f"{where}.weight: must be a number above 0, got {show(weight)}")
    form, column = fields.get("format", request.format), fields.get("column", request.column)
    if form not in TEXT_FORMATS:
        raise ConfigError(
            f"{where}.format: {show(form)} is not one of {', '.join(TEXT_FORMATS)}"
            + (near_miss(form, TEXT_FORMATS) if isinstance(form, str) else "")
        )
    if not isinstance(column, str) or not column:
        raise ConfigError(f"{where}.column: expected the name of a field, got {show(column)}")
    return _File(_resolved(path, request.root), float(weight), form, column)


def _resolved(path: str, root: Path | None) -> Path:
    # Two names of one file must not pass for two texts.
    return ((root or Path()) / Path(path).expanduser()).resolve()


def _document(file: _File, request: TextRequest) -> Document:
    path, own = file.path, replace(request, format=file.format, column=file.column)
    text = _text_of(path)
    if path.suffix in _LINES:
        return document_of(str(path), _rows(path, text), own)
    if path.suffix in _LIST:
        return document_of(str(path), _listed(path, text), own)
    if file.format not in ("auto", "text"):
        raise ConfigError(
            f"data.format: {path} is running text; {file.format!r} is read from .jsonl and .json files"
        )
    if not text.strip():
        raise DataError(f"data.files: {path}: holds no text")
    return Text(str(path), text)


def _text_of(path: Path) -> str:
    if path.is_dir():
        raise DataError(f"data.files: {path} is a folder, not a .txt, .jsonl or .json file")
    if (kind := special_kind(path)) is not None:
        raise DataError(f"data.files: {path}: is a {kind}, where a file is to be read")
    if (what := _OTHERS.get(path.suffix.lower())) is not None and path.exists():
        raise DataError(f"data.files: {path}: is {what}; running text, .jsonl and .json files are read")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"data.files: {path}: no such file") from None
    except OSError as error:
        raise DataError(f"data.files: {path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"data.files: {path}: not UTF-8 text (byte {error.start})") from None


def _rows(path: Path, text: str) -> list[Row]:
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append((f"line {number}", json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise DataError(f"data.files: {path}: line {number} is not JSON ({error})") from None
    return found


def _listed(path: Path, text: str) -> list[Row]:
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"data.files: {path}: truncated or not JSON ({error})") from None
    if not isinstance(rows, list):
        raise DataError(
            f"data.files: {path}: a .json file must hold a list of objects; one object a line is .jsonl"
        )
    return [(f"entry {number}", row) for number, row in enumerate(rows, start=1)]
