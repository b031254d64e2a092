"""Which format the rows of a file have, found from their fields, and each row as an `Example`.

Formats as public fine-tuning tools read them (trl's data set formats, torchtune's message transforms):

- chat: ``messages`` of {"role", "content"}, or ShareGPT's ``conversations`` of {"from", "value"};
- instruction: ``instruction``, perhaps ``input``, and ``output`` (Alpaca); ``prompt`` and ``completion``, both texts or
  both lists of messages; ``question`` and ``answer``;
- text: a field of running text, ``data.column``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import DataError, near_miss
from .request import Document, Example, Examples, Text, TextRequest

Row = tuple[str, Mapping[str, Any]]
"""Where a row stands in its file, such as "line 3", and its fields."""

CHATS = ("messages", "conversations")
ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
_ANSWERS = ("completion", "output", "response", "answer")
_MORE = {"instruction": ("input", "context"), "prompt": (), "question": ("context",)}


@dataclass(frozen=True)
class _Layout:
    """The fields that hold the parts of every row of one file."""

    format: str
    field: str
    answer: str = ""
    more: str = ""

    def __str__(self) -> str:
        return f"{self.format} ({', '.join(n for n in (self.field, self.more, self.answer) if n)})"


def document_of(
    source: str, rows: Sequence[Row], request: TextRequest, where: str = "data.files"
) -> Document:
    """The rows of a file as one text, documents parted by a blank line, or as examples.

    ``request.column`` and ``request.format`` say which fields to read, "auto" finds out from the first row. Raises
    DataError naming the file, the row, and what is there instead.
    """
    if not rows:
        raise DataError(f"{where}: {source}: holds no text")
    layout = _layout(source, rows[0], request)
    if layout.format == "text":
        text = "\n\n".join(_text(source, row, layout.field) for row in rows)
        if not text.strip():
            raise DataError(f"{where}: {source}: holds no text")
        return Text(source, text)
    return Examples(source, layout.format, tuple(_example(source, row, layout) for row in rows))


def _layout(source: str, first: Row, request: TextRequest) -> _Layout:
    row, wanted, column = _fields(source, first), request.format, request.column
    if wanted in ("auto", "text") and isinstance(row.get(column), str):
        return _Layout("text", column)
    if wanted in ("auto", "chat"):
        names = CHATS if column == "text" else (column, *CHATS)
        found = next((name for name in names if _is_conversation(row.get(name))), None)
        if found is not None:
            return _Layout("chat", found)
    if wanted in ("auto", "instruction"):
        for name, others in _MORE.items():
            answer = next((field for field in _ANSWERS if field in row), None)
            if name in row and answer is not None:
                return _Layout("instruction", name, answer, next((o for o in others if o in row), ""))
    raise DataError(_unknown(source, first[0], row, wanted, column))


def _unknown(source: str, line: str, row: Mapping[str, Any], wanted: str, column: str) -> str:
    keys = [str(key) for key in row]
    has = f"it has {', '.join(keys[:5])}" if keys else "it is empty"
    there = next((name for name in ((column,) if column != "text" else CHATS) if name in row), None)
    if wanted == "chat" and there is not None:
        return f"data.format: {source}: {line}: the field {there!r} is not a list of messages but {_kind(row[there])}"
    if wanted == "chat":
        names = " or ".join(repr(name) for name in (CHATS if column == "text" else (column,)))
        return (
            f"data.format: {source}: {line} has no list of messages {names}; {has}{near_miss(CHATS[0], keys)}"
        )
    if wanted == "instruction":
        return f"data.format: {source}: {line} has no {', '.join(_MORE)} with one of {', '.join(_ANSWERS)}; {has}"
    if column in row:
        value = row[column]
        kind = "a list of messages (data.format=chat)" if _is_conversation(value) else _kind(value)
        return f"data.column: {source}: {line}: the field {column!r} is not text but {kind}"
    return f"data.column: {source}: {line} has no text field {column!r}; {has}{near_miss(column, keys)}"


def _fields(source: str, row: Row) -> Mapping[str, Any]:
    line, fields = row
    if not isinstance(fields, Mapping):
        raise DataError(f"data.column: {source}: {line} has no fields; it is no object")
    return fields


def _is_conversation(value: object) -> bool:
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and isinstance(value[0], Mapping)
        and bool({"role", "from"} & set(value[0]))
    )


def _kind(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        type(None): "null",
        bool: "true or false",
        int: "a number",
    }
    return names.get(type(value), "a number" if isinstance(value, float) else f"a {type(value).__name__}")


def _text(source: str, row: Row, column: str) -> str:
    fields = _fields(source, row)
    if not isinstance(fields.get(column), str):
        raise DataError(_unknown(source, row[0], fields, "text", column))
    return _written(fields[column], f"data.files: {source}: {row[0]}: {column}")


def _written(text: str, where: str) -> str:
    """A text that can be written; JSON may hold half of a character, which no tokenizer takes."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError(f"{where}: holds half of a character (a lone surrogate)")
    return text


def _example(source: str, row: Row, layout: _Layout) -> Example:
    line, fields = row[0], _fields(source, row)
    where = f"data.files: {source}: {line}"
    for name in (layout.field, layout.answer):
        if name and name not in fields:
            raise DataError(
                f"{where} has no field {name!r}, which the file's first line has: {layout}{near_miss(name, fields)}"
            )
    if layout.format == "chat":
        return Example(line, _messages(fields[layout.field], f"{where}: {layout.field}"))
    prompt, answer = fields[layout.field], fields[layout.answer]
    if _is_conversation(prompt) and _is_conversation(answer):
        before = _messages(prompt, f"{where}: {layout.field}")
        return Example(line, (*before, *_messages(answer, f"{where}: {layout.answer}")), len(before))
    more = fields.get(layout.more) or "" if layout.more else ""
    for name, value in ((layout.field, prompt), (layout.answer, answer), (layout.more, more)):
        if not isinstance(value, str):
            raise DataError(f"{where}: the field {name!r} is not text but {_kind(value)}")
    if not answer.strip():
        raise DataError(f"{where}: the answer {layout.answer!r} is empty")
    for name, value in ((layout.field, prompt), (layout.answer, answer), (layout.more, more)):
        _written(value, f"{where}: {name}")
    if layout.field == "prompt":
        return Example(line, prompt=prompt, answer=answer)
    asked = f"{prompt}\n\n{more}" if more.strip() else prompt
    return Example(line, ({"role": "user", "content": asked}, {"role": "assistant", "content": answer}))


def _messages(value: object, where: str) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(
            f"{where}: must be a list of at least one message, got {_kind(value) if value else 'an empty list'}"
        )
    found = []
    for number, message in enumerate(value):
        place = f"{where}[{number}]"
        if not isinstance(message, Mapping):
            raise DataError(f"{place}: must be an object with 'role' and 'content', got {_kind(message)}")
        names = ("from", "value") if "from" in message else ("role", "content")
        role, content = (message.get(name) for name in names)
        allowed: Sequence[str] = list(_SHAREGPT) if names[0] == "from" else ROLES
        if not isinstance(role, str) or role not in allowed:
            miss = near_miss(role, allowed) if isinstance(role, str) else ""
            raise DataError(f"{place}.{names[0]}: {role!r} is not one of {', '.join(allowed)}{miss}")
        if not isinstance(content, str):
            state = f"is not text but {_kind(content)}" if names[1] in message else "is missing"
            raise DataError(f"{place}: the field {names[1]!r} {state}{near_miss(names[1], message)}")
        found.append({"role": _SHAREGPT.get(role, role), "content": _written(content, place)})
    return tuple(found)
