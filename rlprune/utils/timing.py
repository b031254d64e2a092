"""Measured latency: models are timed in turns, so that a change of the machine's load hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ..errors import DataError
from .memory import settle_heap
from .pytrees import Inputs, batch_size, device_of, repeat
from .pytrees import call as run

DEFAULT_BATCH_SIZES = (1, 64)
Clock = Callable[[], float]


def measure(
    models: Mapping[str, nn.Module],
    example_inputs: Inputs,
    batch_sizes: Sequence[int] = DEFAULT_BATCH_SIZES,
    repeats: int = 30,
    budget_seconds: float = 20.0,
    warmup: int = 3,
    clock: Clock = time.perf_counter,
    settle: int = 0,
    statistic: Callable[[Sequence[float]], float] = statistics.median,
) -> dict[str, dict[int, float]]:
    """Median milliseconds of one forward pass, for every model and batch size.

    The models run in turns (a round times each of them once, every second round backwards): timing one
    model after the other would charge a slow minute of the machine to the model that happened to run.
    A run that loses the time limit keeps the rounds it has, at least three of them.

    Args:
        models: name -> model; each is put into eval mode while measured and set back afterwards.
        example_inputs: one sample, (1, ...) or a nest of inputs (see `rlprune.utils.pytrees`), on the models' device;
            repeated along the batch.
        batch_sizes: positive batch sizes.
        repeats: rounds to measure, at most.
        budget_seconds: time limit in seconds for each batch size, warm-up not counted.
        warmup: forward passes of each model before the clock runs.
        clock: seconds; `quiet_clock` where other work shares the processor.
        settle: untimed passes right before each timed one, so that the caches hold this model's weights and not
            its neighbour's in the round: the latency of a model that runs alone, again and again.
        statistic: what is kept of the rounds; ``min`` on a machine that others use, who only make a pass longer.

    Returns:
        {name: {batch size: milliseconds}}.

    Raises:
        DataError: a batch size, the number of rounds or the example is unusable.
    """
    if repeats < 1 or any(size < 1 for size in batch_sizes):
        raise DataError(f"latency: repeats {repeats}, batch sizes {tuple(batch_sizes)}: must be at least 1")
    if batch_size(example_inputs, "latency: example_inputs") < 1:
        raise DataError("latency: example_inputs: needs at least one sample")
    training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    try:
        result: dict[str, dict[int, float]] = {name: {} for name in models}
        for size in batch_sizes:
            inputs = repeat(example_inputs, int(size))
            calls = {name: timed(model, inputs) for name, model in models.items()}
            for name, seconds in in_turns(calls, repeats, budget_seconds, warmup, clock, settle).items():
                result[name][int(size)] = 1e3 * statistic(seconds)
        return result
    finally:
        for name, model in models.items():
            model.train(training[name])


def in_turns(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    budget_seconds: float = float("inf"),
    warmup: int = 1,
    clock: Clock = time.perf_counter,
    settle: int = 0,
) -> dict[str, list[float]]:
    """Seconds of every call of each function, taken in interleaved rounds (see `measure`)."""
    settle_heap()
    for call in calls.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + budget_seconds
    for done in range(repeats):
        if done >= 3 and time.perf_counter() > deadline:
            break
        for name in list(calls) if done % 2 == 0 else list(calls)[::-1]:
            for _ in range(settle):
                calls[name]()
            start = clock()
            calls[name]()
            seconds[name].append(clock() - start)
    return seconds


def quiet_clock(device: torch.device) -> Clock:
    """The clock that other processes disturb least.

    With one CPU thread it is the thread's own processor time: what a forward pass takes on an idle core, without
    the milliseconds for which the system gave the core to somebody else. Elsewhere it is the time on the wall.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if alone else time.perf_counter


def timed(model: nn.Module, inputs: Inputs) -> Callable[[], None]:
    """A forward pass as a function to be timed."""
    device = device_of(inputs)

    def call() -> None:
        with torch.inference_mode():
            run(model, inputs)
        if device.type == "cuda":  # kernels are queued; the clock has to wait for them
            torch.cuda.synchronize(device)

    return call
