"""Models of other tasks and libraries by name: torchvision's segmentation, detection, video; transformers' images."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rlprune
from rlprune.artifacts.checkpoint import put_weights
from rlprune.cli.main import main
from rlprune.config.config import load_config
from rlprune.errors import ArtifactError, ConfigError, RlpruneError
from rlprune.pruning.space import fingerprint
from rlprune.utils import call, tensors
from rlprune.vision import base_of, build_model, example_for, hf_models, task_of, torchvision_models
from rlprune.vision.identify import identify
from rlprune.vision.rebuild import rebuild
from rlprune.vision.zoo import list_models
from rlprune.workloads.builder import builder_of

TINY_VIT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": 4,
    "image_size": 8,
}  # fmt: skip


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return list(tensors(call(model, inputs)))


def identified(model: nn.Module) -> dict[str, Any] | None:
    return identify(model, fingerprint(model), sum(p.numel() for p in model.parameters()))


def test_every_float_model_of_torchvision_has_a_name_and_a_task() -> None:
    from torchvision import models

    found = dict(torchvision_models.names())
    assert {n for n in models.list_models() if not n.startswith("quantized_")} == set(found)
    assert set(found.values()) == set(torchvision_models.TASKS)
    names = [name for name, _ in list_models()]
    assert {*found, "hf:vit", "hf:resnet", "hf:FOLDER"} <= set(names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "task", "channels", "side", "shape"),
    [
        ("lraspp_mobilenet_v3_large", "segmentation", 1, 64, (1, 5, 64, 64)),
        ("fcn_resnet50", "segmentation", 3, 32, (1, 5, 32, 32)),
        ("ssdlite320_mobilenet_v3_large", "detection", 1, 64, None),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", "detection", 3, 64, None),
        ("r3d_18", "video", 1, 16, (1, 5)),
        ("raft_small", "optical flow", 3, 128, (1, 2, 128, 128)),
        ("mobilenet_v3_small", "classification", 1, 32, (1, 5)),
    ],
)
def test_a_model_of_each_task_is_built_run_rebuilt_and_known_again(
    name: str, task: str, channels: int, side: int, shape: tuple[int, ...] | None
) -> None:
    base = base_of(name, 5, channels)
    model = build_model(name, 5, channels)
    assert task_of(base) == task
    inputs = example_for(base, side)
    assert isinstance(inputs, list) == (task == "detection")
    found = outputs(model, inputs)
    if shape is not None:
        assert found[0].shape == shape
    assert identified(model) == base
    twin = rebuild(json.loads(json.dumps(base)))
    put_weights(twin, model.state_dict(), "the model")
    assert all(torch.equal(a, b) for a, b in zip(outputs(twin, inputs), found, strict=True))


@pytest.mark.parametrize("name", ["fcn_resnet50", "retinanet_resnet50_fpn", "ssd300_vgg16"])
def test_nothing_is_downloaded_for_a_backbone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    build_model(name, 3)
    with pytest.raises(ConfigError, match=r"model\.arguments\.weights_backbone"):
        build_model(name, 3, arguments={"weights_backbone": "DEFAULT"})


@pytest.mark.parametrize(
    ("name", "frozen"),
    [("fasterrcnn_resnet50_fpn", 0.0), ("fcos_resnet50_fpn", 1e-5), ("ssdlite320_mobilenet_v3_large", None)],
)
def test_published_detectors_are_built_as_torchvision_builds_them_for_their_weights(
    name: str, frozen: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision freezes the norms of a backbone as soon as weights are asked for, and sets some of their eps to 0."""
    from torchvision import models

    published: dict[str, Tensor] = {}

    def fetched(*args: object, **kwargs: object) -> dict[str, Tensor]:
        return published

    ours = build_model(name, 91, arguments=torchvision_models.arguments_of_weights(name))
    published.update(ours.state_dict())
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetched)
    theirs = models.get_model(name, weights="COCO_V1").eval()
    kinds, epsilons = (
        [[getattr(m, key, None) for m in net.modules()] for net in (ours, theirs)]
        for key in ("__class__", "eps")
    )
    assert kinds[0] == kinds[1]
    assert epsilons[0] == epsilons[1]
    assert torchvision_models.arguments_of_weights(name).get("frozen_norm") == frozen
    assert identified(ours) == base_of(name, 91, weights="DEFAULT")


