"""Files as usual trainers write them, built here in plain torch: which load, which ask, which are refused."""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import datetime
import functools
import io
import json
import pickle
import sys
import tempfile
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor, nn

from rlprune.artifacts.checkpoint import CheckpointWarning, load_checkpoint, put_weights
from rlprune.errors import ArtifactError

State = dict[str, Tensor]


class Net(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
        self.fc = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def net(seed: int, classes: int = 5) -> Net:
    torch.manual_seed(seed)
    made = Net(classes)
    made.features[1].running_mean.normal_()
    return made


def state(prefix: str = "", seed: int = 1) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in net(seed).state_dict().items()}


def optimizer() -> dict[str, object]:
    model = net(1)
    made = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    made.step()
    return made.state_dict()


@contextlib.contextmanager
def foreign(*names: str, base: type = object) -> Iterator[list[type]]:
    """Classes of packages that are not installed, for as long as a file with them is written."""
    added, classes = [], []
    for name in names:
        module, _, own = name.rpartition(".")
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            if path not in sys.modules:
                sys.modules[path] = types.ModuleType(path)
                added.append(path)
        kind = type(own, (base,), {"__module__": module})
        setattr(sys.modules[module], own, kind)
        classes.append(kind)
    try:
        yield classes
    finally:
        for path in added:
            del sys.modules[path]


def namespace() -> argparse.Namespace:
    return argparse.Namespace(
        lr=0.1, output_dir=Path("runs"), device=torch.device("cpu"), dtype=torch.float32
    )


def lightning(path: Path, prefix: str) -> None:
    with foreign("lightning.fabric.utilities.data.AttributeDict", base=dict) as (attributes,):
        content = {
            "epoch": 3,
            "global_step": 99,
            "pytorch-lightning_version": "2.2.0",
            "state_dict": state(prefix)
            | {"train_acc.correct": torch.tensor(7), "criterion.weight": torch.ones(5)},
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
            "callbacks": {
                "ModelCheckpoint{'monitor': 'val'}": {"best_model_score": torch.tensor(0.9), "dirpath": "x"}
            },
            "optimizer_states": [optimizer()],
            "lr_schedulers": [{"last_epoch": 3}],
            "hparams_name": "kwargs",
            "hyper_parameters": attributes(lr=0.1, depth=3),
        }
        torch.save(content, path)


def lightning_1(path: Path) -> None:
    with foreign("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint") as (callback,):
        content = {
            "state_dict": state("net."),
            "callbacks": {callback: {"best_model_path": "x.ckpt", "current_score": torch.tensor(0.5)}},
            "hyper_parameters": namespace(),
            "hparams_name": "hparams",
            "optimizer_states": [optimizer()],
        }
        torch.save(content, path)


def timm(path: Path, ema: bool) -> None:
    content = {
        "epoch": 9,
        "arch": "resnet18",
        "state_dict": state(),
        "optimizer": optimizer(),
        "version": 2,
        "args": namespace(),
        "amp_scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3},
        "metric": np.float64(77.1),
    }
    torch.save(content | ({"state_dict_ema": state(seed=2)} if ema else {}), path)


def torchvision(path: Path, ema: bool) -> None:
    content = {
        "model": state(),
        "optimizer": optimizer(),
        "lr_scheduler": {"last_epoch": 3, "_last_lr": [0.1], "milestones": collections.Counter({30: 1})},
        "epoch": 3,
        "args": namespace(),
    }
    if ema:
        content["model_ema"] = {"n_averaged": torch.tensor(9), **state("module.", seed=2)}
    torch.save(content, path)


def openmmlab(path: Path) -> None:
    with foreign("mmengine.logging.history_buffer.HistoryBuffer") as (history,):
        buffer = history()
        buffer._log_history = np.zeros(3)
        content = {
            "meta": {"CLASSES": ("a", "b"), "time": "today", "env_info": "", "cfg": "model = dict()"},
            "state_dict": collections.OrderedDict(state("model.")),
            "message_hub": {"log_scalars": {"train/loss": buffer}},
            "optimizer": optimizer(),
        }
        torch.save(content, path)


