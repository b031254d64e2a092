"""The candidate path where the model is on another device than the CPU: same numbers, and few waits for the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import ghost
from helpers.ghost_runs import cases
from helpers.workloads import Noise
from rlprune.config.config import load_config
from rlprune.errors import ConfigError, DataError
from rlprune.workloads.checks import check_workload

TESTS = Path(__file__).parents[1]
NAMES = [name for name, _, _ in cases()]
# The layers of the small ResNet that read what is cut: each is solved anew for a plan, and takes another way where it
# cannot be factorised.
SOLVED = 19
# What a candidate waits for at the end: scores, losses, metric, and the logits of its one batch.
FEW = 4
# Scores of training samples, and the logits of each of their batches.
MORE = 2
ALLOWED = {
    "images, none, kl": FEW + MORE,
    "images, bn, kl": FEW + MORE,
    "images, bn, loss": FEW,
    "images, bn, accuracy": FEW,  # of each batch, whose scores are its mean
    "images, reconstruct + bn, kl": FEW + MORE + SOLVED,
    "images, all, kl": FEW + MORE + SOLVED + 2,  # the loss, looked at a few times a second
    # One forward pass of transformers asks for a value (is the mask all ones?); scores, losses, tokens and metric of a
    # batch of thousands of tokens.
    "texts, none, kl": 7,
    "texts, bias, kl": 7,
    "texts, reconstruct, kl": 7,
    "texts, reconstruct, loss": 5,
    "texts, all, kl": 14,
}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """Case -> what it gave on the CPU and on the device."""
    if torch.cuda.is_available():
        pytest.skip("a real GPU is here: docs/scripts/gpu.py runs the same on it")
    paths = [str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "helpers.ghost_runs"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {facts["case"]: facts for facts in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", NAMES)
def test_a_device_changes_nothing(name: str, found: dict[str, dict[str, Any]]) -> None:
    facts = found[name]
    assert "error" not in facts, facts["error"]
    assert facts["found"] == pytest.approx(facts["wanted"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ALLOWED)
def test_a_candidate_waits_for_its_device_a_few_times(name: str, found: dict[str, dict[str, Any]]) -> None:
    waits = found[name]["waits"]
    assert 0 < sum(waits.values()) <= ALLOWED[name], json.dumps(waits, indent=1)


def test_every_candidate_has_its_number_of_waits() -> None:
    candidates = [n for n in NAMES if "importance" not in n and "fine-tune" not in n]
    assert sorted(candidates) == sorted(ALLOWED)


class TestTheDevice:
    """The device of these tests minds what a GPU minds."""

    def test_it_is_where_it_says(self) -> None:
        with ghost.watched() as watch:
            layer = torch.nn.Linear(3, 2).to(ghost.DEVICE)
            out = layer(torch.ones(4, 3, device=ghost.DEVICE)).sum()
            out.backward()
            assert out.device == layer.weight.device == layer.weight.grad.device == ghost.DEVICE
            assert watch.total == 0
            assert out.detach().cpu().device.type == "cpu"
            assert watch.total == 1

    def test_tensors_of_two_devices_are_refused(self) -> None:
        with ghost.watched():
            here, there = torch.ones(3), torch.ones(3, device=ghost.DEVICE)
            with pytest.raises(ghost.Mixed, match="on the CPU"):
                here + there
            with pytest.raises(ghost.Mixed, match="index_select"):
                there.index_select(0, torch.tensor([0]))
            assert (there * torch.tensor(2.0)).sum().item() == 6  # a number may stand anywhere, as on CUDA

    def test_a_generator_of_another_device_is_refused(self) -> None:
        with ghost.watched():
            draw = torch.Generator().manual_seed(0)
            assert torch.rand(2, generator=draw).shape == (2,)
            with pytest.raises(ghost.Mixed, match="generator"):
                torch.rand(2, generator=draw, device=ghost.DEVICE)
            with pytest.raises(ghost.Mixed, match="generator"):
                torch.ones(3, device=ghost.DEVICE).uniform_(generator=draw)

    @pytest.mark.parametrize(
        "wait",
        [
            lambda x: x.sum().item(),
            lambda x: bool(x.any()),
            lambda x: x.cpu(),
            lambda x: x.nonzero(),
            lambda x: x[x > 0],
            lambda x: torch.empty(3).copy_(x),
            lambda x: torch.equal(x, x + 1),
        ],
    )
    def test_waits_are_counted(self, wait: Any) -> None:
        with ghost.watched() as watch:
            wait(torch.arange(3.0, device=ghost.DEVICE))
            assert watch.total == 1, watch.waits

    def test_float64_can_be_refused(self) -> None:
        with ghost.watched(doubles=False):
            there = torch.ones(3, device=ghost.DEVICE)
            with pytest.raises(ghost.NoDoubles):
                there.double()
            assert there.cpu().double().dtype == torch.float64


def test_a_device_without_float64_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"device: allowed are auto, cpu, cuda and cuda:N, got 'mps' \(it has no float64"
    ):
        load_config("digits", ["device=mps"])

    class Workload(Noise):
        device = torch.device("mps")

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    with pytest.raises(DataError, match="is on mps, where models cannot be pruned .*; move it to the CPU"):
        check_workload(Workload(model))
