"""The candidate path on a device that is there: `RLPRUNE_TEST_DEVICE=cuda pytest tests/device`.

What `tests/evaluation/test_other_device.py` runs on a device that is not there, and what only a real one can show.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import rlprune
from helpers.ghost_runs import IMAGE_RECOVERIES, cases, evaluator, images, texts
from rlprune.config.training import FinishConfig
from rlprune.workloads.adapter import TuneJob

NAME = os.environ.get("RLPRUNE_TEST_DEVICE", "")
pytestmark = pytest.mark.skipif(not NAME, reason="RLPRUNE_TEST_DEVICE names the device")
CASES = {name: (make, case) for name, make, case in cases()}


@pytest.fixture(autouse=True)
def exact() -> None:
    """float32 products in float32: a GPU's shorter formats would be compared with the CPU's numbers."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


@pytest.mark.parametrize("name", CASES)
def test_a_device_gives_the_numbers_of_the_cpu(name: str) -> None:
    make, case = CASES[name]
    wanted, found = case(make("cpu"), None)[0], case(make(NAME), None)[0]
    # Gradient steps carry differences of rounding on.
    close = (
        {"rel": 5e-2, "abs": 5e-2} if "fine-tune" in name or ", all," in name else {"rel": 2e-3, "abs": 1e-3}
    )
    assert found == pytest.approx(wanted, **close)


@pytest.mark.parametrize("name", CASES)
def test_twice_is_the_same(name: str) -> None:
    if "fine-tune" in name or ", all," in name:
        pytest.skip("sums of gradients are not ordered on every device")
    make, case = CASES[name]
    assert case(make(NAME), None)[0] == pytest.approx(case(make(NAME), None)[0], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("make", [images, texts])
def test_what_is_saved_loads_on_the_cpu(make: object, tmp_path: Path) -> None:
    workload = make(NAME)  # type: ignore[operator]
    space = rlprune.trace(workload.model, workload.example_inputs)
    found = evaluator(workload, space, IMAGE_RECOVERIES["none"], "kl", "params")
    widths = space.project(np.ones(len(space.groups)), 0.8, "params")
    slim = found.build(widths)
    rlprune.save(slim, found.plan(widths), tmp_path / "pruned")
    loaded = rlprune.load(tmp_path / "pruned", base=make("cpu").architecture)  # type: ignore[operator]
    assert {str(t.device) for t in loaded.state_dict().values()} == {"cpu"}
    for name, tensor in slim.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.cpu()), name


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_language_model_is_fine_tuned(method: str) -> None:
    workload = texts(NAME)
    space = rlprune.trace(workload.model, workload.example_inputs)
    slim = evaluator(workload, space, IMAGE_RECOVERIES["none"], "kl", "params").build(space.widths)
    before = workload.evaluate(slim, "validation").loss
    settings = FinishConfig(method=method, steps=8, batch_size=4, lr=3e-3, distill=False)
    workload.fine_tune(slim, settings, TuneJob(0))
    assert next(slim.parameters()).device.type == torch.device(NAME).type
    assert workload.evaluate(slim, "validation").loss < before
