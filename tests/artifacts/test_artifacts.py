"""Pruned models and policies on disk: what is saved comes back; everything else is one clear line."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

import rlprune
from rlprune.artifacts import pruned_model as artifacts
from rlprune.artifacts.fitting import put_tensors, set_attributes
from rlprune.artifacts.policy import read_policy_files, save_policy
from rlprune.errors import ArtifactError
from rlprune.utils import files
from rlprune.vision.identify import _same_settings
from rlprune.vision.zoo import build_model

FILES = ["load_pruned.py", "model.safetensors", "plan.json"]


class Own(nn.Module):
    """A model that no registry knows, with a tied pair of layers and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(self.body(x)).mean((2, 3)))


def pruned(model: nn.Module, example: torch.Tensor, seed: int = 0) -> tuple[nn.Module, rlprune.Plan]:
    """A model cut to random widths and its plan."""
    space = rlprune.trace(model, example)
    generator = np.random.default_rng(seed)
    scores = [generator.random(group.width) for group in space.groups]
    distribution = generator.random(len(space.groups)) + 0.05
    plan = rlprune.make_plan(space, importance=scores, distribution=distribution, budget=0.5)
    return rlprune.prune(model, plan), plan


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return build_model("cifar_resnet20", 10, arguments={"width": 4})


@pytest.fixture(scope="module")
def made(dense: nn.Module) -> tuple[nn.Module, rlprune.Plan]:
    return pruned(dense, torch.zeros(1, 3, 16, 16))


@pytest.fixture
def folder(made: tuple[nn.Module, rlprune.Plan], tmp_path: Path) -> Path:
    return rlprune.save(*made, tmp_path / "pruned")


