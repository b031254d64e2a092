"""Wrong inputs through the real command line: exit 2, one line on standard error, nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.small import SMALL_DIGITS
from rlprune.cli import main as cli
from rlprune.config.config import load_config
from rlprune.utils import files
from rlprune.vision.zoo import build_model

SETS = [word for override in SMALL_DIGITS for word in ("--set", override)]


def train(refused: Callable[..., str], *overrides: str) -> str:
    return refused("train", "digits", *SETS, *(w for o in overrides for w in ("--set", o)), "--out", "run")


@pytest.mark.parametrize("target", ["0", "1.5", "abc"])
def test_budgets_that_are_none(target: str, refused: Callable[..., str]) -> None:
    assert "budget.target: " in train(refused, f"budget.target={target}")
    assert "budget.target: " in refused("prune", "digits", *SETS, "--rule", "erk", "--budget", target)


def test_budget_below_the_feasible_minimum(refused: Callable[..., str]) -> None:
    line = train(refused, "budget.target=0.001")
    assert "below the feasible minimum" in line
    assert "feasible: " in line
    assert "below the feasible minimum" in refused(
        "prune", "digits", *SETS, "--rule", "erk", "--budget", "0.001", "--out", "pruned"
    )


def test_unknown_names(refused: Callable[..., str]) -> None:
    assert "did you mean 'lamp'" in refused("prune", "digits", *SETS, "--rule", "lammp")
    assert "did you mean 'evaluations'" in train(refused, "search.evaluation=3")
    assert "did you mean 'cifar_resnet" in train(refused, "model.name=cifar_resnet21")
    assert "did you mean 'resnet18'" in train(refused, "model.name=resnet81", "model.arguments={}")
    assert "did you mean 'digits'" in train(refused, "data.name=digit")
    assert "did you mean 'ppo'" in train(refused, "search.agent=pppo")


def test_wrong_arguments_of_a_model(refused: Callable[..., str]) -> None:
    assert "wdth" in train(refused, "model.arguments.wdth=3")


@pytest.fixture
def pruned(place: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert cli.main(["prune", "digits", *SETS, "--rule", "uniform", "--out", "pruned"]) == 0
    capsys.readouterr()
    return place / "pruned"


def test_damaged_pruned_models(pruned: Path, refused: Callable[..., str]) -> None:
    model, plan = pruned / "model.safetensors", pruned / "plan.json"
    weights, document = model.read_bytes(), plan.read_text()
    assert "no such folder" in refused("evaluate", "nowhere")
    model.write_bytes(weights[: len(weights) // 2])
    assert "truncated" in refused("evaluate", "pruned", "digits", *SETS)
    model.write_bytes(weights)
    plan.write_text(document[: len(document) // 2])
    assert "truncated or not JSON" in refused("evaluate", "pruned")
    plan.write_text(json.dumps(json.loads(document) | {"version": 99}))
    assert "newer" in refused("evaluate", "pruned", "digits", *SETS)
    plan.write_text('{"name": "some-package"}')
    assert "not a file of a rlprune pruned model" in refused("export", "pruned", "--to", "onnx")
    plan.write_text(document)
    save_file({"other": torch.zeros(3)}, model)
    assert "is missing" in refused("evaluate", "pruned", "digits", *SETS)
    model.unlink()
    assert "no such file" in refused("evaluate", "pruned", "digits", *SETS)


def test_damaged_policies(place: Path, pruned: Path, refused: Callable[..., str]) -> None:
    assert "no such folder" in refused("apply", "nowhere", "digits", *SETS, "--out", "second")
    # A pruned model is no policy: its plan is applied, and a plan has a budget of its own.
    assert "--budget: not for a plan" in refused(
        "apply", "pruned", "digits", *SETS, "--budget", "0.4", "--out", "second"
    )
    assert "--refine: not for a plan" in refused("apply", "pruned", "digits", *SETS, "--refine", "3")
    assert "--builds: not for a plan" in refused("apply", "pruned", "digits", *SETS, "--builds", "3")
    assert "cuts 'layer1.0.conv1', which prune.ignore protects" in refused(
        "apply", "pruned/plan.json", "digits", *SETS, "--set", "prune.ignore=[layer1.0.conv1]"
    )
    assert "prune.drop: only for language models" in refused(
        "apply", "pruned", "digits", *SETS, "--set", "prune.drop=true", "--out", "second"
    )
    other = ("--set", "model.arguments.width=8")
    assert "another architecture" in refused("apply", "pruned", "digits", *SETS, *other, "--out", "second")
    (place / "empty").mkdir()
    assert "policy.json" in refused("apply", "empty", "digits", *SETS, "--out", "second")
    policy = place / "policy"
    policy.mkdir()
    (policy / "policy.json").write_text('{"format": "rlprune policy", "version": 99}')
    assert "newer" in refused("apply", "policy", "digits", *SETS, "--out", "second")
    (policy / "policy.json").write_text('{"format": "rlprune pol')
    assert "truncated" in refused("apply", "policy", "digits", *SETS, "--out", "second")


def test_runs_without_a_policy(place: Path, refused: Callable[..., str]) -> None:
    run = place / "run"
    run.mkdir()
    (run / "config.yaml").write_text(load_config("digits", ["search.agent=random"]).to_yaml())
    line = refused("apply", "run", "digits", *SETS, "--out", "second")
    assert "RUN_OR_POLICY: run: this run of the agent 'random' is not complete" in line
    assert "train CONFIG --resume --out run" in line
    (run / "results.json").write_text("{}")
    line = refused("apply", "run", "digits", *SETS, "--out", "second")
    assert "RUN_OR_POLICY: run: the agent of this run, 'random', has left no policy" in line
    assert "--set search.agent=ppo" in line and str(Path("run") / "pruned") in line
    (run / "policy").mkdir()
    assert "policy.json: no such file" in refused("apply", "run", "digits", *SETS, "--out", "second")


def test_damaged_runs(place: Path, refused: Callable[..., str]) -> None:
    (place / "run").mkdir()
    assert "results.json" in refused("report", "run")
    (place / "run" / "results.json").write_text('{"version": 99, "rows": []}')
    assert "version" in refused("report", "run")
    (place / "run" / "results.json").write_text('{"version": 1, "ro')
    assert "damaged" in refused("report", "run")


class Runs:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.mkdir, ("pickle-ran",)  # type: ignore[return-value]


def test_checkpoints(place: Path, refused: Callable[..., str]) -> None:
    assert "no such file" in train(refused, "model.checkpoint=missing.safetensors")
    (place / "evil.pt").write_bytes(pickle.dumps({"state_dict": Runs()}))
    assert "checkpoint" in train(refused, "model.checkpoint=evil.pt")
    torch.save({"state_dict": Runs()}, place / "evil2.pt")
    assert "pickled code" in train(refused, "model.checkpoint=evil2.pt")
    assert not (place / "pickle-ran").exists()
    state = build_model("cifar_resnet20", 10, 1, arguments={"width": 4}).state_dict()
    state["layer1.0.conv1.weight"][0, 0] = float("nan")
    save_file(state, place / "nan.safetensors")
    assert "layer1.0.conv1.weight" in train(refused, "model.checkpoint=nan.safetensors")
    (place / "short.safetensors").write_bytes((place / "nan.safetensors").read_bytes()[:5000])
    assert "truncated" in train(refused, "model.checkpoint=short.safetensors")
    save_file(build_model("cifar_resnet32", 10, 1).state_dict(), place / "deep.safetensors")
    assert "does not fit the model" in train(refused, "model.checkpoint=deep.safetensors")


def test_data(place: Path, refused: Callable[..., str]) -> None:
    assert "data.root 'nowhere'" in train(refused, "data.name=image_folder", "data.root=nowhere")
    assert "data.root 'nowhere'" in train(refused, "data.name=fashion_mnist", "data.root=nowhere")
    (place / "empty").mkdir()
    assert "data.download" in train(refused, "data.name=fashion_mnist", "data.root=empty")
    assert "data.download" in train(refused, "data.name=cifar10", "data.root=empty")
    (place / "images" / "train" / "cats").mkdir(parents=True)
    (place / "images" / "test" / "cats").mkdir(parents=True)
    assert "no images" in train(refused, "data.name=image_folder", "data.root=images")
    # More images are asked for than there are: nothing would be left to train on.
    line = train(refused, "data.validation=5000")
    assert "validation" in line or "1,797" in line or "1797" in line


OWN = '''
import torch
from torch import nn
import rlprune

class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
    def forward(self, x):
        raise ValueError("the camera\\nis off")

def raises():
    return Raises()

def nothing():
    return None

class Empty(rlprune.Workload):
    """Its validation split is empty."""
    def __init__(self):
        self.model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2)).eval()
        self.example_inputs = torch.zeros(1, 1, 8, 8)
    def batches(self, split, limit=None):
        if split != "validation":
            yield torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)

def empty(config):
    return Empty()

def no_workload(config):
    return 3
'''


def test_own_models_and_workloads(
    place: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "own_wrong.py").write_text(OWN)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    own = "model.arguments={}"
    assert "its forward raises" in train(refused, "model.name=own_wrong:raises", own)
    assert "torch.nn.Module" in train(refused, "model.name=own_wrong:nothing", own)
    assert "did you mean 'raises'" in train(refused, "model.name=own_wrong:raise", own)
    assert "cannot import" in train(refused, "model.name=own_missing:raises", own)
    assert "'validation' is empty" in train(refused, "workload=own_wrong:empty")
    assert "must return a rlprune.Workload" in train(refused, "workload=own_wrong:no_workload")


def test_folders_in_the_way(place: Path, refused: Callable[..., str]) -> None:
    (place / "run").write_text("a file")
    assert "is a file" in train(refused)
    (place / "run").unlink()
    (place / "run").mkdir()
    (place / "run" / "holiday.jpg").write_text("x")
    assert "holiday.jpg" in train(refused)
    assert "holiday.jpg" in refused("prune", "digits", *SETS, "--rule", "erk", "--out", "run")
    assert "no run in elsewhere" in refused("train", "digits", *SETS, "--resume", "--out", "elsewhere")


def test_two_runs_into_one_folder(place: Path, refused: Callable[..., str]) -> None:
    script = (
        "import sys, rlprune.utils.files as files\n"
        "with files.lock_run('run'):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    root = str(Path(cli.__file__).parent.parent.parent)
    other = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert other.stdin is not None
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == b"held\n"
        assert f"process {other.pid}" in train(refused)
    finally:
        other.stdin.close()
        other.wait(60)
        other.stdout.close()


def test_a_finished_run_is_not_overwritten(place: Path, refused: Callable[..., str]) -> None:
    with files.lock_run("run") as folder:
        (folder / "config.yaml").write_text("model: {name: m}\ndata: {name: d}\n")
    assert "holds a run already" in train(refused)


def test_a_full_disk(place: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(files.os, "fsync", full)
    assert "No space left on device" in train(refused)
    words = ["prune", "digits", *SETS, "--set", "prune.importance=l2", "--rule", "erk", "--out", "pruned"]
    assert "No space left on device" in refused(*words)


@pytest.mark.skipif(os.name != "posix", reason="needs limits on the size of files")
def test_a_disk_that_fills_while_writing(place: Path) -> None:
    """A real write error in the middle of a file, in a process of its own: no file may exceed 20 kB."""
    script = (
        "import resource, sys\n"
        "from rlprune.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    root = str(Path(cli.__file__).parent.parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", script, "prune", "digits", *SETS, "--rule", "erk", "--out", "pruned"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("rlprune: error: ")
    assert "File too large" in done.stderr
    assert list(place.iterdir()) == []
