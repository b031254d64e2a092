"""YAML of settings: numbers as people write them, no key twice, one line for whatever is wrong."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import ArtifactError, ConfigError
from ..utils.reading import read_bytes

MAX_CONFIG_BYTES = 1_000_000
MAX_NODES = 500_000
_OPEN = -1  # a node whose parts are being counted


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; raises ConfigError in one line for anything else."""
    try:
        text = read_bytes(path, MAX_CONFIG_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file, so not a YAML config") from error
    except ArtifactError as error:
        raise ConfigError(str(error)) from error
    values = parse_yaml(text, str(path))
    if values is None:
        raise ConfigError(f"{path}: the file is empty; it needs at least model.name and data.name")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold `section: ...` lines, but it holds a {type(values).__name__}")
    return values


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number (YAML 1.1 does not) and refuses a key given twice."""

    yaml_implicit_resolvers = copy.deepcopy(yaml.SafeLoader.yaml_implicit_resolvers)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
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


def dump_yaml(values: Mapping[str, object]) -> str:
    """YAML text that `read_yaml` reads back as the same values."""
    # Not allow_unicode: PyYAML then writes some line breaks of Unicode as they are and reads them as spaces.
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False)


def parse_yaml(text: str, where: str) -> Any:
    """The value that a text holds; ``where`` opens the ConfigError for a text that is no YAML."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded(node, {}) > MAX_NODES:
            raise ConfigError(f"{where}: its aliases stand for over {MAX_NODES:,} values")
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{where}{place}: not valid YAML: {one_line(error.problem or 'unreadable')}"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{where}: not valid YAML: nested too deeply") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{where}: not valid YAML: {one_line(str(error))}") from error


def _expanded(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Values that a node stands for once every alias is written out; ValueError where one holds itself."""
    size = sizes.setdefault(id(node), 0)
    if size or not isinstance(node, yaml.CollectionNode):
        return max(size, 1)
    sizes[id(node)] = _OPEN
    parts = (
        node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    )
    size = 1
    for part in parts:
        size += _expanded(part, sizes)
        if sizes[id(part)] == _OPEN:
            raise ValueError("an alias stands for what holds it")
    sizes[id(node)] = size
    return size


def one_line(text: str) -> str:
    """At most 200 characters of a text, in one line."""
    return " ".join(text.split())[:200]
