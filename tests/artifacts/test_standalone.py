"""A pruned folder is loaded where rlprune is missing, and gives what `rlprune.load` gives."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision import models

import rlprune
from rlprune.errors import ArtifactError
from rlprune.experiments.export import export
from rlprune.experiments.one_file import random_inputs
from rlprune.utils import pytrees
from rlprune.vision.load_pruned import standalone
from rlprune.vision.zoo import build_model
from tests.helpers import own_models

OWN = Path(own_models.__file__)

# Run with -I, from another folder: nothing of ours can be imported, and what tries to is told so.
LOADER = """
import importlib.util, json, sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("rlprune", "torch_pruning"):
            raise ImportError(f"{name} is not to be imported here")

sys.meta_path.insert(0, Blocker())

def load_file(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

import torch
from safetensors.torch import save_file
torch.set_num_threads(1)
own = load_file("own_models", sys.argv[2])
for folder in map(Path, sys.argv[3:]):
    job = json.loads((folder.parent / "job.json").read_text())
    module = load_file("load_pruned", folder / "load_pruned.py")
    model = module.load(base=getattr(own, job["own"])()) if job["own"] else module.load()
    assert not model.training and not any(name.partition(".")[0] == "rlprune" for name in sys.modules)
    inputs = torch.load(folder.parent / "inputs.pt", weights_only=True)
    with torch.no_grad():
        outputs = module.call(model, inputs)
    found = {str(i): t.contiguous() for i, t in enumerate(module._tensors(outputs))}
    save_file(found, folder.parent / "found.safetensors")
print("loaded", len(sys.argv) - 3)
"""


@dataclass(frozen=True)
class Case:
    """A dense model, one sample, the samples that are compared, the name of the class where it is a user's own."""

    name: str
    model: Callable[[], nn.Module]
    example: Any
    own: str = ""


IMAGE = torch.zeros(1, 3, 32, 32)
VIT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
CASES = [
    Case("torchvision", lambda: models.resnet18(num_classes=5), IMAGE),
    Case("mobilenet", lambda: models.mobilenet_v3_small(num_classes=5), IMAGE),
    Case("timm", lambda: build_model("timm:resnet10t", 5), IMAGE),
    Case("hf", lambda: build_model("hf:vit", 5, arguments=VIT), IMAGE),
    Case("zoo", lambda: build_model("cifar_resnet20", 10, arguments={"width": 4}), IMAGE),
    Case("own", own_models.Tagger, IMAGE, "Tagger"),
    Case("group norm", own_models.GroupNormNet, IMAGE, "GroupNormNet"),
    Case("recurrent", own_models.Crnn, torch.zeros(1, 1, 8, 24), "Crnn"),
    Case("segmentation", lambda: build_model("lraspp_mobilenet_v3_large", 4), torch.zeros(1, 3, 64, 64)),
    Case("detection", lambda: build_model("ssdlite320_mobilenet_v3_large", 4), [torch.rand(3, 64, 64)]),
    Case("two inputs", own_models.TwoInputs, (IMAGE, torch.zeros(1, 4)), "TwoInputs"),
]


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return list(pytrees.tensors(pytrees.call(model, inputs)))


def prepare(case: Case, folder: Path) -> Path:
    """The pruned folder of a case, with its inputs and what is to be loaded beside it."""
    torch.manual_seed(0)
    model = case.model().eval()
    space = rlprune.trace(model, case.example)
    rng = np.random.default_rng(0)
    scores = [rng.random(group.width) for group in space.groups]
    budget = (1 + space.feasible()[0] / space.dense_cost()) / 2
    plan = rlprune.make_plan(
        space, importance=scores, distribution=rng.random(len(space.groups)) + 0.05, budget=budget
    )
    folder.mkdir()
    rlprune.save(rlprune.prune(model, plan), plan, folder / "pruned")
    inputs = random_inputs(case.example, 2, torch.Generator().manual_seed(0))
    torch.save(inputs, folder / "inputs.pt")
    (folder / "job.json").write_text(json.dumps({"own": case.own}))
    wanted = outputs(rlprune.load(folder / "pruned", base=model if case.own else None), inputs)
    save_file({str(i): t.contiguous() for i, t in enumerate(wanted)}, folder / "wanted.safetensors")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of all cases, loaded by one process that has no rlprune."""
    root = tmp_path_factory.mktemp("standalone")
    made = {case.name: prepare(case, root / case.name.replace(" ", "_")) for case in CASES}
    command = [sys.executable, "-I", "-c", LOADER, "-", str(OWN), *(str(f / "pruned") for f in made.values())]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"loaded {len(CASES)}" in done.stdout
    return made


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_the_folder_alone_gives_the_same_outputs(name: str, folders: dict[str, Path]) -> None:
    wanted, found = (load_file(folders[name] / f"{kind}.safetensors") for kind in ("wanted", "found"))
    assert wanted.keys() == found.keys() and wanted
    for key, tensor in wanted.items():
        assert torch.equal(tensor, found[key]), key


@pytest.mark.parametrize("name", [case.name for case in CASES if case.name not in ("mobilenet", "detection")])
def test_onnxruntime_gives_the_same_outputs(name: str, folders: dict[str, Path]) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    case = next(case for case in CASES if case.name == name)
    base = case.model() if case.own else None
    written = export(folders[name] / "pruned", "onnx", base=base)
    session = runtime.InferenceSession(written.path)
    inputs = torch.load(folders[name] / "inputs.pt", weights_only=True)
    given = zip(session.get_inputs(), pytrees.tensors(inputs), strict=True)
    found = session.run(None, {entry.name: tensor.numpy() for entry, tensor in given})
    wanted = load_file(folders[name] / "wanted.safetensors")
    assert not written.needs and len(found) == len(wanted)  # two samples at once: the batch is free
    for number, array in enumerate(found):
        torch.testing.assert_close(torch.from_numpy(array), wanted[str(number)], rtol=1e-3, atol=1e-4)


def test_a_detector_is_exported_or_one_line(
    folders: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(ArtifactError, match="export: SSD cannot be exported") as error:
        export(folders["detection"] / "pruned", "torch-export")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert capfd.readouterr() == ("", "")


def test_the_file_says_what_the_model_gives(folders: dict[str, Path]) -> None:
    command = [sys.executable, str(folders["zoo"] / "pruned" / "load_pruned.py")]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "outputs for one sample: [(1, 10)]" in done.stdout
    command[1] = str(folders["own"] / "pruned" / "load_pruned.py")
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "pass base=model" in done.stderr and len(done.stderr.splitlines()) == 1


def names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + str(node.module)


@pytest.mark.parametrize("source", ["zoo", "torchvision", "timm", "hf", "given"])
def test_the_file_asks_for_no_other_library(source: str) -> None:
    base = {"source": source, "name": "cifar_resnet20"}
    found = {name.partition(".")[0] for name in names(ast.parse(standalone(base)))}
    allowed = {"torch", "safetensors", {"hf": "transformers"}.get(source, source)} - {"zoo", "given"}
    assert found - set(sys.stdlib_module_names) == allowed
