"""The JSON schema for editors takes what the program takes and refuses what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlprune.cli import main as cli
from rlprune.config.config import json_schema, load_config, settings_reference, shipped_configs
from rlprune.config.yaml_files import read_yaml

SCHEMA = json_schema()
TYPES = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
    "null": type(None),
}  # fmt: skip


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return SCHEMA["$defs"][reference.removeprefix("#/$defs/")] if reference else schema


def wrong(value: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """What a value breaks of the few keywords that the schema consists of."""
    schema = resolved(schema)
    if "anyOf" in schema:
        every = [wrong(value, option, path) for option in schema["anyOf"]]
        return min(every, key=len)
    kind = schema["type"]
    if not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return [f"{path}: {value!r} is no {kind}"]
    found = []
    if kind == "object":
        for key, item in value.items():
            if key in schema.get("properties", {}):
                found += wrong(item, schema["properties"][key], f"{path}.{key}")
            elif schema["additionalProperties"] is False:
                found.append(f"{path}.{key}: unknown")
    if kind == "array":
        found += [text for item in value for text in wrong(item, schema["items"], path)]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{path}: {value!r} is no choice")
    if kind in ("integer", "number"):
        within = schema.get("minimum", value) <= value <= schema.get("maximum", value)
        if not within or not schema.get("exclusiveMinimum", value - 1) < value:
            found.append(f"{path}: {value} is out of range")
    return found


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configs_fit(name: str) -> None:
    assert wrong(read_yaml(shipped_configs()[name]), SCHEMA) == []
    assert wrong(load_config(name).to_dict(), SCHEMA) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("sead", 3),
        ("search.evalutions", 3),
        ("search.ppo.n_stepz", 3),
        ("search.evaluations", 0),
        ("search.mode", "directt"),
        ("recovery.steps", ["bn", "finetun"]),
        ("search.budget_range", [0, 1]),
        ("finish.lr", 11),
        ("finish.lr", "fast"),
        ("model.train", 3),
        ("seed", True),
        ("seed", 1.5),
    ],
)
def test_wrong_fields_do_not(path: str, value: Any) -> None:
    values = load_config("digits").to_dict()
    *above, last = path.split(".")
    target = values
    for key in above:
        target = target[key]
    target[last] = value
    assert len(wrong(values, SCHEMA)) == 1


def test_every_setting_is_there_with_its_documentation_and_default() -> None:
    for setting in settings_reference():
        *above, last = setting.path.split(".")
        schema = SCHEMA
        for key in above:
            schema = resolved(schema["properties"][key])
        assert schema["additionalProperties"] is False
        field = schema["properties"][last]
        assert field["title"]
        assert setting.doc.startswith(field["description"])
        default = list(setting.default) if isinstance(setting.default, tuple) else setting.default
        assert field.get("default", {}) == default


def test_the_command_prints_it_or_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert cli.main(["schema", "--out", "settings.json"]) == 0
    assert json.loads(Path("settings.json").read_text()) == SCHEMA
    assert cli.main(["schema", "--out", "."]) == 2
    assert "is a folder" in capsys.readouterr().err
