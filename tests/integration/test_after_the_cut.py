"""What becomes of a pruned folder by the commands: it is pruned again, and exported with what its run knows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import rlprune
from helpers.small import SMALL_DIGITS
from rlprune.artifacts.documents import read_plan
from rlprune.cli import main as cli

SETS = [word for override in SMALL_DIGITS for word in ("--set", override)]

OWN = """
import torch, rlprune
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 2)
    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))

class Mine(rlprune.Workload):
    def __init__(self):
        torch.manual_seed(0)
        self.model, self.example_inputs = Net().eval(), torch.zeros(1, 1, 8, 8)
    def batches(self, split, limit=None):
        inputs = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(len(split)))
        yield inputs, (inputs.mean((1, 2, 3)) > 0.5).long()
"""


def done(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    code = cli.main(list(words))
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def test_a_pruned_model_is_pruned_again(
    place: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    done(capsys, "prune", "digits", *SETS, "--rule", "uniform", "--budget", "60%", "--out", "once")
    again = ["prune", "digits", *SETS, "--rule", "lamp", "--budget", "70%", "--checkpoint", "once"]
    done(capsys, *again, "--out", "twice")
    once, twice = read_plan("once"), read_plan("twice")
    assert once["fingerprint"] == twice["fingerprint"] and once["base"] == twice["base"]
    assert 0.35 < twice["cost"]["macs"] / once["dense_cost"]["macs"] <= 0.42
    for before, after in zip(once["groups"], twice["groups"], strict=True):
        assert set(after["kept"]) <= set(before["kept"])
    assert twice["origin"]["after"] == once["origin"] and twice["origin"]["method"] == "lamp"
    slim = rlprune.load("twice")
    macs = rlprune.tracing.count_macs(slim, torch.zeros(1, 1, 8, 8))
    assert macs == twice["cost"]["macs"]
    table = done(capsys, "evaluate", "twice", "digits", *SETS)
    assert f"{twice['cost']['macs']:,.0f}" in table
    other = [*SETS, "--set", "model.arguments.width=5"]
    assert "another architecture" in refused(
        "prune", "digits", *other, "--rule", "lamp", "--checkpoint", "once"
    )
    (place / "empty").mkdir()
    line = refused("prune", "digits", *SETS, "--rule", "lamp", "--checkpoint", "empty")
    assert "--checkpoint: empty: is a folder, but of no pruned model" in line


@pytest.fixture
def own(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (place / "own_net.py").write_text(OWN)
    (place / "own.yaml").write_text("workload: own_net:Mine\nbudget: {target: 70%}\n")
    monkeypatch.syspath_prepend(place)
    yield place
    sys.modules.pop("own_net", None)


def test_a_model_of_the_users_own_is_exported_with_its_workload(
    own: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    done(capsys, "prune", "own.yaml", "--rule", "uniform", "--out", "run/pruned")
    assert "pass base=model" in refused("export", "run/pruned", "--to", "torch-export")
    done(capsys, "export", "run/pruned", "own.yaml", "--to", "torch-export", "--out", "given.pt2")
    (own / "run" / "config.yaml").write_text("name: of another program")
    assert "pass base=model" in refused("export", "run", "--to", "torch-export")
    (own / "run" / "config.yaml").write_text((own / "own.yaml").read_text())  # as `train` leaves it
    (own / "run" / "results.json").write_text("{}")
    done(capsys, "export", "run", "--to", "torch-export")
    done(capsys, "export", "run/pruned", "--to", "torch-export", "--out", "found.pt2")
    from own_net import Net  # type: ignore[import-not-found]

    slim, x = rlprune.load("run/pruned", base=Net()), torch.rand(3, 1, 8, 8)
    for path in ("given.pt2", "found.pt2", "run/pruned/model.pt2"):
        torch.testing.assert_close(torch.export.load(path).module()(x), slim(x))
    (own / "mine.pt2").write_text("not ours")
    words = ("export", "run", "--to", "torch-export", "--out", "mine.pt2")
    assert "rlprune did not write it" in refused(*words)
    done(capsys, *words, "--force")


def test_a_known_architecture_in_a_workload_of_the_users_own_is_recognised(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = OWN.replace("Net().eval()", "SmallNet(20, width=4, channels=1, classes=2).eval()")
    text = known.replace(
        "import torch, rlprune",
        "import torch, rlprune\nfrom rlprune.vision.resnet_cifar import CifarResNet as SmallNet",
    )
    (own / "own_net.py").write_text(text)
    done(capsys, "prune", "own.yaml", "--rule", "uniform", "--out", "pruned")
    assert read_plan("pruned")["base"]["name"] == "cifar_resnet20"
    done(capsys, "export", "pruned", "--to", "torch-export")


def test_other_files_are_not_written_over_either(
    place: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "notes.json").write_text('{"mine": 1}')
    (place / "photos").mkdir()
    (place / "photos" / "holiday.jpg").write_text("x")
    assert "notes.json" in refused("schema", "--out", "notes.json")
    for command in (
        ("prune", "digits", *SETS, "--rule", "uniform"),
        ("train", "digits", *SETS),
        ("fidelity", "digits", *SETS, "--candidates", "4"),
        ("benchmark", "digits", *SETS, "--methods", "uniform"),
    ):
        assert "holiday.jpg" in refused(*command, "--out", "photos")
    done(capsys, "schema", "--out", "schema.json")
    done(capsys, "schema", "--out", "schema.json")