def error_of(action: Callable[[], Any]) -> str:
    with pytest.raises(ArtifactError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_saved_model_comes_back_without_help(made: tuple[nn.Module, rlprune.Plan], folder: Path) -> None:
    slim, plan = made
    twin = rlprune.load(folder)
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(slim.eval()(x), twin(x))
    assert not twin.training
    # The sizes that modules state about themselves follow, so printing and exporting tell the truth.
    for name, module in slim.named_modules():
        for key in ("out_channels", "in_channels", "num_features", "before", "after"):
            assert getattr(module, key, None) == getattr(twin.get_submodule(name), key, None), name
    document = artifacts.read_plan(folder)
    assert document["base"]["name"] == "cifar_resnet20"
    assert document["widths"] == plan.widths.tolist()
    assert document["cost"]["macs"] == plan.space.cost(plan.widths)
    assert document["budget"] == {"target": "0.5", "metric": "macs"}
    assert torch.__version__.startswith(document["libraries"]["torch"].partition("+")[0])
    assert sorted(path.name for path in folder.iterdir()) == FILES


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small"])
def test_torchvision_models_are_recognised(name: str, tmp_path: Path) -> None:
    model = models.get_model(name, num_classes=7).eval()
    slim, plan = pruned(model, torch.zeros(1, 3, 64, 64))
    rlprune.save(slim, plan, tmp_path / "p")
    assert artifacts.read_plan(tmp_path / "p")["base"] == {
        "source": "torchvision",
        "name": name,
        "arguments": {"num_classes": 7, "channels": 3},
    }
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(slim.eval()(x), rlprune.load(tmp_path / "p")(x))


def test_a_variant_that_only_its_settings_tell_apart_is_not_mistaken(tmp_path: Path) -> None:
    model = models.resnet18(num_classes=7).eval()
    model.layer4[0].conv1.dilation, model.layer4[0].conv1.padding = (2, 2), (2, 2)
    slim, plan = pruned(model, torch.zeros(1, 3, 64, 64))
    rlprune.save(slim, plan, tmp_path / "p")
    assert artifacts.read_plan(tmp_path / "p")["base"] == {"source": "given"}


def test_an_own_model_needs_its_base_and_leaves_it_unchanged(tmp_path: Path) -> None:
    model = Own().eval()
    slim, plan = pruned(model, torch.zeros(1, 3, 8, 8))
    rlprune.save(slim, plan, tmp_path / "p")
    assert "base=model" in error_of(lambda: rlprune.load(tmp_path / "p"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = rlprune.load(tmp_path / "p", base=model)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(slim.eval()(x), twin(x))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert "another architecture" in error_of(lambda: rlprune.load(tmp_path / "p", base=models.resnet18()))


def test_compiled_models_and_traced_graphs_are_saved_and_loaded(tmp_path: Path) -> None:
    model = Own().eval()
    slim, plan = pruned(model, torch.zeros(1, 3, 8, 8))
    rlprune.save(torch.compile(slim), plan, tmp_path / "p")
    x = torch.randn(2, 3, 8, 8)
    for base in (model, torch.compile(model)):
        with torch.no_grad():
            assert torch.equal(slim.eval()(x), rlprune.load(tmp_path / "p", base=base)(x))
    graph = torch.fx.symbolic_trace(model)
    slim, plan = pruned(graph, torch.zeros(1, 3, 8, 8))
    rlprune.save(slim, plan, tmp_path / "g")
    for base in (graph, copy.deepcopy(graph)):
        with torch.no_grad():
            assert torch.equal(slim.eval()(x), rlprune.load(tmp_path / "g", base=base)(x))


def test_a_file_cannot_name_code(folder: Path) -> None:
    edit(
        folder / "plan.json",
        lambda d: d.update(base={"source": "function", "name": "os:getcwd", "arguments": {}}),
    )
    assert "base=model" in error_of(lambda: rlprune.load(folder))
    edit(
        folder / "plan.json", lambda d: d.update(base={"source": "zoo", "name": "os.system", "arguments": {}})
    )
    assert "cannot be rebuilt" in error_of(lambda: rlprune.load(folder))


def set_attribute(module: str, attribute: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["attributes"][module] = {attribute: value}

    return change


def drop_last_kept(document: dict[str, Any]) -> None:
    document["groups"][0]["kept"].pop()


def narrow_consistently(document: dict[str, Any]) -> None:
    document["groups"][0]["kept"].pop()
    document["widths"][0] -= 1


def foreign_unit(document: dict[str, Any]) -> None:
    document["groups"][0]["kept"][-1] = 10**6


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d.update(version=3), "newer than this rlprune reads"),
        (lambda d: d.update(version="1"), "version: must be a whole number"),
        (lambda d: d.update(version=True), "version: must be a whole number"),
        (lambda d: d.update(format="other"), "not a file of a rlprune pruned model"),
        (lambda d: d.pop("groups"), "the field 'groups' is missing"),
        (lambda d: d.update(widths={}), "the field 'widths' is not a list"),
        (lambda d: d["widths"].pop(), "groups but"),
        (lambda d: d["groups"][0].pop("name"), "a group has no name"),
        (lambda d: d.update(fingerprint="0" * 32), "another architecture"),
        (drop_last_kept, "but its width is"),
        (narrow_consistently, "but group"),
        (foreign_unit, "must be ascending numbers below"),
        (lambda d: d["tensors"].pop("conv1.weight"), "which the JSON next to it does not list"),
        (lambda d: d["tensors"].update({"conv1.weights": [1]}), "'conv1.weights' is missing"),
        (lambda d: d["tensors"].update({"conv1.weight": [1, 2]}), "the JSON says [1, 2]"),
        (set_attribute("conv9", "out_channels", 3), "no module 'conv9' (did you mean 'conv1'?)"),
        (set_attribute("conv1", "forward", 3), "not a size that may be set"),
        (set_attribute("conv1", "_version", 3), "not a size that may be set"),
        (set_attribute("conv1", "out_channels", "3"), "not a size that may be set"),
        (set_attribute("conv1", "training", 0), "not a size that may be set"),
        (set_attribute("conv1", "kernel_size[0]", "3"), "not a size that may be set"),
        (set_attribute("conv1", "kernel_size[2]", 3), "not a size that may be set"),
        (set_attribute("conv1", "groups", 10**9), "is more than the 1 of the dense model"),
        (set_attribute("conv1", "groups", 0), "groups = 0 does not fit its weight of shape"),
        (set_attribute("conv1", "out_channels", 1), "out_channels = 1 does not fit its weight of shape"),
        (set_attribute("linear", "in_features", 1), "in_features = 1 does not fit its weight of shape"),
        (set_attribute("bn1", "num_features", 1), "num_features = 1 does not fit its weight of shape"),
        (lambda d: d.update(input=[1, 3, 10**6, 10**6]), "more than 268,435,456 numbers in a sample"),
        (lambda d: d.update(input="3x32x32"), "'3x32x32' is neither a shape nor a nest"),
        (lambda d: d["cost"].update(macs=True), "cost.macs: must be a finite number of 0 and more"),
        (lambda d: d["dense_cost"].update(params="5"), "dense_cost.params: must be a finite number"),
        (lambda d: d["cost"].update(macs=-1), "cost.macs: must be a finite number"),
        (lambda d: d["base"]["arguments"].update(width=10**6), "base: describes another architecture"),
        (lambda d: d["checksums"].pop("conv1.weight"), "has no checksum of 'conv1.weight'"),
        (lambda d: d.update(checksums=[]), "the field 'checksums' is not a dict"),
    ],
)
def test_an_edited_plan_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], None], expected: str
) -> None:
    edit(folder / "plan.json", change)
    assert expected in error_of(lambda: rlprune.load(folder))


