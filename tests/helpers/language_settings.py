"""Settings of a workload on a language model, and the one line with which wrong ones are refused."""

from __future__ import annotations

import pytest

from rlprune.config.config import Config
from rlprune.errors import RlpruneError
from rlprune.experiments.build import build_workload


def config_of(name, *overrides) -> Config:
    """A config of a language model by name, on a few sequences of the help texts."""
    given = {
        "model": {"name": str(name)},
        "data": {"name": "help_texts", "sequence_length": 32},
        "device": "cpu",
    }
    return Config.from_dict(given).override(["data.calibration=4", "data.validation=4", *overrides])


def refused(config, kind=RlpruneError) -> str:
    """The error of building a config's workload, which is one short line."""
    with pytest.raises(kind) as caught:
        build_workload(config)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    return text
