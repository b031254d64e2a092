"""Published methods: every number of a shipped config beside the authors' value, and whole runs of some of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

import pytest
import yaml

from helpers.scripts import load_script
from rlprune.config.config import Config, load_config, shipped_configs
from rlprune.experiments.usage import check_usage

SCRIPT = load_script("published")
TABLE: dict[str, Any] = {name: SCRIPT.entry(name) for name in SCRIPT.TABLE}
NAMES = [name for name in shipped_configs() if name.startswith("published/")]
# What says which model and data a method is applied to.
FREE = ("model", "data.name", "data.root", "data.files", "device", "threads")


def entry(name: str) -> dict[str, Any]:
    found: dict[str, Any] = TABLE[name.removeprefix("published/")]
    return found


def value_of(config: Config, setting: str) -> Any:
    found = reduce(getattr, setting.split("."), config)
    return list(found) if isinstance(found, tuple) else found


def given(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a config file by their dotted names."""
    for key, value in values.items():
        path = f"{above}{key}"
        if path in FREE:
            continue
        if isinstance(value, dict):
            yield from given(value, f"{path}.")
        else:
            yield path, value


def test_every_config_has_a_table_and_every_table_a_config() -> None:
    assert {name.removeprefix("published/") for name in NAMES} == set(TABLE)


@pytest.mark.parametrize("name", NAMES)
def test_values_are_the_authors(name: str) -> None:
    config = load_config(name)
    for setting, published, where, *other in entry(name)["values"]:
        assert where
        if "." in setting:
            wanted = other[0] if other else published
            assert value_of(config, setting) == wanted, (setting, published)
        assert len(other) in (0, 2), f"{setting}: another value needs a reason"


@pytest.mark.parametrize("name", NAMES)
def test_every_number_is_accounted_for(name: str) -> None:
    """A number that a config sets stands in the table, or is marked as having no published value."""
    values = yaml.safe_load(shipped_configs()[name].read_text("utf-8"))
    known = {row[0] for row in entry(name)["values"]}
    style = set(entry(name)["style"])
    assert not known & style
    numbers = {path for path, value in given(values) if isinstance(value, int | float) and value is not True}
    assert {path for path in numbers if value_of(load_config(name), path) is not False} <= known | style


@pytest.mark.parametrize("name", NAMES)
def test_a_config_names_paper_and_code(name: str) -> None:
    comment = shipped_configs()[name].read_text("utf-8").partition("\nmodel:")[0]
    paper, code = entry(name)["paper"], entry(name)["code"]
    assert paper.rpartition("arXiv ")[2].split()[0].strip("()") in comment
    assert ("/" not in code) or code in comment
    if not entry(name)["values"] or "style" in entry(name)["title"]:
        assert "style" in comment


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_used_by_train(name: str) -> None:
    check_usage(load_config(name), "train")