def test_costs_that_are_not_finite_are_refused(folder: Path) -> None:
    text = (folder / "plan.json").read_text()
    cost = json.loads(text)["cost"]["macs"]
    for wrong in ("1e999", "NaN", "-Infinity", "9" * 400):
        (folder / "plan.json").write_text(text.replace(f'"macs": {cost!r}', f'"macs": {wrong}'))
        assert str(folder / "plan.json") in error_of(lambda: rlprune.load(folder))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def half(tensors: dict[str, torch.Tensor]) -> None:
    tensors["conv1.weight"] = tensors["conv1.weight"].half()


def swapped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["bn1.weight"], tensors["bn1.bias"] = tensors["bn1.bias"], tensors["bn1.weight"]


def touched(tensors: dict[str, torch.Tensor]) -> None:
    tensors["linear.bias"][0] += 1e-3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (half, "'conv1.weight' is float16, but float32 was saved"),
        (swapped, "'bn1.bias' is not the tensor that was saved"),
        (touched, "'linear.bias' is not the tensor that was saved"),
    ],
)
def test_tensors_that_were_changed_are_refused(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], expected: str
) -> None:
    change_tensors(folder, change)
    assert expected in error_of(lambda: rlprune.load(folder))


def test_a_folder_without_checksums_loads(made: tuple[nn.Module, rlprune.Plan], folder: Path) -> None:
    """Folders of earlier versions have none, nor the file that loads them alone."""
    edit(folder / "plan.json", lambda d: d.pop("checksums"))
    (folder / "load_pruned.py").unlink()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(made[0].eval()(x), rlprune.load(folder)(x))


class Recurrent(nn.Module):
    """A recurrent layer keeps its weights in a second list, and a buffer that is not saved has the width as well."""

    def __init__(self, width: int = 6, hidden: int = 5) -> None:
        super().__init__()
        self.layer = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.splits = [width, hidden]
        self.register_buffer("scale", torch.arange(float(width)), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x * self.scale)[0]


def test_recurrent_weights_and_unsaved_buffers_are_replaced() -> None:
    small, model = Recurrent(4, 3), Recurrent()
    small.scale = small.scale + 2
    put_tensors(model, small.state_dict() | {"scale": small.scale}, "here")
    sizes = {"": {"splits[0]": 4, "splits[1]": 3}, "layer": {"input_size": 4, "hidden_size": 3}}
    set_attributes(model, sizes, "here")
    x = torch.randn(2, 7, 4)
    with torch.no_grad():
        assert torch.equal(model(x), small(x))
    assert model.splits == small.splits and repr(model) == repr(small)


