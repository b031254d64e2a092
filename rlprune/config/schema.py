"""Machinery of the typed settings: documented fields that pydantic checks, overrides, the reference, the schema.

What the settings are stands in `config`; this file knows none of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, dataclass_transform

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    Strict,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic_core import CoreSchema, PydanticCustomError

from ..errors import ConfigError, near_miss
from ..utils.registry import Registry
from ..utils.values import show_value
from .yaml_files import one_line, parse_yaml

SectionType = TypeVar("SectionType", bound="Section")


MOST = 10**9
"""The largest whole number of a setting that has no limit of its own: more is a slip, and no machine's to do."""


def setting(
    default: object,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: Sequence[str] | Registry[Any] | None = None,
) -> Any:
    """A documented field. ``low``/``high`` are inclusive limits, ``above`` an exclusive one; limits and choices
    hold for every item of a sequence. The choices of a registry are what it holds when a value is checked."""
    limits = {"ge": low, "le": high, "gt": above}
    metadata = {"description": doc, "limits": limits, "choices": choices}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


class Section:
    """Base of all sections, which `section` completes; checks of several fields at once go into __post_init__."""

    prefix: ClassVar[str] = ""
    hints: ClassVar[dict[str, Any]]
    """Types of the fields as they are written; pydantic sees them with the limits of `setting`."""
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


@dataclass_transform(frozen_default=True)
def section(cls: type[SectionType]) -> type[SectionType]:
    """A frozen dataclass of settings, checked by pydantic whenever one is made; ConfigError where it is wrong."""
    every = typing.get_type_hints(cls)
    cls.hints = {
        name: every[name] for name in cls.__annotations__ if typing.get_origin(every[name]) is not ClassVar
    }
    for name, hint in cls.hints.items():
        cls.__annotations__[name] = _checked(hint, getattr(cls, name).metadata, cls.prefix + name)
    made: Any = checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls)
    made.__init__ = _one_line_errors(cls)(made.__init__)
    return cls


@dataclass(frozen=True)
class Setting:
    """One line of the settings' reference: dotted name, type, default and documentation."""

    path: str
    type: str
    default: Any
    doc: str


def settings_reference(root: type[Section]) -> Iterator[Setting]:
    """Every setting with its documentation, in the order of the YAML file."""
    for item in dataclasses.fields(root):
        hint = root.hints[item.name]
        if _is_section(hint):
            yield from settings_reference(hint)
            continue
        default = item.default if item.default is not MISSING else {}
        doc = item.metadata["description"]
        if item.metadata["choices"]:
            doc += f" One of: {', '.join(item.metadata['choices'])}."
        yield Setting(root.prefix + item.name, _type_name(hint), default, doc)


def json_schema(root: type[Section]) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a YAML file of these settings."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **TypeAdapter(root).json_schema()}


def apply_override(root: type[Section], values: dict[str, Any], text: str) -> None:
    """Set one ``a.b=c`` in nested plain dicts; the path is checked against the sections first."""
    path, sign, raw = text.partition("=")
    path = path.strip()
    if not sign or not path:
        raise ConfigError(f"--set {show(text)}: must look like search.evaluations=200")
    value = parse_yaml(raw, f"--set {one_line(path)}") if raw.strip() else None
    *above, last = keys = path.split(".")
    _, hint, rest = _place(root, keys)
    if _is_section(hint):
        example = next(iter(hint.hints))
        raise ConfigError(f"{path}: is a section; set one of its fields, as in {path}.{example}=...")
    # Below a mapping such as model.arguments every key is free; below anything else there is none.
    if rest and typing.get_origin(hint) is not dict:
        name = ".".join(keys[: -len(rest)])
        raise ConfigError(f"{name}: is a value, it has no field {rest[0]!r}")
    target = values
    for depth, key in enumerate(above, 1):
        if target.get(key) is None:
            target[key] = {}
        target = target[key]
        if not isinstance(target, dict):
            raise ConfigError(f"{'.'.join(keys[:depth])}: must be a mapping of fields, got {show(target)}")
    target[last] = value


