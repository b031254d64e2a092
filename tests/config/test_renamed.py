"""Settings that have a new name: the old one works, with a warning that says the new one."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlprune.config import Config, load_config
from rlprune.config.config import RENAMED
from rlprune.config.schema import RenamedSetting
from rlprune.errors import ConfigError

BASE = {"model": {"name": "cifar_resnet20"}, "data": {"name": "digits"}}


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_the_old_name_still_works(old: str, new: str, tmp_path: Path) -> None:
    section, key = old.split(".")
    path = tmp_path / "old.yaml"
    path.write_text(f"model: {{name: cifar_resnet20}}\ndata: {{name: digits}}\n{section}: {{{key}: 7}}\n")
    for read in (
        lambda: load_config(path),
        lambda: load_config("digits", [f"{old}=7"]),
        lambda: Config.from_dict(BASE | {section: {key: 7}}),
        lambda: Config.from_dict(BASE).override([f"{old}=7"]),
    ):
        with pytest.warns(RenamedSetting, match=rf"{old}: is called {new} now"):
            config = read()
        assert getattr(getattr(config, section), new.split(".")[1]) == 7
        assert key not in config.to_dict()[section]


def test_both_names_at_once_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"score\.images: is the old name of score\.samples"):
        Config.from_dict(BASE | {"score": {"images": 7, "samples": 8}})