def test_modules_under_several_names_stay_one_module(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stems = nn.ModuleList([nn.Linear(6, 8)])
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)) for _ in range(8))
            self.again, self.third = nn.ModuleList(self.blocks), nn.ModuleList(self.blocks)
            self.head = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stems[0](x)
            for one, two, three in zip(self.blocks, self.again, self.third, strict=True):
                x = one(two(three(x)))
            return self.head(x)

    slim, plan = pruned(Twice(), torch.randn(2, 6))
    loaded = rlprune.load(rlprune.save(slim, plan, tmp_path / "pruned"), base=Twice())
    assert all(
        a is b for a, b in zip(loaded.get_submodule("blocks"), loaded.get_submodule("third"), strict=True)
    )
    x = torch.randn(3, 6)
    assert torch.equal(loaded(x), slim(x))


def test_attention_with_fewer_heads_is_put_in() -> None:
    small = nn.MultiheadAttention(8, 4, batch_first=True).eval()
    tensors = {
        "in_proj_weight": small.in_proj_weight.detach().view(3, 4, 2, 8)[:, [0, 2]].reshape(12, 8),
        "in_proj_bias": small.in_proj_bias.detach().view(3, 4, 2)[:, [0, 2]].reshape(12),
        "out_proj.weight": small.out_proj.weight.detach().view(8, 4, 2)[:, [0, 2]].reshape(8, 4),
        "out_proj.bias": small.out_proj.bias.detach(),
    }
    model = nn.Sequential(copy.deepcopy(small))
    put_tensors(model, {f"0.{name}": tensor for name, tensor in tensors.items()}, "here")
    set_attributes(model, {"0": {"num_heads": 2}}, "here")
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        small.out_proj.weight.view(8, 4, 2)[:, [1, 3]] = 0  # the heads that are cut say nothing
        wanted, found = small(x, x, x)[0], model[0](x, x, x)[0]
    torch.testing.assert_close(found, wanted)
    model = nn.Sequential(copy.deepcopy(small))
    put_tensors(model, {f"0.{name}": tensor for name, tensor in tensors.items()}, "here")
    assert "num_heads = 1 does not fit" in error_of(
        lambda: set_attributes(model, {"0": {"num_heads": 1}}, "here")
    )


