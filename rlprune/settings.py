"""Machinery of the typed settings: documented fields, checks, YAML reading, overrides, the reference.

What the settings are stands in `config`; this file knows none of them.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from .errors import ConfigError, near_miss

MAX_CONFIG_BYTES = 1_000_000
SectionType = TypeVar("SectionType", bound="Section")


def setting(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """A documented dataclass field. ``low``/``high`` are inclusive limits, ``above`` an exclusive one;
    limits and choices hold for every item of a sequence."""
    metadata = {"doc": doc, "low": low, "high": high, "above": above, "choices": choices}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


class Section:
    """Base of all sections: checks the types and limits of the fields when the section is built."""

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for item in _fields(type(self)):
            path = self.prefix + item.name
            value = _typed(getattr(self, item.name), hints[item.name], path)
            _check_limits(value, item.metadata, path)
            object.__setattr__(self, item.name, value)
        self.check()

    def check(self) -> None:
        """Checks that concern several fields at once; sections with such checks override it."""


@dataclass(frozen=True)
class Setting:
    """One line of the settings' reference: dotted name, type, default and documentation."""

    path: str
    type: str
    default: Any
    doc: str


def settings_reference(section: type[Section]) -> Iterator[Setting]:
    """Every setting with its documentation, in the order of the YAML file."""
    hints = _hints(section)
    for item in _fields(section):
        hint = hints[item.name]
        if is_section(hint):
            yield from settings_reference(hint)
            continue
        default = item.default if item.default is not MISSING else {}
        doc = item.metadata["doc"]
        if item.metadata["choices"]:
            doc += f" One of: {', '.join(item.metadata['choices'])}."
        yield Setting(section.prefix + item.name, _type_name(hint), default, doc)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; raises ConfigError in one line for anything else."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: too large for a config file (over {MAX_CONFIG_BYTES:,} bytes)")
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file, so not a YAML config") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    values = _parse_yaml(text, str(path))
    if values is None:
        raise ConfigError(f"{path}: the file is empty; it needs at least model.name and data.name")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold `section: ...` lines, but it holds a {type(values).__name__}")
    return values


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number (YAML 1.1 does not) and refuses a key given twice."""

    yaml_implicit_resolvers = copy.deepcopy(yaml.SafeLoader.yaml_implicit_resolvers)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key.value, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is given twice", key.start_mark
                )
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what `_Loader` would read as a number."""

    yaml_implicit_resolvers = copy.deepcopy(yaml.SafeDumper.yaml_implicit_resolvers)


for _user in (_Loader, _Dumper):
    _user.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML text that `read_yaml` reads back as the same values."""
    # Not allow_unicode: PyYAML then writes some line breaks of Unicode as they are and reads them as spaces.
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{where}{place}: not valid YAML: {_one_line(error.problem or 'unreadable')}"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise ConfigError(f"{where}: not valid YAML: {_one_line(str(error))}") from error


def apply_override(root: type[Section], values: dict[str, Any], text: str) -> None:
    """Set one ``a.b=c`` in nested plain dicts; the path is checked against the sections first."""
    path, sign, raw = text.partition("=")
    path = path.strip()
    if not sign or not path:
        raise ConfigError(f"--set {show(text)}: must look like search.evaluations=200")
    value = _parse_yaml(raw, f"--set {path}") if raw.strip() else None
    keys = path.split(".")
    section: type[Section] | None = root
    for depth, key in enumerate(keys):
        if section is None:
            break
        hints = _hints(section)
        if key not in hints:
            raise _unknown(section, key)
        last = depth == len(keys) - 1
        if is_section(hints[key]):
            if last:
                example = next(iter(_hints(hints[key])))
                raise ConfigError(f"{path}: is a section; set one of its fields, as in {path}.{example}=...")
            section = hints[key]
        else:
            # Below a mapping such as model.arguments every key is free; below anything else there is none.
            if not last and typing.get_origin(hints[key]) is not dict:
                raise ConfigError(f"{section.prefix}{key}: is a value, it has no field {keys[depth + 1]!r}")
            section = None
    target = values
    for depth, key in enumerate(keys[:-1]):
        if target.get(key) is None:
            target[key] = {}
        target = target[key]
        if not isinstance(target, dict):
            raise ConfigError(
                f"{'.'.join(keys[: depth + 1])}: must be a mapping of fields, got {show(target)}"
            )
    target[keys[-1]] = value


def build(cls: type[SectionType], values: Any, path: str = "") -> SectionType:
    """A section from nested mappings, defaults for what is missing; raises ConfigError."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'config'}: must be a mapping of fields, got {show(values)}")
    hints = _hints(cls)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise _unknown(cls, key)
        if is_section(hints[key]):
            # A section without a line below it reads as null in YAML: all its defaults.
            value = build(hints[key], {} if value is None else value, cls.prefix + key)
        arguments[key] = value
    return cls(**arguments)