def test_a_timm_transformer_of_another_image_size_is_known_again() -> None:
    pytest.importorskip("timm")
    arguments = {"img_size": 32, "depth": 1, "embed_dim": 192}
    usual = build_model("timm:vit_tiny_patch16_224", 3)
    small = build_model("timm:vit_tiny_patch16_224", 3, arguments={"img_size": 32})
    for model, own in ((usual, {}), (small, {"img_size": [32, 32]})):
        found = identified(model)
        assert found is not None
        assert found["arguments"] == {"num_classes": 3, "in_chans": 3} | own
    assert identified(build_model("timm:vit_tiny_patch16_224", 3, arguments=arguments)) is None


def test_quantised_models_are_refused_with_the_float_one() -> None:
    with pytest.raises(ConfigError, match="quantised models cannot be pruned; use 'resnet18'"):
        build_model("quantized_resnet18")
    with pytest.raises(ConfigError, match="did you mean 'lraspp_mobilenet_v3_large'"):
        build_model("lraspp_mobilenet_v3")


@pytest.mark.parametrize(
    "kind", ["resnet", "convnext", "mobilenet_v1", "mobilenet_v2", "levit", "swiftformer", "pp_lcnet"]
)
def test_an_image_classifier_of_transformers_is_built_and_known_again(kind: str) -> None:
    base = base_of(f"hf:{kind}", 5, 1, side=64)
    model = build_model(f"hf:{kind}", 5, 1, side=64)
    side = None if kind == "levit" else 64
    assert outputs(model, example_for(base, side))[0].shape == (1, 5)
    found = identified(model)
    assert found is not None
    assert fingerprint(rebuild(json.loads(json.dumps(found)))) == fingerprint(model)
    assert fingerprint(rebuild(json.loads(json.dumps(base)))) == fingerprint(model)


def test_arguments_of_a_config_and_of_its_parts() -> None:
    model = build_model("hf:vit", 7, arguments=TINY_VIT)
    assert model.config.image_size == 8
    assert outputs(model, example_for(base_of("hf:vit", 7, arguments=TINY_VIT)))[0].shape == (1, 7)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    clip = build_model("hf:clip", 3, 1, arguments={"vision_config": vision}, side=64)
    found = identified(clip)
    assert found is not None
    assert found["arguments"]["vision_config"]["image_size"] == 64
    assert fingerprint(rebuild(found)) == fingerprint(clip)
    # Images of the data are 28 pixels wide, unless the user says something else.
    assert base_of("hf:vit", 10, side=28)["arguments"]["image_size"] == 28
    assert base_of("hf:vit", 10, side=28, arguments={"image_size": 32})["arguments"]["image_size"] == 32


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("hf:vti", {}, "did you mean 'vit'"),
        ("hf:imagegpt", {}, "reads tokens, not pixels"),
        ("hf:timm_wrapper", {}, "timm:NAME"),
        ("hf:vit", {"hiden_size": 3}, "did you mean 'hidden_size'"),
        ("hf:vit", {"auto_map": {"AutoConfig": "x.Y"}}, r"model\.arguments\.auto_map: not allowed"),
        ("hf:vit", {"hidden_act": "nothing"}, "cannot be built"),
        ("hf:resnet", {"image_size": 32}, "image_size"),
    ],
)
def test_wrong_names_and_arguments_are_refused_in_one_line(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_model(name, 3, arguments=arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "base",
    [
        {"source": "hf", "name": "google/vit-base-patch16-224", "arguments": {}},
        {"source": "hf", "name": "FOLDER", "arguments": {}},
        {"source": "hf", "name": "gpt2", "arguments": {}},
        {"source": "hf", "name": "vit", "arguments": {"auto_map": {"AutoModel": "evil.Evil"}}},
        {"source": "hf", "name": "vit", "arguments": {"trust_remote_code": True}},
        {"source": "torchvision", "name": "fcn_resnet50", "arguments": {"weights_backbone": "DEFAULT"}},
        {"source": "torchvision", "name": "quantized_resnet18", "arguments": {}},
    ],
)
def test_rebuild_fetches_nothing_and_reads_no_folder(base: dict[str, Any], tmp_path: Path) -> None:
    if base["name"] == "FOLDER":
        build_model("hf:vit", 3, arguments=TINY_VIT).save_pretrained(tmp_path)
        base = base | {"name": str(tmp_path)}
    with pytest.raises(ArtifactError) as caught:
        rebuild(base)
    assert "\n" not in str(caught.value)


def test_a_folder_brings_its_sizes_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dense = build_model("hf:vit", 4, arguments=TINY_VIT, seed=3)
    dense.save_pretrained("mine")
    assert builder_of("hf:mine").wing == builder_of("hf:./mine").wing == "vision"
    inputs = example_for(base_of("hf:mine", 4))
    assert inputs.shape == (1, 3, 8, 8)
    loaded = build_model("hf:mine", 4)
    assert torch.equal(outputs(loaded, inputs)[0], outputs(dense, inputs)[0])
    # Another number of classes keeps everything but the head.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether this is worth a warning is said elsewhere
        other = build_model("hf:mine", 6, side=28)
    assert outputs(other, inputs)[0].shape == (1, 6)
    assert torch.equal(other.vit.embeddings.cls_token, dense.vit.embeddings.cls_token)
    # The weights may come from elsewhere, as for the other libraries.
    again = build_model("hf:vit", 4, arguments=TINY_VIT, weights="mine")
    assert torch.equal(again.classifier.weight, dense.classifier.weight)
    base = base_of("hf:mine", 4)
    assert base["name"] == "vit"
    shutil.rmtree("mine")
    assert fingerprint(rebuild(base)) == fingerprint(dense)


def test_broken_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    build_model("hf:vit", 4, arguments=TINY_VIT).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="cannot be read") as caught:
        build_model(f"hf:{tmp_path}", 4)
    assert "\n" not in str(caught.value)
    config = json.loads((tmp_path / "config.json").read_text())
    for change in ({"hidden_size": "wide"}, {"model_type": 3}, {"model_type": "vti"}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(RlpruneError) as caught_too:
            build_model(f"hf:{tmp_path}", 4)
        assert "\n" not in str(caught_too.value)


def test_language_models_stay_with_their_wing(tmp_path: Path) -> None:
    for name in ("hf:gpt2", "hf:facebook/opt-125m", "hf:model.gguf", "tiny_llama"):
        assert builder_of(name).wing == "language"
    for name in ("hf:vit", "hf:resnet", "hf:imagegpt", "resnet18"):
        assert builder_of(name).wing == "vision"
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert builder_of(f"hf:{tmp_path}").wing == "language"


@pytest.mark.filterwarnings("ignore::rlprune.pruning.cost_terms.NarrowSpaceWarning")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("hf:vit", TINY_VIT),
        ("lraspp_mobilenet_v3_large", {}),
        ("hf:mobilenet_v2", {"depth_multiplier": 0.25}),
    ],
)
def test_a_pruned_folder_loads_without_its_base(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    model = build_model(name, 4, arguments=arguments)
    inputs = example_for(base_of(name, 4, arguments=arguments), None if "image_size" in arguments else 64)
    space = rlprune.trace(model, inputs)
    budget = max(0.5, 1.01 * space.lowest())
    plan = rlprune.make_plan(
        space,
        importance=rlprune.importance.magnitude(model, space),
        widths=space.project(space.widths, budget),
    )
    slim = rlprune.prune(model, plan)
    rlprune.save(slim, plan, tmp_path / "pruned")
    loaded = rlprune.load(tmp_path / "pruned")
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded, inputs), outputs(slim, inputs), strict=True))


