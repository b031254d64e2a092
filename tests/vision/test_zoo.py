"""Models by name, their weights from files, and what is refused."""

import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rlprune.artifacts.checkpoint import CheckpointWarning, load_checkpoint, put_weights
from rlprune.errors import ArtifactError, ConfigError, DataError
from rlprune.experiments.build import list_models
from rlprune.vision.rebuild import rebuild
from rlprune.vision.zoo import base_of, build_model


def test_cifar_resnet_has_the_layers_of_the_paper() -> None:
    model = build_model("cifar_resnet20")
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(names) == 20
    assert names[0] == "conv1"
    assert names[-1] == "linear"
    # He et al. 2015, table 6: 0.27 million parameters for depth 20, 0.85 for depth 56.
    assert sum(p.numel() for p in model.parameters()) == 269_722
    deep = build_model("cifar_resnet56")
    assert sum(p.numel() for p in deep.parameters()) == 853_018
    assert {"layer1.0.conv1.weight", "layer3.8.bn2.running_var", "linear.bias"} <= set(deep.state_dict())


def test_cifar_googlenet_has_the_modules_of_the_paper() -> None:
    model = build_model("cifar_googlenet")
    theirs, ours = (
        [m for m in net.modules() if type(m).__name__ == "Inception"]
        for net in (build_model("googlenet"), model)
    )
    assert [[p.shape for p in m.parameters()] for m in ours] == [
        [p.shape for p in m.parameters()] for m in theirs
    ]
    narrow = build_model("cifar_googlenet", classes=7, channels=1, arguments={"width": 0.125})
    assert narrow(torch.rand(2, 1, 28, 28)).shape == (2, 7)
    assert narrow.linear.in_features == 128


def test_cifar_shortcut_pads_and_subsamples() -> None:
    model = build_model("cifar_resnet20", arguments={"width": 4})
    block = model.layer2[0]
    nn.init.zeros_(block.bn2.weight)  # only the shortcut is left
    x = torch.rand(2, 4, 8, 8)
    out = block.eval()(x)
    assert out.shape == (2, 8, 4, 4)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert not out[:, :2].any()
    assert not out[:, 6:].any()


@pytest.mark.parametrize(
    ("name", "size"),
    [("torchvision:resnet18", 32), ("squeezenet1_1", 64), ("googlenet", 64), ("mobilenet_v3_small", 32)],
)
def test_torchvision_models_take_classes_and_channels(name: str, size: int) -> None:
    model = build_model(name, classes=7, channels=1)
    assert not model.training
    assert model(torch.rand(2, 1, size, size)).shape == (2, 7)
    assert not any(n.startswith(("aux", "Aux")) for n, _ in model.named_parameters())


def test_seed_decides_the_weights_and_leaves_the_global_state() -> None:
    before = torch.get_rng_state()
    first, again, other = (build_model("cifar_resnet20", seed=s).conv1.weight for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_googlenet", "resnet18", "googlenet"])
def test_rebuild_gives_the_same_architecture(name: str) -> None:
    model = build_model(name, classes=5, channels=1)
    twin = rebuild(base_of(name, 5, 1))
    put_weights(twin, model.state_dict(), "the model")
    x = torch.rand(1, 1, 64, 64)
    assert torch.equal(model(x), twin(x))


@pytest.mark.parametrize(
    "base",
    [
        {"source": "function", "name": "os:getcwd", "arguments": {}},
        {"source": "given"},
        {"source": "zoo", "name": "os:getcwd", "arguments": {}},
        {"source": "torchvision", "name": "resnet18", "arguments": {"weights": "DEFAULT"}},
        {"source": "timm", "name": "resnet18", "arguments": {"checkpoint_path": "x"}},
        {"source": "timm", "name": "resnet18", "arguments": {"pretrained": True}},
        {"source": "torchvision", "name": 3, "arguments": {}},
        {"source": "zoo", "name": "cifar_resnet20", "arguments": {"depth": 3}},
    ],
)
def test_rebuild_runs_no_code_and_fetches_nothing(base: dict) -> None:
    with pytest.raises(ArtifactError) as caught:
        rebuild(base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cifar_resnet57", "did you mean .cifar_resnet5"),
        ("resnet19", "resnet1"),
        ("torchvision:resnet-50", "resnet50"),
        ("no_such_module_x:build", "no_such_module_x"),
        ("json:dumpz", "dump"),
        ("json:dumps", "cannot be built"),
        ("platform:python_version", "must return a torch.nn.Module"),
    ],
)
def test_unknown_names_are_refused_with_a_hint(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint) as caught:
        build_model(name)
    assert "\n" not in str(caught.value)


def test_timm_models(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    model = build_model("timm:resnet18", classes=4, channels=1)
    assert model(torch.rand(1, 1, 32, 32)).shape == (1, 4)
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        build_model("timm:resnet18x")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="pip install"):
        build_model("timm:resnet18")


def test_arguments_cannot_smuggle_weights_and_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"model\.arguments\.pretrained"):
        build_model("resnet18", arguments={"pretrained": True})
    with pytest.raises(ConfigError, match="widht"):
        build_model("cifar_resnet20", arguments={"widht": 8})
    with pytest.raises(ConfigError, match="IMAGENET1K_V1"):
        build_model("resnet18", weights="IMAGENET1K_V9")
    with pytest.raises(ConfigError, match="no published weights"):
        build_model("cifar_resnet20", weights="DEFAULT")