def composer(path: Path) -> None:
    named = {name: {"exp_avg": torch.zeros(2), "step": 3} for name in state()}
    content = {
        "state": {"model": state("model."), "optimizers": {"Adam": {"state": named}}, "rank_zero_seed": 3},
        "rng": [{"python": (3, (1, 2), None), "numpy": ("MT19937", np.arange(4), 1, 0, 0.0)}],
    }
    torch.save(content, path)


def fairseq(path: Path) -> None:
    names = ("omegaconf.dictconfig.DictConfig", "omegaconf.base.ContainerMetadata", "omegaconf.nodes.AnyNode")
    with foreign(*names) as (config, metadata, node):
        cfg, about, value = config(), metadata(), node()
        about.ref_type = dict
        value._val = 3
        cfg._content, cfg._metadata = {"task": value}, about
        content = {"args": namespace(), "cfg": cfg, "model": state(), "last_optimizer_state": optimizer()}
        torch.save(content | {"extra_state": {"train_iterator": {"epoch": 3}}, "task_state": {}}, path)


def averaged(path: Path) -> None:
    model = torch.optim.swa_utils.AveragedModel(net(1))
    torch.save(model.state_dict(), path)


def sharded(path: Path) -> None:
    names = list(state())
    halves = {"model-00001-of-00002.safetensors": names[:4], "model-00002-of-00002.safetensors": names[4:]}
    for file, own in halves.items():
        save_file({name: state()[name] for name in own}, path.parent / file)
    weight_map = {name: file for file, own in halves.items() for name in own}
    path.write_text(json.dumps({"metadata": {"total_size": 9}, "weight_map": weight_map}))


def notes() -> dict[str, object]:
    return {
        "best_acc": np.float32(0.9),
        "history": collections.defaultdict(list, {"loss": [np.float64(1.0), 0.5]}),
        "when": datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC),
        "took": datetime.timedelta(seconds=9),
        "file": Path("weights.pt"),
        "shape": torch.Size([1, 3]),
        "simple": types.SimpleNamespace(a=1),
        "names": {"a", "b"},
        "confusion": np.eye(3, dtype=np.int64),
        "queue": collections.deque([1, 2], maxlen=3),
    }


def whole_module(path: Path, name: str) -> None:
    with foreign(name, base=nn.Module) as (kind,):
        torch.save({"model": kind(), "epoch": 3}, path)


def saved(content: Callable[[], object], **options: bool) -> Callable[[Path], None]:
    return lambda path: torch.save(content(), path, **options)


def moco() -> dict[str, object]:
    both = state("module.encoder_q.") | state("module.encoder_k.", seed=2)
    return {"epoch": 3, "arch": "resnet50", "state_dict": both | {"module.queue": torch.zeros(3, 4)}}


