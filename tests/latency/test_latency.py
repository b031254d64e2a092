"""Latency is measured in turns, per batch size, and leaves the models as they were."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from rlprune.errors import DataError
from rlprune.utils.timing import in_turns, measure, quiet_clock


class Slow(nn.Module):
    """Sleeps for a time proportional to the batch; notes the order of its calls and its mode."""

    def __init__(self, name: str, seconds: float, log: list[tuple[str, int]]) -> None:
        super().__init__()
        self.name, self.seconds, self.log = name, seconds, log

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        self.log.append((self.name, len(x)))
        time.sleep(self.seconds * len(x))
        return x


def test_a_slower_model_reads_slower_and_units_are_milliseconds() -> None:
    log: list[tuple[str, int]] = []
    models = {"fast": Slow("fast", 0.002, log), "slow": Slow("slow", 0.008, log)}
    result = measure(models, torch.zeros(1, 3), batch_sizes=(1, 3), repeats=5)
    assert set(result) == {"fast", "slow"} and set(result["fast"]) == {1, 3}
    assert 2 <= result["fast"][1] < 8 <= result["slow"][1]
    assert 24 <= result["slow"][3]


def test_models_run_in_turns_and_get_their_mode_back() -> None:
    log: list[tuple[str, int]] = []
    models = {"a": Slow("a", 0.0, log).train(), "b": Slow("b", 0.0, log).eval()}
    measure(models, torch.zeros(1, 3), batch_sizes=(2,), repeats=3, warmup=0)
    assert log == [("a", 2), ("b", 2), ("b", 2), ("a", 2), ("a", 2), ("b", 2)]
    assert models["a"].training and not models["b"].training


def test_the_time_limit_ends_the_rounds_but_not_before_three() -> None:
    seconds = in_turns({"a": lambda: time.sleep(0.01)}, repeats=100, budget_seconds=0.0)
    assert len(seconds["a"]) == 3


@pytest.mark.parametrize("kwargs", [{"batch_sizes": (0,)}, {"repeats": 0}])
def test_impossible_settings_are_refused_in_one_line(kwargs: dict) -> None:
    with pytest.raises(DataError, match="latency") as error:
        measure({"a": nn.Identity()}, torch.zeros(1, 3), **kwargs)
    assert "\n" not in str(error.value)


def test_a_settled_call_follows_untimed_ones_of_its_own() -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = in_turns(calls, repeats=2, warmup=0, settle=1)
    assert order == ["a", "a", "b", "b", "b", "b", "a", "a"]
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2}


def test_the_quiet_clock_leaves_out_the_time_that_others_take() -> None:
    clock, start = quiet_clock(torch.device("cpu")), time.perf_counter()
    before = clock()
    time.sleep(0.2)
    assert clock() - before < 0.1 < time.perf_counter() - start
    assert quiet_clock(torch.device("meta")) is time.perf_counter
