"""The shipped digits config, cut down to seconds, and the part of settings that a command uses."""

from __future__ import annotations

from collections.abc import Sequence

from rlprune import load_config
from rlprune.experiments import Experiment, prepare_experiment

# A narrow network that learns enough in two epochs to have something to lose: what every command but `inspect` uses.
SMALL_DIGITS = (
    "model.arguments.width=4",
    "model.train.epochs=2",
    "data.calibration=64",
    "data.validation=100",
    "device=cpu",
)
# What a search and a final fine-tune use beside it.
SMALL_SEARCH = (
    *SMALL_DIGITS,
    "search.evaluations=6",
    "search.batch=3",
    "search.ppo.surrogate_steps=128",
    "search.ppo.surrogate_envs=8",
    "finish.epochs=1",
    "finish.candidates=2",
)
SMALL_RUN = (*SMALL_SEARCH, "finish.rules=false")


def small_experiments() -> dict[str, Experiment]:
    """One with curves of what cuts are expected to cost, and one without, by the ranking of their units."""
    settings = [*SMALL_DIGITS, "threads=1"]
    return {
        name: prepare_experiment(load_config("digits", [*settings, f"prune.importance={name}"]))
        for name in ("obs_fisher", "taylor")
    }


def without(settings: Sequence[str], *prefixes: str) -> list[str]:
    """``--set`` words of the settings that do not start with one of the prefixes."""
    return [word for text in settings if not text.startswith(prefixes) for word in ("--set", text)]


# The shipped language model, cut down to seconds.
SMALL_LLAMA = (
    "model.arguments.layers=2",
    "model.train.epochs=1",
    "data.train=32",
    "data.calibration=8",
    "data.validation=8",
    "data.test=8",
    "device=cpu",
)