LOAD = "loads"
FILES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "torch, state dict": ("a.pth", saved(state), LOAD),
    "torch, the oldest format": ("a.pth", saved(state, _use_new_zipfile_serialization=False), LOAD),
    "torch, imagenet example": ("model_best.pth.tar", saved(
        lambda: {"epoch": 3, "arch": "alexnet", "state_dict": state("module."), "best_acc1": torch.tensor(56.0),
                 "optimizer": optimizer(), "scheduler": {"last_epoch": 3}}), LOAD),
    "torch, parts in DataParallel": ("a.pth", saved(
        lambda: {name.replace("features.", "features.module."): t for name, t in state().items()}), LOAD),
    "torch, compiled": ("a.pt", saved(lambda: state("_orig_mod.")), LOAD),
    "torch, DDP of compiled": ("a.pt", saved(lambda: {"model": state("module._orig_mod.")}), LOAD),
    "torch, compiled DDP": ("a.pt", saved(lambda: {"model": state("_orig_mod.module.")}), LOAD),
    "torch, FSDP": ("a.pt", saved(
        lambda: {f"_fsdp_wrapped_module.{n.replace('fc.', 'fc._fsdp_wrapped_module.')}": t
                 for n, t in state().items()}), LOAD),
    "torch, AveragedModel": ("swa.pt", averaged, LOAD),
    "torch, notes of all kinds": ("a.pth", saved(lambda: {"net": state(), **notes()}), LOAD),
    "torch, notes, the oldest format": ("a.pth", saved(
        lambda: {"net": state(), "args": namespace()}, _use_new_zipfile_serialization=False), LOAD),
    "safetensors": ("a.safetensors", lambda path: save_file(state(), path, {"format": "pt", "epoch": "3"}), LOAD),
    "Lightning 2": ("a.ckpt", lambda path: lightning(path, "model."), "loads, 2 tensors left"),
    "Lightning 2, compiled": ("a.ckpt", lambda path: lightning(path, "model._orig_mod."), "loads, 2 tensors left"),
    "Lightning 1": ("a.ckpt", lightning_1, LOAD),
    "timm": ("last.pth.tar", lambda path: timm(path, ema=False), LOAD),
    "timm, EMA": ("last.pth.tar", lambda path: timm(path, ema=True), "state_dict|state_dict_ema"),
    "torchvision references": ("model_9.pth", lambda path: torchvision(path, ema=False), LOAD),
    "torchvision references, EMA": ("model_9.pth", lambda path: torchvision(path, ema=True), "model|model_ema.module"),
    "OpenMMLab": ("epoch_9.pth", openmmlab, LOAD),
    "detectron2": ("model_final.pth", saved(
        lambda: {"model": state(), "optimizer": optimizer(), "scheduler": {}, "iteration": 9}), LOAD),
    "detectron2, model zoo": ("model.pth", saved(
        lambda: {"model": {n: t.numpy() for n, t in state().items()}, "__author__": "x",
                 "matching_heuristics": True}), LOAD),
    "fastai": ("a.pth", saved(lambda: {"model": state(), "opt": {"state": [{"step": 1}], "hypers": []}}), LOAD),
    "Hugging Face Trainer, .bin": ("pytorch_model.bin", saved(state), LOAD),
    "Hugging Face Trainer, shards": ("model.safetensors.index.json", sharded, LOAD),
    "DeepSpeed": ("mp_rank_00_model_states.pt", saved(
        lambda: {"module": state(), "ds_version": "0.14", "ds_config": {}, "global_steps": 3}), LOAD),
    "DINO": ("checkpoint.pth", saved(
        lambda: {"student": state("module.backbone."), "teacher": state("backbone.", seed=2), "args": namespace(),
                 "dino_loss": {"center": torch.zeros(1, 4)}}), "student.module.backbone|teacher.backbone"),
    "MoCo": ("checkpoint.pth.tar", saved(moco), "state_dict.module.encoder_q|state_dict.module.encoder_k"),
    "ema-pytorch": ("a.pt", saved(
        lambda: state("online_model.") | state("ema_model.", seed=2) | {"step": torch.tensor([3])}),
        "online_model|ema_model"),
    "BasicSR": ("net_g.pth", saved(lambda: {"params": state(), "params_ema": state(seed=2)}), "params|params_ema"),
    "catalyst": ("best.pth", saved(lambda: {"model_state_dict": state(), "epoch_metrics": {"a": 1.0}}), LOAD),
    "ignite": ("c.pt", saved(lambda: {"model": state(), "optimizer": optimizer(), "trainer": {"epoch": 3}}), LOAD),
    "Composer": ("ep3.pt", composer, LOAD),
    "fairseq": ("checkpoint_best.pt", fairseq, LOAD),
    "apex": ("a.pth", saved(lambda: {"model": state(), "amp": {"loss_scaler0": {"loss_scale": 1.0}}}), LOAD),
    "nnU-Net": ("checkpoint_final.pth", saved(
        lambda: {"network_weights": state(), "init_args": {"plans": {"a": [1]}}, "_best_ema": np.float64(0.8)}), LOAD),
    "Ultralytics": ("best.pt", lambda path: whole_module(path, "ultralytics.nn.tasks.DetectionModel"),
                    "refused: ultralytics.nn.tasks.DetectionModel"),
    "segmentation_models_pytorch": ("best.pth", lambda path: whole_module(
        path, "segmentation_models_pytorch.decoders.unet.model.Unet"),
        "refused: segmentation_models_pytorch.decoders.unet.model.Unet"),
}  # fmt: skip


