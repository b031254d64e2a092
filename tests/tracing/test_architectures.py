"""Every architecture of docs/architectures.md: exact surgery and exact costs, or a refusal in one line."""

from __future__ import annotations

import pytest
import torch

import rlprune
from helpers.scripts import load_script

FAST = (
    *(
        "cifar_resnet20",
        "shufflenet_v2_x1_0",
        "resnet18",
        "mobilenet_v3_small",
        "squeezenet1_1",
        "regnet_y_400mf",
        "googlenet",
    ),
    *("lraspp_mobilenet_v3_large", "hf:mobilenet_v2", "timm:lcnet_035"),
)
SLOW = (
    *("resnet50", "vgg11_bn", "densenet121", "inception_v3", "efficientnet_b0", "mnasnet1_0"),
    *("cifar_googlenet", "r3d_18", "hf:resnet", "timm:resnetv2_18", "timm:seresnet18", "timm:ghostnet_050"),
    *("timm:repvgg_a0", "timm:dla34", "timm:hrnet_w18_small", "timm:darknet53"),
)


script = load_script("architectures")


def _check(name: str) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    facts = script.examine(name)
    assert facts["macs_equal"], "formula and FLOP counter differ"
    assert facts["params_equal"]
    assert facts["difference"] <= 1e-9 < facts["changed"]
    assert facts["reloaded"]
    assert facts["ratio"] <= 0.5
    assert script.result(facts) == "works"


@pytest.mark.parametrize("name", FAST)
def test_a_random_cut_is_exact(name: str) -> None:
    _check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_random_cut_of_a_larger_architecture_is_exact(name: str) -> None:
    _check(name)


@pytest.mark.slow
def test_a_norm_over_the_channels_of_the_whole_image_is_refused_in_one_line() -> None:
    pytest.importorskip("timm")
    # GlobalResponseNorm divides by the mean over all channels: a cut changes what is kept.
    with pytest.raises(rlprune.GraphError, match="differs from the masked dense model") as error:
        script.examine("timm:convnextv2_atto")
    assert "\n" not in str(error.value) and "ConvNeXt" in str(error.value)


def test_tracing_that_explodes_is_stopped_by_its_limit() -> None:
    model = script.build_model("swin_t")
    with pytest.raises(rlprune.GraphError, match="took more than 2 s"):
        rlprune.trace(model, torch.randn(1, 3, 224, 224), max_seconds=2.0, max_memory_gb=4.0)


def test_a_transformer_is_cut_exactly_as_far_as_it_can_be_followed() -> None:
    facts = script.examine("hf:vit")
    assert script.exact(facts), facts
    assert facts["lowest"]["macs"] < 0.75