class RenamedSetting(FutureWarning):
    """A setting was given by its old name, which the next version will not know."""


def with_new_name(text: str, renamed: Mapping[str, str], *, warn: bool = True) -> str:
    """An ``a.b=c`` override whose setting has its new name."""
    path, sign, raw = text.partition("=")
    if path.strip() not in renamed:
        return text
    if warn:
        _warn_renamed(path.strip(), renamed)
    return f"{renamed[path.strip()]}{sign}{raw}"


def with_new_names(values: object, renamed: Mapping[str, str]) -> Any:
    """Nested mappings whose settings have their new names, copied where one is old; ConfigError for both names."""
    for old, new in renamed.items():
        section, key = old.split(".")
        given = values.get(section) if isinstance(values, Mapping) else None
        if not isinstance(values, Mapping) or not isinstance(given, Mapping) or key not in given:
            continue
        own = new.split(".")[1]
        if own in given:
            raise ConfigError(f"{old}: is the old name of {new}, which is given as well; leave it out")
        _warn_renamed(old, renamed)
        values = {**values, section: {own if k == key else k: v for k, v in given.items()}}
    return values


def _warn_renamed(old: str, renamed: Mapping[str, str]) -> None:
    message = f"{old}: is called {renamed[old]} now; the old name goes with the next version"
    warnings.warn(message, RenamedSetting, stacklevel=4)


def build(cls: type[SectionType], values: object) -> SectionType:
    """A section from nested mappings, defaults for what is missing; raises ConfigError."""
    with _one_line_errors(cls):
        return TypeAdapter(cls).validate_python(_fields_of(values))


def plain(section: Section) -> dict[str, Any]:
    """A section as nested dicts and lists, copied."""
    values: dict[str, Any] = TypeAdapter(type(section)).dump_python(section, mode="json")
    return values


def show(value: object) -> str:
    """A short one-line picture of any value, for error messages."""
    text = repr(value) if isinstance(value, (str, int, float)) else show_value(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_section(hint: object) -> bool:
    return isinstance(hint, type) and issubclass(hint, Section)


def _place(root: type[Section], keys: Sequence[object]) -> tuple[type[Section], Any, Sequence[object]]:
    """The section and the type that a path of keys leads to, and the keys below it; ConfigError for an unknown one."""
    owner, hint = root, root
    for depth, key in enumerate(keys):
        if not _is_section(hint):
            return owner, hint, keys[depth:]
        owner = hint
        if key not in owner.hints:
            known = list(owner.hints)
            name = key if isinstance(key, str) and len(key) <= 60 else show(key)
            miss = near_miss(str(key), known) or f"; known: {', '.join(known)}"
            raise ConfigError(one_line(f"{owner.prefix}{name}: unknown field{miss}"))
        hint = owner.hints[key]
    return owner, hint, ()


def _type_name(hint: object) -> str:
    """The type in words: "whole number", "text or null"."""
    words = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}
    if hint in words:
        return words[hint]
    origin = typing.get_origin(hint)
    if origin is tuple:
        return f"list of {_type_name(typing.get_args(hint)[0])}"
    if origin is dict:
        return "mapping"
    return " or ".join(_type_name(option) for option in typing.get_args(hint))