def test_a_segmenter_over_labelled_images_is_refused_and_can_be_inspected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("seg.yaml").write_text(
        "model: {name: lraspp_mobilenet_v3_large}\ndata: {name: digits, image_size: 64}\n"
    )
    assert main(["train", "seg.yaml", "--out", "run"]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    assert "a class for every pixel (segmentation)" in line
    assert "workload: module:name" in line
    assert not Path("run").exists()
    assert main(["inspect", "seg.yaml"]) == 0
    text = capsys.readouterr().out
    assert "classifier.low_classifier: output of the model" in text
    assert "feasible budgets" in text
    assert main(["inspect", "seg.yaml", "--set", "budget.metric=latency", "budget.target=90%"]) == 2
    assert "needs a workload of your own" in capsys.readouterr().err
    assert load_config("seg.yaml").data.image_size == 64


def test_a_vision_transformer_takes_the_size_of_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = {key: value for key, value in TINY_VIT.items() if key != "image_size"}
    Path("vit.yaml").write_text(
        f"model: {{name: 'hf:vit', arguments: {json.dumps(arguments)}}}\n"
        "data: {name: digits}\nbudget: {target: 0.99}\n"
    )
    assert main(["inspect", "vit.yaml"]) == 0
    assert "vit.layers.0.mlp.fc1" in capsys.readouterr().out
    assert hf_models.own_weights("hf:vit") is None


def test_a_cached_hub_id_counts_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')

    def cached(repo_id: str, filename: str) -> str | None:
        return str(tmp_path / filename) if repo_id == "someone/vit" else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    assert builder_of("hf:someone/vit").wing == "vision"
    assert builder_of("hf:someone/else").wing == "language"
    assert hf_models.own_weights("hf:someone/vit") == "someone/vit"
    (tmp_path / "config.json").write_text("[]")
    assert builder_of("hf:someone/vit").wing == "language"