def test_user_function_is_found_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_model.py").write_text(
        "from torch import nn\ndef build(width=2):\n    return nn.Linear(3, width)\n"
        "def broken():\n    raise ValueError('no luck')\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert build_model("my_own_model:build", arguments={"width": 5}).out_features == 5
    assert sys.path == path
    with pytest.raises(ConfigError, match="ValueError: no luck"):
        build_model("my_own_model:broken")


def test_list_models_names_can_be_built() -> None:
    names = [name for name, _ in list_models()]
    assert {"cifar_resnet110", "cifar_googlenet", "resnet50", "timm:NAME", "module:function"} <= set(names)
    assert len(names) == len(set(names))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = build_model("cifar_resnet20", arguments={"width": 4}, seed=5)
    path = tmp_path / "good.safetensors"
    save_file({n: t for n, t in model.state_dict().items() if "num_batches" not in n}, path)
    return path


def _build(path: Path) -> nn.Module:
    return build_model("cifar_resnet20", arguments={"width": 4}, checkpoint=path)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_checkpoints_load_from_safetensors_and_torch_files(
    checkpoint: Path, tmp_path: Path, wrapper: str | None
) -> None:
    tensors = load_checkpoint(checkpoint).tensors
    loaded = _build(checkpoint)
    assert torch.equal(loaded.conv1.weight, tensors["conv1.weight"])
    content = {f"module.{name}": tensor for name, tensor in tensors.items()}
    path = tmp_path / "parallel.pth"
    torch.save(content if wrapper is None else {wrapper: content, "epoch": 3}, path)
    assert torch.equal(_build(path).linear.weight, loaded.linear.weight)


class _Evil:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("evil_was_here"),)


def test_pickled_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": _Evil()}, "evil.pth")
    Path("raw.pt").write_bytes(pickle.dumps(_Evil()))
    torch.save(nn.Linear(2, 2), "whole.pt")
    for name in ("evil.pth", "raw.pt", "whole.pt"):
        with pytest.raises(ArtifactError, match=name) as caught:
            load_checkpoint(name)
        assert "\n" not in str(caught.value)
    assert not Path("evil_was_here").exists()


def test_broken_files_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    whole = checkpoint.read_bytes()
    good = tmp_path / "good.pth"
    torch.save(load_checkpoint(checkpoint).tensors, good)
    cases = {
        "cut.safetensors": whole[: len(whole) // 2],
        "head.safetensors": whole[:5],
        "empty.safetensors": b"",
        "text.safetensors": b"hello there, I am a text file",
        "cut.pth": good.read_bytes()[: good.stat().st_size // 2],
        "empty.pth": b"",
        "text.pth": b"hello there, I am a text file",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtifactError, match=name) as caught:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value), name
    with pytest.raises(ArtifactError, match="no such file"):
        load_checkpoint(tmp_path / "missing.pth")
    torch.save({"a": 1}, tmp_path / "numbers.pth")
    with pytest.raises(ArtifactError, match="no state dict"):
        load_checkpoint(tmp_path / "numbers.pth")


def test_nan_weights_and_misfits_name_the_tensor(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    tensors = load_checkpoint(checkpoint).tensors

    def refused(changed: dict[str, torch.Tensor], message: str) -> None:
        save_file(changed, path)
        with pytest.raises(ArtifactError, match=message):
            _build(path)

    for value in (float("nan"), float("inf")):
        weight = tensors["layer2.1.conv1.weight"].clone()
        weight.view(-1)[7] = value
        refused(tensors | {"layer2.1.conv1.weight": weight}, r"layer2\.1\.conv1\.weight.*NaN")
    refused({n: t for n, t in tensors.items() if n != "bn1.bias"}, r"missing 'bn1\.bias'")
    refused(tensors | {"layer1.9.bias": torch.zeros(1)}, r"unexpected 'layer1\.9\.bias'")
    refused(tensors | {"linear.weight": torch.zeros(3, 16)}, r"'linear\.weight' has shape \(3, 16\)")


def test_head_and_stem_may_differ_only_where_allowed() -> None:
    model = build_model("cifar_resnet20", classes=4, channels=1)
    other = build_model("cifar_resnet20", classes=10, channels=3, seed=1)
    with pytest.raises(ArtifactError, match=r"conv1\.weight"):
        put_weights(model, other.state_dict(), "other")
    before = model.linear.weight.clone()
    with pytest.warns(CheckpointWarning, match="'conv1', 'linear' start anew"):
        put_weights(model, other.state_dict(), "other", head=True)
    assert torch.equal(model.linear.weight, before)
    assert torch.equal(model.layer1[0].conv1.weight, other.layer1[0].conv1.weight)
    wide = build_model("cifar_resnet20", arguments={"width": 8})
    with pytest.raises(ArtifactError, match="has shape"):
        put_weights(wide, other.state_dict(), "other", head=True)


def test_unreachable_published_weights_are_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    def fail(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(DataError, match="cannot be fetched"):
        build_model("resnet18", weights="DEFAULT")