def _checked(hint: object, meta: Mapping[str, Any], path: str) -> Any:
    """A field's type with its limits and choices, for pydantic: nothing converts but whole numbers to floats, lists
    to tuples and mappings to sections."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, Union):
        return Union[tuple(_checked(option, meta, path) for option in options)]  # noqa: UP007
    if origin is tuple:
        items: Any = types.GenericAlias(tuple, (_checked(options[0], meta, path), ...))
        return Annotated[
            items, Strict(), BeforeValidator(lambda value: tuple(value) if type(value) is list else value)
        ]
    if origin is dict:
        return Annotated[hint, BeforeValidator(partial(_free_mapping, path=path))]
    if _is_section(hint):
        return Annotated[hint, BeforeValidator(_fields_of)]
    if hint is str and isinstance(meta["choices"], Registry):
        known = _Registered(meta["choices"])
        return Annotated[str, Strict(), AfterValidator(known.check), known]
    if hint is str and meta["choices"]:
        return Literal[tuple(meta["choices"])]
    if hint in (int, float):
        limits = dict(meta["limits"])
        if hint is int and limits["le"] is None:
            limits["le"] = MOST
        return Annotated[hint, Strict(), Field(**limits, allow_inf_nan=False)]
    if hint is str:
        return Annotated[hint, Strict(), AfterValidator(_plain_text)]
    return Annotated[hint, Strict()] if hint is bool else hint


@dataclass(frozen=True)
class _Registered:
    """The choices of a field that a registry holds."""

    registry: Registry[Any]

    def check(self, name: str) -> str:
        if not self.registry.knows(name):
            raise PydanticCustomError("literal_error", "unknown name")
        return name

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        self.registry.complete()
        return {**handler(core), "enum": list(self.registry)}


def _fields_of(value: object) -> Any:
    """The fields of a section; one without a line below it reads as null in YAML: all its defaults."""
    return {} if value is None else dict(value) if isinstance(value, Mapping) else value


def _free_mapping(value: object, path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{path}: expected mapping, got {show(value)}")
    scalars: dict[str, Any] = _scalars(value, path)
    return scalars


def _scalars(value: object, path: str, depth: int = 0) -> Any:
    """A deep copy of a free mapping, refused where it holds something that JSON cannot."""
    if depth > 20:
        raise ConfigError(f"{path}: nested too deeply")
    if isinstance(value, Mapping):
        return {str(key): _scalars(item, f"{path}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_scalars(item, path, depth + 1) for item in value]
    if isinstance(value, str) and not _writable(value):
        raise ConfigError(f"{path}: holds a zero byte or half of a character, got {show(value)}")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise ConfigError(f"{path}: must be text, a finite number, true, false or null, got {show(value)}")


def _plain_text(text: str) -> str:
    """Text that a file, its name or a terminal can hold."""
    if not _writable(text):
        raise PydanticCustomError("unwritable", "not text")
    return text


def _writable(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


_LIMITS = {"greater_than_equal": "at least", "less_than_equal": "at most", "greater_than": "above"}


@contextlib.contextmanager
def _one_line_errors(root: type[Section]) -> Iterator[None]:
    """pydantic's errors as one ConfigError: the dotted field, what is allowed there, and what was given."""
    try:
        yield
    except ValidationError as error:
        raise _translated(root, error) from None


def _translated(root: type[Section], error: ValidationError) -> ConfigError:
    errors = error.errors(include_url=False)
    loc = errors[0]["loc"]
    owner, hint, rest = _place(root, loc)  # which refuses an unknown field
    field_loc = loc[: len(loc) - len(rest)]
    path = root.prefix + ".".join(map(str, field_loc))
    first = errors[0]
    if rest and isinstance(rest[0], int):
        path += f"[{rest[0]}]"
        hint = typing.get_args(hint)[0]
    elif rest:
        # The options of a union are reported one by one; the last one is the number, which alone has limits.
        first = [each for each in errors if each["loc"][: len(field_loc)] == field_loc][-1]
    kind, value = first["type"], first["input"]
    if _is_section(hint):
        return ConfigError(f"{path or 'config'}: must be a mapping of fields, got {show(value)}")
    if kind == "literal_error" and isinstance(value, str):
        choices = owner.__dataclass_fields__[str(field_loc[-1])].metadata["choices"]
        miss = near_miss(value, choices)
        return ConfigError(f"{path}: {show(value)} is not one of {', '.join(choices)}{miss}")
    if kind == "finite_number":
        return ConfigError(f"{path}: must be a finite number, got {value}")
    if kind in _LIMITS:
        (limit,) = first["ctx"].values()
        allowed = f"{limit:g}" if isinstance(limit, float) else str(limit)
        return ConfigError(f"{path}: must be {_LIMITS[kind]} {allowed}, got {show(value)}")
    if kind == "unwritable":
        return ConfigError(f"{path}: holds a zero byte or half of a character, got {show(value)}")
    return ConfigError(f"{path}: expected {_type_name(hint)}, got {show(value)}")
