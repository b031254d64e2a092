"""Workloads built from settings: dense training and its cache, checkpoints, models and workloads of users."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlprune.artifacts.checkpoint import CheckpointWarning
from rlprune.config.config import Config
from rlprune.errors import ArtifactError, ConfigError, GraphError, RlpruneError
from rlprune.experiments.build import build_workload
from rlprune.vision.workload import VisionWorkload
from rlprune.vision.zoo import build_model

pytestmark = pytest.mark.usefixtures("own_cache")


def settings() -> Config:
    values: dict = {
        "model": {
            "name": "cifar_resnet20",
            "arguments": {"width": 4},
            "train": {"epochs": 3, "lr": 0.05, "batch_size": 64},
        },
        "data": {"name": "digits"},
        "device": "cpu",
    }
    return Config.from_dict(values)


def test_dense_training_is_cached_by_content(own_cache: Path) -> None:
    config = settings()
    calls: list[tuple] = []
    workload = build_workload(config, progress=lambda *a: calls.append(a))
    assert calls[-1][:3] == ("dense training", 36, 36)
    assert workload.evaluate(workload.model, "validation").metric > 0.2  # by chance 0.1
    assert not workload.model.training
    files = list((own_cache / "dense").iterdir())
    assert [p.suffix for p in files] == [".safetensors"]
    calls.clear()
    again = build_workload(config, progress=lambda *a: calls.append(a))
    assert calls == []
    assert torch.equal(again.model.conv1.weight, workload.model.conv1.weight)
    files[0].write_bytes(b"broken")
    third = build_workload(config)
    assert torch.equal(third.model.conv1.weight, workload.model.conv1.weight)
    seeded = build_workload(config, seed_override=9)
    assert not torch.equal(seeded.model.conv1.weight, workload.model.conv1.weight)
    build_workload(config.override(["model.train.lr=0.04"]))
    assert len(list((own_cache / "dense").iterdir())) == 3


def test_killed_dense_training_goes_on(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings()
    monkeypatch.setenv("RLPRUNE_CACHE", str(own_cache / "whole"))
    whole = build_workload(config)
    monkeypatch.setenv("RLPRUNE_CACHE", str(own_cache / "killed"))
    monkeypatch.setattr("rlprune.recovery.finetune._State.due", lambda self: True)

    original, count = VisionWorkload.train_batches, 0

    def dying(self: VisionWorkload, *arguments: object) -> Iterator:
        nonlocal count
        for batch in original(self, *arguments):  # type: ignore[arg-type]
            count += 1
            if count == 20:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(VisionWorkload, "train_batches", dying)
        with pytest.raises(KeyboardInterrupt):
            build_workload(config)
    resumed = build_workload(config)
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert [p.suffix for p in (own_cache / "killed" / "dense").iterdir()] == [".safetensors"]


def test_checkpoints_are_fine_tuned_or_taken_as_they_are(tmp_path: Path) -> None:
    given = build_model("cifar_resnet20", channels=1, arguments={"width": 4}, seed=42)
    path = tmp_path / "given.safetensors"
    save_file(given.state_dict(), path)
    config = settings()
    finished = build_workload(config, checkpoint=path)
    assert torch.equal(finished.model.conv1.weight, given.conv1.weight)
    tuned_config = config.override(
        [f"model.checkpoint={path}", "model.train.epochs=1", "model.train.lr=0.001"]
    )
    tuned = build_workload(tuned_config)
    distance = (tuned.model.conv1.weight - given.conv1.weight).abs().max()
    assert 0 < distance < 0.1
    plain = build_workload(tuned_config, train=False)
    assert torch.equal(plain.model.conv1.weight, given.conv1.weight)
    assert plain.base == {
        "source": "zoo",
        "name": "cifar_resnet20",
        "arguments": {"classes": 10, "channels": 1, "width": 4},
    }


def test_a_checkpoint_of_other_classes_is_for_training_only(tmp_path: Path) -> None:
    given = build_model("cifar_resnet20", classes=7, channels=1, arguments={"width": 4}, seed=42)
    path = tmp_path / "last.pth.tar"
    torch.save({"state_dict": {f"module.{n}": t for n, t in given.state_dict().items()}}, path)
    config = settings().override(
        [f"model.checkpoint={path}", "model.train.epochs=1", "model.train.lr=0.0001"]
    )
    with pytest.warns(CheckpointWarning, match="'linear' starts anew"):
        tuned = build_workload(config)
    assert 0 < (tuned.model.conv1.weight - given.conv1.weight).abs().max() < 0.01
    refused = r"'linear\.weight' has shape \(7, 16\).*model\.train\.epochs"
    with pytest.raises(ArtifactError, match=refused):
        build_workload(config.override(["model.train.epochs=0"]))
    with pytest.raises(ArtifactError, match=refused):
        build_workload(config, checkpoint=path)


def test_the_key_of_a_checkpoint_chooses_its_weights(tmp_path: Path) -> None:
    raw, ema = (build_model("cifar_resnet20", channels=1, arguments={"width": 4}, seed=s) for s in (1, 2))
    path = tmp_path / "last.pth.tar"
    torch.save({"state_dict": raw.state_dict(), "state_dict_ema": ema.state_dict()}, path)
    config = settings().override(["model.train.epochs=0", f"model.checkpoint={path}"])
    with pytest.raises(ArtifactError, match=r"'state_dict' and 'state_dict_ema'.*model\.checkpoint_key"):
        build_workload(config)
    chosen = config.override(["model.checkpoint_key=state_dict_ema"])
    assert torch.equal(build_workload(chosen).model.conv1.weight, ema.conv1.weight)
    unread = chosen.override(["model.checkpoint=null"])
    assert torch.equal(build_workload(unread, checkpoint=path).model.conv1.weight, ema.conv1.weight)
    with pytest.raises(ConfigError, match=r"model\.checkpoint_key: no checkpoint is read"):
        build_workload(unread)


MODELS = """
import torch
from torch import nn