def plain(value: Any) -> Any:
    """Sections, tuples and mappings as dicts and lists, copied."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def show(value: Any) -> str:
    """A short one-line picture of any value, for error messages."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Section)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def _hints(cls: Any) -> dict[str, Any]:
    every = typing.get_type_hints(cls)
    return {item.name: every[item.name] for item in dataclasses.fields(cls)}


def _fields(cls: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls)


def _unknown(cls: type[Section], key: Any) -> ConfigError:
    known = list(_hints(cls))
    hint = near_miss(str(key), known) or f"; known: {', '.join(known)}"
    name = key if isinstance(key, str) and len(key) <= 60 else show(key)
    return ConfigError(_one_line(f"{cls.prefix}{name}: unknown field{hint}"))


def _type_name(hint: Any) -> str:
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


def _typed(value: Any, hint: Any, path: str) -> Any:
    """The value in the field's type; only whole numbers (to floats) and lists (to tuples) convert."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    wrong = ConfigError(f"{path}: expected {_type_name(hint)}, got {show(value)}")
    for option in options:
        origin = typing.get_origin(option)
        if origin is tuple:
            if not isinstance(value, (list, tuple)):
                raise wrong
            inner = typing.get_args(option)[0]
            return tuple(_typed(item, inner, f"{path}[{index}]") for index, item in enumerate(value))
        if origin is dict:
            if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
                raise wrong
            return _scalars(value, path)
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                raise wrong from None
        if isinstance(value, option) and not (option is int and isinstance(value, bool)):
            return value
    raise wrong


def _scalars(value: Any, path: str, depth: int = 0) -> Any:
    """A deep copy of a free mapping, refused where it holds something that JSON cannot."""
    if depth > 20:
        raise ConfigError(f"{path}: nested too deeply")
    if isinstance(value, Mapping):
        return {str(key): _scalars(item, f"{path}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_scalars(item, path, depth + 1) for item in value]
    if (
        value is None
        or isinstance(value, (bool, int, str))
        or (isinstance(value, float) and math.isfinite(value))
    ):
        return value
    raise ConfigError(f"{path}: must be text, a finite number, true, false or null, got {show(value)}")


def _check_limits(value: Any, limits: Mapping[str, Any], path: str) -> None:
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            _check_limits(item, limits, f"{path}[{index}]")
        return
    choices = limits["choices"]
    if choices is not None and value not in choices:
        hint = near_miss(str(value), choices)
        raise ConfigError(f"{path}: {show(value)} is not one of {', '.join(choices)}{hint}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    low, high, above = limits["low"], limits["high"], limits["above"]
    # Infinity is allowed nowhere and NaN compares as False, so both are refused first.
    if not math.isfinite(value):
        raise ConfigError(f"{path}: must be a finite number, got {value}")
    if low is not None and value < low:
        raise ConfigError(f"{path}: must be at least {low}, got {value}")
    if above is not None and value <= above:
        raise ConfigError(f"{path}: must be above {above}, got {value}")
    if high is not None and value > high:
        raise ConfigError(f"{path}: must be at most {high}, got {value}")
