"""Exported files run at several batch sizes and agree with PyTorch; anything else leaves nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rlprune.api import load, save, trace
from rlprune.errors import ArtifactError, ConfigError
from rlprune.experiments.export import export
from rlprune.experiments.formats.onnx import read_onnx, write_onnx
from rlprune.experiments.formats.single import find_example
from rlprune.experiments.formats.torch_export import read_program, write_program
from rlprune.experiments.one_file import Runner, export_model, named_inputs, random_inputs
from rlprune.pruning.plan import make_plan
from rlprune.pruning.surgery import prune
from rlprune.utils import pytrees
from rlprune.vision.zoo import base_of, build_model
from tests.helpers import own_models


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

    def wrong(path: Path) -> Runner:
        return lambda inputs, by_name: [model(inputs).detach() + 0.5]

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


IMAGE = torch.rand(1, 3, 8, 8)
NESTS: dict[str, tuple[type[nn.Module], Any, list[str], list[str]]] = {
    "dict": (own_models.DictOut, IMAGE, ["input"], ["out", "aux"]),
    "tuple": (own_models.TupleOut, IMAGE, ["input"], ["output_0", "output_1_0", "output_1_1"]),
    "dataclass": (own_models.DataclassOut, IMAGE, ["input"], ["boxes", "labels"]),
    "two inputs": (own_models.Masked, (IMAGE, torch.rand(1, 1, 8, 8)), ["x", "mask"], ["x_out"]),
    "by name": (
        own_models.Masked, {"mask": torch.rand(1, 1, 8, 8), "x": IMAGE, "scale": 0.5}, ["mask", "x"], ["x_out"],
    ),
    "integers": (own_models.Words, (torch.tensor([[3, 1, 6, 0]]), torch.tensor([3])), ["ids", "lengths"], ["output"]),
    "list": (
        own_models.Detector, [IMAGE[0]], ["images_0"], ["output_0_boxes", "output_0_scores"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NESTS)
def test_nests_of_inputs_and_outputs_are_exported(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    kind, inputs, input_names, outputs = NESTS[name]
    model = kind().eval()
    free = name != "list"

    def batch(count: int) -> Any:
        return random_inputs(inputs, count, torch.Generator().manual_seed(7))

    note = export_model(model, inputs, tmp_path / "a.onnx", write_onnx, read_onnx)
    assert note == ("" if free else "takes one sample at a time: its argument is a list")
    session = runtime.InferenceSession(tmp_path / "a.onnx")
    assert sorted(entry.name for entry in session.get_inputs()) == sorted(input_names)
    assert [entry.name for entry in session.get_outputs()] == outputs
    assert export_model(model, inputs, tmp_path / "a.pt2", write_program, read_program) == note
    program = torch.export.load(tmp_path / "a.pt2").module()
    for count in (1, 3) if free else (1,):
        given = batch(count)
        with torch.no_grad():
            wanted = list(pytrees.tensors(pytrees.call(model, given)))
        found = session.run(None, {n: t.numpy() for n, t in named_inputs(model, given).items()})
        for ours, theirs, tensor in zip(
            found, pytrees.tensors(pytrees.call(program, given)), wanted, strict=True
        ):
            torch.testing.assert_close(torch.from_numpy(ours), tensor, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(theirs, tensor, rtol=1e-4, atol=1e-5)


def test_a_model_for_one_sample_says_so(tmp_path: Path) -> None:
    model = own_models.OneSample().eval()
    note = export_model(model, IMAGE, tmp_path / "a.pt2", write_program, read_program)
    assert note.startswith("takes one sample at a time: with a free batch export: ") and "\n" not in note
    assert torch.export.load(tmp_path / "a.pt2").module()(IMAGE).shape == (1, 48)


@pytest.mark.parametrize(("to", "suffix"), [("onnx", ".onnx"), ("torch-export", ".pt2")])
def test_only_a_file_of_ours_is_replaced(to: str, suffix: str, tmp_path: Path) -> None:
    base = own_models.TupleOut().eval()
    space = trace(base, IMAGE)
    importance = [np.arange(group.width) for group in space.groups]
    plan = make_plan(space, importance=importance, widths=space.widths - 1)
    pruned = save(prune(base, plan), plan, tmp_path / "pruned")
    target = tmp_path / f"mine{suffix}"
    target.write_text("a thesis")
    with pytest.raises(ArtifactError, match=r"mine.* is there already and rlprune did not write it.*--force"):
        export(pruned, to, target, base=base)
    assert target.read_text() == "a thesis"
    export(pruned, to, target, base=base, force=True)
    before = target.stat().st_mtime_ns
    export(pruned, to, target, base=base)
    assert target.stat().st_mtime_ns > before
