"""Exported files run at several batch sizes and agree with PyTorch; anything else leaves nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rlprune.api import load, save, trace
from rlprune.errors import ArtifactError, ConfigError
from rlprune.experiments import export as module
from rlprune.experiments.export import export, export_model, find_example, read_program, write_program
from rlprune.pruning.plan import make_plan
from rlprune.pruning.surgery import prune
from rlprune.vision.zoo import base_of, build_model


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved cut of a narrow CIFAR ResNet-20, traced on one grey 28 x 28 image."""
    arguments = {"width": 4}
    model = build_model("cifar_resnet20", 10, 1, arguments=arguments)
    space = trace(model, torch.randn(1, 1, 28, 28))
    rng = np.random.default_rng(0)
    importance = [rng.random(group.width) for group in space.groups]
    plan = make_plan(space, importance=importance, distribution=rng.random(len(space.groups)), budget=0.5)
    folder = tmp_path_factory.mktemp("export") / "pruned"
    save(prune(model, plan), plan, folder, base=base_of("cifar_resnet20", 10, 1, arguments))
    return folder


def test_torch_export_runs_at_any_batch_size(pruned: Path, tmp_path: Path) -> None:
    path = export(pruned, "torch-export", tmp_path / "new" / "a.pt2").path
    assert path == tmp_path / "new" / "a.pt2"
    program = torch.export.load(path).module()
    inputs = torch.randn(7, 1, 28, 28)
    torch.testing.assert_close(program(inputs), load(pruned)(inputs))
    assert [file.name for file in path.parent.iterdir()] == ["a.pt2"]


def test_onnx_runs_at_any_batch_size(pruned: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = export(pruned, "onnx", tmp_path / "a.onnx").path
    inputs = torch.randn(7, 1, 28, 28)
    found = runtime.InferenceSession(path).run(None, {"input": inputs.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), load(pruned)(inputs), rtol=1e-4, atol=1e-4)
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


def test_the_input_size_is_found_from_the_recorded_cost(pruned: Path) -> None:
    from rlprune.artifacts.documents import read_plan

    document = read_plan(pruned)
    assert find_example(load(pruned), document).shape == (1, 1, 28, 28)
    recorded = document | {"input": [1, 1, 40, 44]}
    assert find_example(load(pruned), recorded).shape == (1, 1, 40, 44)
    with pytest.raises(ArtifactError, match="example_inputs"):
        find_example(load(pruned), document | {"cost": {"macs": 17}, "input": None})


def test_an_unknown_format_names_the_near_miss(pruned: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'onnx'"):
        export(pruned, "onxx")


def test_a_missing_package_is_named_with_its_extra(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"onnxscript.*rlprune\[export\]"):
        export(pruned, "onnx")


def test_a_file_whose_outputs_differ_is_not_kept(tmp_path: Path) -> None:
    model = nn.Linear(3, 2).eval()

    def wrong(path: Path) -> module.Runner:
        return lambda inputs: model(inputs).detach() + 0.5

    with pytest.raises(ArtifactError, match="differ from PyTorch"):
        export_model(model, torch.zeros(1, 3), tmp_path / "a.pt2", write_program, wrong)
    assert list(tmp_path.iterdir()) == []


class Stubborn(nn.Module):
    """Its control flow depends on the data, so no exporter can follow it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_a_model_that_cannot_be_exported_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="Stubborn cannot be exported") as error:
        export_model(Stubborn(), torch.zeros(1, 3), tmp_path / "a.pt2", write_program, read_program)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_named(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is a folder"):
        export(pruned, "torch-export", tmp_path)