class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
    def forward(self, x):
        raise RuntimeError("I refuse\\nwith two lines")

def nan():
    model = good()
    model[0].weight.data[0] = float("nan")
    return model

def good(classes=10):
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, classes))

def workload(config):
    from tests_own_workload import Own
    return Own(config.model.seed)
"""


OWN = """
import torch
from rlprune.workloads import Workload

class Own(Workload):
    base = {"source": "given"}
    def __init__(self, seed):
        torch.manual_seed(seed)
        self.model = torch.nn.Linear(3, 2)
        self.example_inputs = torch.zeros(1, 3)
    def batches(self, split, limit=None):
        yield torch.zeros(4, 3), torch.zeros(4).long()
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests_own_models.py").write_text(MODELS)
    (tmp_path / "tests_own_workload.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("tests_own_models", "tests_own_workload"):  # an earlier test's file may be gone
        monkeypatch.delitem(sys.modules, name, raising=False)


def own(name: str, *overrides: str) -> Config:
    values = {"model": {"name": f"tests_own_models:{name}"}, "data": {"name": "digits"}, "device": "cpu"}
    return Config.from_dict(values).override(overrides)


@pytest.mark.usefixtures("own_code")
def test_a_users_model_is_checked_before_anything_else() -> None:
    workload = build_workload(own("good", "model.train.epochs=1"))
    assert workload.base["source"] == "function"
    with pytest.raises(GraphError, match=r"forward raises.*\(1, 1, 8, 8\): RuntimeError: I refuse$"):
        build_workload(own("Raises"))
    with pytest.raises(ArtifactError, match=r"'0\.weight' holds NaN"):
        build_workload(own("nan"))
    with pytest.raises(ConfigError, match=r"\(1, 3\) for one image, but the data has 10 classes"):
        build_workload(own("good", "model.arguments.classes=3"))


@pytest.mark.usefixtures("own_code")
def test_a_users_workload_from_settings(tmp_path: Path) -> None:
    config = Config.from_dict({"workload": "tests_own_models:workload"})
    first, again, other = (build_workload(config, seed_override=s) for s in (1, 1, 2))
    assert first.size("validation") == 4
    assert torch.equal(first.model.weight, again.model.weight)
    assert not torch.equal(first.model.weight, other.model.weight)
    path = tmp_path / "linear.safetensors"
    save_file(other.model.state_dict(), path)
    assert torch.equal(build_workload(config, checkpoint=path).model.weight, other.model.weight)
    with pytest.raises(ConfigError, match=r"must return a rlprune\.Workload"):
        build_workload(config.override(["workload=builtins:id"]))


@pytest.mark.usefixtures("own_code")
def test_divergence_and_missing_devices_are_one_line(own_cache: Path) -> None:
    wild = [f"model.train.{setting}" for setting in ("lr=10.0", "weight_decay=1.0", "epochs=20")]
    with pytest.raises(RlpruneError, match=r"lower model\.train\.lr, now 10\.0"):
        build_workload(own("good", *wild))
    assert list((own_cache / "dense").glob("*")) == []
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device: cuda:7"):
            build_workload(settings().override(["device=cuda:7"]))
