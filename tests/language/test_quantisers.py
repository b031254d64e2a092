"""Quantisers run on pruned language models with unequal layers and dropped parts, with outputs near ours."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rlprune
from helpers.lm import tiny_lm, tokens
from helpers.pruned_lm import logits, plan_of, pruned
from rlprune.language.linear import is_dropped


def dynamic_int8(model: nn.Module, folder: Path) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def torchao_weights(model: nn.Module, folder: Path) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def torchao_dynamic(model: nn.Module, folder: Path) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    return model


def bitsandbytes_8bit(model: nn.Module, folder: Path) -> nn.Module:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )


QUANTISERS: list[Callable[[nn.Module, Path], nn.Module]] = [
    dynamic_int8,
    torchao_weights,
    torchao_dynamic,
    bitsandbytes_8bit,
]


def quantised_layers(model: nn.Module) -> int:
    """Layers that are of a quantised class, or hold weights that are."""
    classes = [m for m in model.modules() if re.search("quantized|bitsandbytes", type(m).__module__)]
    weights = [p for p in model.parameters() if type(p.data) is not torch.Tensor]
    return max(len(classes), len(weights))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pruned models of three families: a block without attention, one without neurons, all widths unequal."""
    place, made = tmp_path_factory.mktemp("quantised"), {}
    for name in ("llama", "opt", "gpt_neox"):
        model = tiny_lm(name)
        space = rlprune.trace(model, tokens(), drop=True, verify=False)
        widths = [0 if i in (0, 3) else w - 1 - i for i, w in enumerate(space.widths)]
        plan = plan_of(space, [max(w, 1) if i not in (0, 3) else 0 for i, w in enumerate(widths)])
        made[name] = rlprune.save(rlprune.prune(model, plan), plan, place / name)
    return made


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox"])
@pytest.mark.parametrize("quantise", QUANTISERS)
@pytest.mark.filterwarnings("ignore")  # of the libraries, about themselves
def test_a_quantiser_runs_on_dropped_parts_and_unequal_widths(
    quantise: Callable[[nn.Module, Path], nn.Module], name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    ours = rlprune.load(folders[name])
    assert sum(is_dropped(m) for m in ours.modules()) >= 2
    wanted = logits(ours).log_softmax(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = quantise(copy.deepcopy(ours), folders[name])
    inside = [n for n, m in ours.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert quantised_layers(found) >= len(inside) - 1 >= 6  # the head may have another name
    got = logits(found).float().log_softmax(-1)
    assert torch.isfinite(got).all()
    assert float((got - wanted).abs().max()) < 0.5
    assert float((got.exp() * (got - wanted)).sum(-1).mean()) < 0.01  # nats a token


def test_no_linear_layer_is_empty(folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        model: Any = rlprune.load(folder)
        assert all(p.numel() for p in model.parameters()), name
        assert not [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and 0 in m.weight.shape]


def test_a_folder_with_the_empty_tensors_of_version_1_loads(tmp_path: Path) -> None:
    """Earlier versions stored (0, H) and (H, 0) matrices in the place of a dropped part."""
    from safetensors.torch import load_file, save_file

    from helpers.pruned_lm import edit
    from rlprune.artifacts.fitting import checksum

    slim, plan = pruned("llama", 3)
    folder = rlprune.save(slim, plan, tmp_path / "old")
    held = load_file(folder / "model.safetensors")
    dense = tiny_lm("llama").state_dict()
    empty = {}
    for cut in plan.space.cuts:
        if cut.tensor not in held:
            shape = [0 if d == cut.dim else n for d, n in enumerate(dense[cut.tensor].shape)]
            empty[cut.tensor] = torch.zeros(shape)
    assert len(empty) == 7  # four matrices of an attention, three of a feed-forward part
    save_file(held | empty, folder / "model.safetensors", {"format": "pt", "rlprune": "1"})

    def as_before(document: dict[str, Any]) -> None:
        document["version"] = 1
        document["tensors"] |= {name: list(tensor.shape) for name, tensor in empty.items()}
        document["checksums"] |= {name: checksum(tensor) for name, tensor in empty.items()}

    edit(folder / "plan.json", as_before)
    assert torch.equal(logits(rlprune.load(folder)), logits(slim))
