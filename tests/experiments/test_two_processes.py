"""The final fine-tune in two processes: the weights of one process with the same batch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers.small import SMALL_LLAMA
from rlprune.cli.main import main
from rlprune.errors import ConfigError, RlpruneError
from rlprune.recovery import processes
from rlprune.recovery.finetune import Schedule, fit
from rlprune.recovery.processes import Team, shared_statistics, team_of

pytest.importorskip("accelerate")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without processes")


@pytest.fixture
def alone(tmp_path: Path):
    """A group of one process: what is summed over it is what it was."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class _Half(Team):
    """Two processes of which this is the only one that is here."""

    def __init__(self, rank: int, world: int = 2) -> None:
        class State:
            process_index, num_processes = rank, world

        self._state = State()


def test_shares_of_a_batch_are_disjoint_and_whole():
    images, labels = torch.arange(5.0)[:, None], torch.arange(5)
    (one, first), (two, second) = (_Half(rank).share((images, {"y": labels})) for rank in (0, 1))
    assert torch.equal(torch.cat([one[0], two[0]]), images)
    assert torch.equal(torch.cat([one[1]["y"], two[1]["y"]]), labels) and first + second == 1.0
    with pytest.raises(RlpruneError, match="finish.batch_size: a batch of 5 cannot be shared among 6"):
        _Half(0, 6).share((images, labels))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_shared_statistics_are_those_of_a_plain_batch_norm(alone, momentum):
    torch.manual_seed(0)
    plain, shared = (nn.BatchNorm2d(3, momentum=momentum).double() for _ in range(2))
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) * 3 + 7
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    weights = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    for _ in range(2):
        (plain(inputs[0]) * weights).sum().backward()
        with shared_statistics(shared):
            (shared(inputs[1]) * weights).sum().backward()
    assert "forward" not in vars(shared)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-9, atol=1e-12)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(value, shared.state_dict()[name], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(plain.eval()(x), shared.eval()(x), rtol=1e-9, atol=1e-12)


def test_a_team_of_one_trains_as_one_process_does(alone):
    def trained(team: Team | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        spare = nn.Linear(2, 2)  # has no gradient: it stays as it is, weight decay or not
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))
        model.spare = spare
        model.forward = lambda x: nn.Sequential(*list(model)[:4])(x)
        data = torch.randn(6, 4, 1, 5, 5, generator=torch.Generator().manual_seed(1))
        batches = [(x, torch.tensor([0, 1, 0, 1])) for x in data]
        fit(model, lambda g: batches, nn.functional.cross_entropy, Schedule(12, lr=0.1), team=team)
        return dict(model.state_dict())

    plain, team = trained(None), trained(_Half(0, 1))
    for name, value in plain.items():
        torch.testing.assert_close(team[name], value, rtol=1e-5, atol=1e-6)


def test_one_process_has_no_team(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert team_of(torch.device("cpu")) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ConfigError, match=r"2 processes were started, .*pip install 'rlprune\[language\]'"):
        team_of(torch.device("cpu"))
    assert processes.process_count() == 2


def test_a_search_under_a_launcher_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "digits", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "rlprune train runs in one process, but a launcher started 2" in said
    assert "accelerate launch -m rlprune.experiments.tune" in said and not (tmp_path / "run").exists()


def tuned(folder: Path, config: str, out: Path, settings: Sequence[str], count: int, **env: str) -> str:
    """The fine-tune of a saved model in some processes; returns what they printed."""
    words = ["-m", "rlprune.experiments.tune", str(folder), config, "--out", str(out), "--set", *settings]
    if count > 1:
        words = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), *words]
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def largest_difference(one: Path, two: Path) -> float:
    ours, theirs = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert list(ours) == list(theirs)
    return max(float((ours[k].double() - theirs[k].double()).abs().max()) for k in ours)


IMAGES = (
    *("model.arguments.width=4", "model.train.epochs=1", "data.train=256", "data.calibration=64"),
    *("data.validation=64", "device=cpu", "threads=1"),
)
PRUNED = {
    "digits": (
        IMAGES,
        ("recovery.steps=[bn]", "prune.importance=l2"),
        ("finish.epochs=2", "finish.batch_size=32"),
    ),
    "tiny_llama": (
        (*SMALL_LLAMA, "threads=1"),
        ("recovery.steps=[none]", "prune.importance=l2", "recovery.shrink=0"),
        ("finish.steps=8", "finish.batch_size=4", "finish.method=full", "finish.lr=0.001"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("config", PRUNED)
def test_two_processes_give_the_weights_of_one(config, tmp_path):
    """Equal up to the order of float32 sums: 1e-5 where the fine-tune itself moves weights by more than 1e-3."""
    common, pruning, tuning = PRUNED[config]
    assert (
        main(["prune", config, "--rule", "uniform", "--out", str(tmp_path / "p"), "--set", *common, *pruning])
        == 0
    )
    settings = [*common, *tuning]
    one = tuned(tmp_path / "p", config, tmp_path / "one", settings, 1)
    two = tuned(tmp_path / "p", config, tmp_path / "two", settings, 2)
    print(one, two, largest_difference(tmp_path / "one", tmp_path / "two"))
    assert largest_difference(tmp_path / "p", tmp_path / "one") > 1e-3
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5
    assert one.count("validation loss") == two.count("validation loss") == 2  # printed by one of them
    assert not list(tmp_path.glob("*.state"))