def outcome(model: nn.Module, path: Path, key: str | None = None) -> str:
    """What became of a file, in a word or two."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CheckpointWarning)
        put_weights(model, load_checkpoint(path, key), f"checkpoint {str(path)!r}")
    left = [str(w.message) for w in caught if w.category is CheckpointWarning]
    return LOAD if not left else f"{LOAD}, {left[0].split(': ')[1].split(' are ')[0]} left"


def equal(model: nn.Module, seed: int) -> bool:
    pairs = zip(model.state_dict().values(), net(seed).state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("trainer", FILES)
def test_what_trainers_write_is_read(trainer: str, tmp_path: Path) -> None:
    name, write, expected = FILES[trainer]
    path = tmp_path / name
    write(path)
    model = net(7)
    if expected.startswith("refused: "):
        with pytest.raises(ArtifactError) as caught:
            load_checkpoint(path)
        line = str(caught.value)
        assert expected.removeprefix("refused: ") in line and "torch.save(model.state_dict()" in line
        assert "\n" not in line
    elif "|" in expected:
        keys = expected.split("|")
        with pytest.raises(ArtifactError, match=r"2 sets of weights.*model\.checkpoint_key") as caught:
            outcome(model, path)
        assert all(repr(key) in str(caught.value) for key in keys)
        for key, seed in zip(keys, (1, 2), strict=True):
            assert outcome(model, path, key) == LOAD
            assert equal(model, seed)
    else:
        assert outcome(model, path) == expected
        assert equal(model, 1)


def test_the_list_is_long() -> None:
    loads = [name for name, (_, _, expected) in FILES.items() if not expected.startswith("refused")]
    assert len(loads) >= 25


WRAPPERS = ("module", "model", "net", "backbone", "_orig_mod", "teacher", "ema", "network.encoder")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(WRAPPERS), max_size=5),
    st.lists(st.sampled_from(("state_dict", "model", "state", "params_ema", "weights")), max_size=3),
)
def test_any_prefix_in_any_order_is_taken_off(prefixes: list[str], keys: list[str]) -> None:
    content: object = state("".join(f"{p}." for p in prefixes))
    for key in keys:
        content = {key: content, "epoch": 3, "loss": torch.tensor(0.5)}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    model = net(7)
    path = Path("wrapped.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "rlprune.artifacts.checkpoint.read_weight_file",
            lambda _: torch.load(io.BytesIO(buffer.getvalue()), weights_only=True),
        )
        assert outcome(model, path) == LOAD
    assert equal(model, 1)


# The model's own wrappers


def test_a_wrapped_model_takes_the_weights_of_what_it_wraps() -> None:
    for own in (
        nn.ModuleDict({"backbone": net(7)}),
        nn.ModuleDict({"model": nn.ModuleDict({"net": net(7)})}),
    ):
        put_weights(own, state("module."), "file")
        assert equal(own, 1)


def test_a_models_own_module_is_no_wrapper() -> None:
    own = nn.ModuleDict({"module": net(7), "other": nn.Linear(2, 2)})
    given = nn.ModuleDict({"module": net(1), "other": nn.Linear(2, 2)})
    put_weights(own, {f"model.{n}": t for n, t in given.state_dict().items()}, "file")
    assert equal(own["module"], 1)


def test_tied_tensors_are_stored_once() -> None:
    own = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    own["head"].weight = own["embed"].weight
    put_weights(own, {"model.embed.weight": torch.ones(3, 2)}, "file")
    assert torch.equal(own["head"].weight, torch.ones(3, 2))


# Choices and misfits


def test_equal_sets_are_no_choice() -> None:
    model = net(7)
    with pytest.warns(CheckpointWarning, match="10 tensors are not the model's"):
        put_weights(model, state("teacher.") | state("student."), "file")
    assert equal(model, 1)


def test_of_several_places_the_one_with_the_shapes_is_taken() -> None:
    file = nn.ModuleDict({"neck": nn.Sequential(nn.Linear(3, 2)), "head": nn.Sequential(nn.Linear(4, 2))})
    own = nn.Sequential(nn.Linear(4, 2))
    with pytest.warns(CheckpointWarning, match=r"'neck\.0\.weight'"):
        put_weights(own, file.state_dict(), "file")
    assert torch.equal(own[0].weight, file["head"][0].weight)


def test_a_wrong_key_has_a_near_miss(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"state_dict": state(), "state_dict_ema": state(seed=2), "model": {"epoch": 3}}, path)
    with pytest.raises(
        ArtifactError, match=r"model\.checkpoint_key 'state_dict_em'.*did you mean 'state_dict_ema'"
    ):
        load_checkpoint(path, "state_dict_em")
    with pytest.raises(ArtifactError, match="it has state_dict, state_dict_ema"):
        load_checkpoint(path, "zzz")
    torch.save(state() | state("ema.", seed=2), path)
    for key, seed in ((".", 1), ("ema", 2)):
        model = net(7)
        put_weights(model, load_checkpoint(path, key), "file") if key == "ema" else None
        if key == ".":
            with pytest.warns(CheckpointWarning, match="not the model's"):
                put_weights(model, load_checkpoint(path, key), "file")
        assert equal(model, seed)


def test_a_deeper_model_does_not_pass_for_a_shallower_one() -> None:
    deeper = state() | {"features.9.weight": torch.zeros(3)}
    with pytest.raises(ArtifactError, match=r"unexpected 'features\.9\.weight'"):
        put_weights(net(7), deeper, "file")
    short, long = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ArtifactError, match=r"unexpected '1\.weight'"):
        put_weights(short, long.state_dict(), "file")
    with pytest.warns(
        CheckpointWarning, match="2 tensors are not the model's and not used: 'aux.weight', 'aux.bias'"
    ):
        put_weights(net(7), state() | {"aux.weight": torch.zeros(2), "aux.bias": torch.zeros(2)}, "file")


def test_missing_tensors_are_named_at_the_closest_prefix() -> None:
    given = {"state_dict.model." + n: t for n, t in state().items() if n != "features.0.bias"}
    with pytest.raises(ArtifactError, match=r"\(under 'state_dict\.model'\): missing 'features\.0\.bias'"):
        put_weights(net(7), given, "file")


def test_other_classes_start_anew_where_training_follows() -> None:
    given = net(1, classes=9).state_dict()
    model = net(7)
    with pytest.raises(
        ArtifactError, match=r"'fc\.weight' has shape \(9, 4\).*9 outputs.*5.*model\.train\.epochs"
    ):
        put_weights(model, given, "file")
    before = copy.deepcopy(model.fc.state_dict())
    with pytest.warns(CheckpointWarning, match="'fc' starts anew"):
        put_weights(model, given, "file", head=True)
    assert torch.equal(model.fc.weight, before["weight"]) and torch.equal(model.fc.bias, before["bias"])
    assert torch.equal(model.features[0].weight, net(1, classes=9).features[0].weight)
    backbone = {f"backbone.{n}": t for n, t in state().items() if not n.startswith("fc.")}
    with pytest.raises(ArtifactError, match=r"missing 'fc\.weight', 'fc\.bias'"):
        put_weights(net(7), backbone, "file")
    with pytest.warns(CheckpointWarning, match="'fc' starts anew"):
        put_weights(net(7), backbone, "file", head=True)
    # A layer in the middle is no head, even where training follows.
    narrow = net(1)
    narrow.features = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))
    with pytest.raises(
        ArtifactError, match=r"'features\.0\.weight' has shape .* the model needs \(4, 3, 3, 3\)$"
    ):
        put_weights(net(7), narrow.state_dict(), "file", head=True)


def test_several_heads_start_anew_together() -> None:
    given, own = (nn.ModuleDict({"boxes": nn.Conv2d(4, 4, 1), "classes": nn.Conv2d(4, 6 * k, 1),
                                 "coarse": nn.Conv2d(4, 2 * k, 1)}) for k in (9, 5))  # fmt: skip
    with pytest.warns(CheckpointWarning, match="'classes', 'coarse' start anew"):
        put_weights(own, given.state_dict(), "file", head=True)
    assert torch.equal(own["boxes"].weight, given["boxes"].weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_formats_are_taken_in_the_models_own(dtype: torch.dtype) -> None:
    model = net(7)
    put_weights(model, {n: t.to(dtype) if t.is_floating_point() else t for n, t in state().items()}, "file")
    assert model.fc.weight.dtype == torch.float32
    assert torch.equal(model.fc.weight, net(1).fc.weight.to(dtype).float())


def test_sparse_and_shared_storage_are_read(tmp_path: Path) -> None:
    given = state() | {"fc.weight": state()["fc.weight"].to_sparse()}
    model = net(7)
    put_weights(model, given, "file")
    assert equal(model, 1)
    flat = torch.cat([t.flatten() for t in state().values() if t.is_floating_point()])
    views, start = {}, 0
    for name, tensor in state().items():
        if tensor.is_floating_point():
            views[name] = flat[start : start + tensor.numel()].view(tensor.shape)
            start += tensor.numel()
    torch.save(views, tmp_path / "views.pt")
    model = net(7)
    put_weights(model, load_checkpoint(tmp_path / "views.pt"), "file")
    assert torch.equal(model.fc.weight, net(1).fc.weight)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "is quantised"),
        (lambda w: w.to(torch.int8), "holds int8, the model float32"),
        (lambda w: w.to(torch.float8_e4m3fn), "float8_e4m3fn, whose scale"),
        (lambda w: w.to("meta"), "has no data"),
        (lambda w: w.to(torch.complex64), "holds complex64"),
        (lambda w: w * float("nan"), "NaN or infinite"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_weights_are_named(value: Callable[[Tensor], Tensor], reason: str) -> None:
    given = state() | {"fc.weight": value(state()["fc.weight"])}
    with pytest.raises(ArtifactError, match=rf"'fc\.weight' {reason}|'fc\.weight' holds {reason}"):
        put_weights(net(7), given, "file")


# Files that are something else


def archive(path: Path, names: list[str]) -> None:
    with zipfile.ZipFile(path, "w") as made:
        for name in names:
            made.writestr(name, "x")


def program(path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), path)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("evil-was-here"),)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: p.mkdir(), "is a folder"),
        (lambda p: p.write_text("<!DOCTYPE html><html><body>Sign in</body></html>"), "page of HTML"),
        (
            lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9"),
            "git lfs pull",
        ),
        (lambda p: p.write_text(json.dumps({"error": "not found"})), "text in JSON"),
        (lambda p: archive(p, ["code.py", "README.md"]), "zip file, but no torch checkpoint"),
        (lambda p: archive(p, ["config.json", "model.weights.h5"]), "Keras"),
        (lambda p: np.savez(p.with_suffix(".npz"), a=np.eye(2)) or p.with_suffix(".npz").rename(p), r"\.npz"),
        (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "HDF5"),
        (lambda p: torch.jit.script(nn.Linear(2, 2)).save(p), "TorchScript"),
        (program, r"torch\.export"),
        (lambda p: torch.save(nn.DataParallel(net(1)), p), "torch.nn.parallel.data_parallel.DataParallel"),
        (lambda p: torch.save({"state_dict": state(), "x": Evil()}, p), "pickled code or objects"),
        (lambda p: p.write_bytes(pickle.dumps(state())), "truncated or not a torch checkpoint"),
        (lambda p: torch.save({"epoch": 3}, p), "no state dict"),
        (lambda p: torch.save([torch.zeros(3)], p), "does not fit"),
        (lambda p: p.write_bytes(b"hello, I am a text"), "truncated or not"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_other_files_are_said_to_be_what_they_are(
    write: Callable[[Path], object], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pt2" if write is program else tmp_path / "file.pt"
    write(path)
    with pytest.raises(ArtifactError, match=reason) as caught:
        put_weights(net(7), load_checkpoint(path), f"checkpoint {str(path)!r}")
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
    assert not Path("evil-was-here").exists()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(("zip", "old", "safetensors")), st.data())
def test_damaged_files_raise_our_error_only(form: str, data: st.DataObject) -> None:
    content = bytearray(_written(form))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file.pt")
        path.write_bytes(content if data.draw(st.booleans()) else content[:cut])
        with contextlib.suppress(ArtifactError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            put_weights(net(7), load_checkpoint(path), "file")


@functools.cache
def _written(form: str) -> bytes:
    buffer = io.BytesIO()
    if form == "safetensors":
        return save(state())
    torch.save({"net": state(), **notes()}, buffer, _use_new_zipfile_serialization=form == "zip")
    return buffer.getvalue()


def test_an_index_names_files_beside_it_only(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(ArtifactError, match="no plain file name"):
        load_checkpoint(path)
    path.write_text("[]")
    with pytest.raises(ArtifactError, match="no index of shards"):
        load_checkpoint(path)
    path.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ArtifactError, match=r"gone\.safetensors.*no such file"):
        load_checkpoint(path)


def test_a_file_is_read_for_what_it_is_whatever_its_suffix(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "weights.pth")
    model = net(7)
    put_weights(model, load_checkpoint(tmp_path / "weights.pth"), "file")
    assert equal(model, 1)