def test_truncated_files_are_refused_at_every_length(folder: Path) -> None:
    for name in ("plan.json", "model.safetensors"):
        path = folder / name
        whole = path.read_bytes()
        for length in (0, 1, 8, 100, len(whole) // 2, len(whole) - 3):
            path.write_bytes(whole[:length])
            assert str(path) in error_of(lambda: rlprune.load(folder))
        path.write_bytes(whole)
    rlprune.load(folder)


def test_foreign_and_missing_files(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({"x": torch.zeros(2)}, folder / "model.safetensors")
    assert "is missing" in error_of(lambda: rlprune.load(folder))
    torch.save(tensors, folder / "model.safetensors")
    assert "not a safetensors file" in error_of(lambda: rlprune.load(folder))
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    assert f"{name!r} holds NaN" in error_of(lambda: rlprune.load(folder))
    (folder / "model.safetensors").unlink()
    assert "no such file" in error_of(lambda: rlprune.load(folder))
    assert "no such folder" in error_of(lambda: rlprune.load(tmp_path / "nothing"))
    assert "no such file" in error_of(lambda: rlprune.load(tmp_path))


def test_a_model_that_does_not_fit_its_plan_is_not_saved(
    made: tuple[nn.Module, rlprune.Plan], dense: nn.Module, tmp_path: Path
) -> None:
    _, plan = made
    assert "not made with this plan" in error_of(lambda: rlprune.save(dense, plan, tmp_path / "p"))
    broken = rlprune.prune(dense, plan)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("inf"))
    assert "holds NaN or infinite" in error_of(lambda: rlprune.save(broken, plan, tmp_path / "p"))
    assert list(tmp_path.iterdir()) == []


def test_saving_replaces_ours_and_nothing_else(made: tuple[nn.Module, rlprune.Plan], tmp_path: Path) -> None:
    target = tmp_path / "p"
    target.mkdir()
    rlprune.save(*made, target)  # an empty folder
    (target / "left-over").write_text("x")
    rlprune.save(*made, target)  # one of ours, replaced as a whole
    assert sorted(path.name for path in target.iterdir()) == FILES
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "holiday.jpg").write_text("x")
    assert "holiday.jpg" in error_of(lambda: rlprune.save(*made, foreign))
    (tmp_path / "file").write_text("x")
    assert "is a file" in error_of(lambda: rlprune.save(*made, tmp_path / "file"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "p", "photos"]


def test_a_failed_save_leaves_the_old_one(
    made: tuple[nn.Module, rlprune.Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = rlprune.save(*made, tmp_path / "p")
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(files.os, "fsync", full)
    assert "No space left on device" in error_of(lambda: rlprune.save(*made, target))
    assert "No space left on device" in error_of(lambda: rlprune.save(*made, tmp_path / "q"))
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_policy_files(tmp_path: Path) -> None:
    tensors = {"weight": torch.randn(3, 2), "bias": torch.zeros(3)}
    meta = {"features": ["a", "b"], "scale": 1.5}
    target = save_policy(tensors, meta, tmp_path / "policy")
    loaded, found = read_policy_files(target)
    assert found == meta
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    not_json = error_of(lambda: save_policy(tensors, {"f": object()}, tmp_path / "q"))
    assert "cannot be written as JSON" in not_json
    assert not (tmp_path / "q").exists()
    edit(target / "policy.json", lambda d: d.update(version=99))
    assert "newer" in error_of(lambda: read_policy_files(target))
    shutil.rmtree(target)
    save_policy(tensors, meta, target)
    save_file({"weight": torch.zeros(3, 2)}, target / "policy.safetensors")
    assert "'bias' is missing" in error_of(lambda: read_policy_files(target))


def test_text_and_json_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "a.json"
    files.write_json_atomic(path, {"a": [1, None, "ü"]})
    assert files.read_json(path) == {"a": [1, None, "ü"]}
    assert "cannot be written as JSON" in error_of(lambda: files.write_json_atomic(path, float("nan")))

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        files.write_text_atomic(path, "new")
    assert files.read_json(path) == {"a": [1, None, "ü"]}
    assert list(path.parent.iterdir()) == [path]
    path.write_text('{"a": NaN}')
    assert "NaN is not allowed" in error_of(lambda: files.read_json(path))
    path.write_text("[" * 100_000)
    assert "truncated or not JSON" in error_of(lambda: files.read_json(path))


def _hold(folder: str, ready: Any, leave: Any) -> None:
    with files.lock_run(folder):
        ready.set()
        leave.wait(60)


def test_a_run_folder_has_one_owner_and_a_dead_one_leaves_no_lock(tmp_path: Path) -> None:
    run = tmp_path / "run"
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(run), ready, leave))
    other.start()
    try:
        assert ready.wait(60)

        def take() -> None:
            with files.lock_run(run):
                pass

        assert f"another rlprune run is writing into this folder (process {other.pid})" in error_of(take)
        other.kill()
        other.join()
        take()
        take()
    finally:
        other.kill()
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "holiday.jpg").write_text("x")
    with pytest.raises(ArtifactError, match=r"holiday\.jpg"), files.lock_run(foreign):
        pass
    assert [path.name for path in foreign.iterdir()] == ["holiday.jpg"]


def test_a_size_inside_of_a_setting_does_not_hide_the_architecture() -> None:
    ours, theirs = Recurrent(), Recurrent()
    ours.pair, theirs.pair = (3, 5), (6, 5)
    assert not _same_settings(ours, theirs, {})
    assert _same_settings(ours, theirs, {"": {"pair[0]": 3}})
