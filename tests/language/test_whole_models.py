"""Models that read pictures beside text: their language part is pruned, the rest stays and is saved with it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rlprune
from helpers.lm_folder import write_config
from helpers.whole_models import WHOLE, picture_inputs, whole_model
from rlprune import masked
from rlprune.cli.main import main
from rlprune.language import families, random_plan
from rlprune.language.proof import skeleton

QUICK = ("gemma3",)
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in WHOLE]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    for kind in tuple(families.FOUND):
        families.unregister(kind)


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize("name", ALL)
def test_pictures_and_text_as_the_masked_dense_model_sees_them(name: str, tmp_path: Path) -> None:
    model = whole_model(name, torch.float64)
    space = rlprune.trace(model, torch.arange(2, 14)[None], drop=True)
    assert {group.kind for group in space.groups} == {"attention", "ffn"}
    assert all("language_model" in group.name for group in space.groups)
    inputs = picture_inputs(name, torch.float64)
    plan = random_plan(space, np.random.default_rng(2))
    slim: Any = rlprune.prune(model, plan)
    wanted = logits(masked(model, plan), inputs)
    assert torch.allclose(logits(slim, inputs), wanted, rtol=0.0, atol=1e-9)
    assert not torch.allclose(logits(model, inputs), wanted, rtol=1e-3)
    blank = {n: torch.zeros_like(t) if n == "pixel_values" else t for n, t in inputs.items()}
    assert not torch.allclose(logits(slim, blank), wanted, rtol=1e-3)  # the picture is looked at
    rlprune.save(slim, plan, tmp_path / "pruned")
    families.unregister(name)
    assert torch.equal(logits(rlprune.load(tmp_path / "pruned"), inputs), logits(slim, inputs))
    torch.save((inputs, logits(slim, inputs)), tmp_path / "wanted.pt")
    code = """
import sys; sys.modules["rlprune"] = None
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
inputs, wanted = torch.load("wanted.pt")
for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
    model = auto.from_pretrained("pruned", trust_remote_code=True).eval()
    difference = (model(**inputs).logits - wanted).abs().max()  # in float64; another process adds in another order
    assert difference < 1e-12, difference
    texts = [model.generate(inputs["input_ids"][:, :2], max_new_tokens=4, do_sample=False, use_cache=use)
             for use in (True, False)]
    assert torch.equal(*texts)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in WHOLE])
def test_from_a_folder_by_the_command_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlprune.language.loading import help_tokenizer

    dense = tmp_path / "dense"
    whole_model(name).save_pretrained(dense)
    help_tokenizer(280).save_pretrained(dense)
    (dense / "preprocessor_config.json").write_text("{}")
    config = str(write_config(tmp_path / "config.yaml", dense))
    pruned = tmp_path / "pruned"
    assert main(["inspect", config]) == 0
    assert "outside the language part, kept as they are" in capsys.readouterr().out
    assert main(["prune", config, "--rule", "uniform", "--out", str(pruned)]) == 0
    assert (pruned / "preprocessor_config.json").exists()
    assert main(["evaluate", str(pruned), config]) == 0
    assert "test perplexity" in capsys.readouterr().out
    assert main(["export", str(pruned), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    assert "the language part is one of several" in capsys.readouterr().out
    assert main(["export", str(pruned), "--to", "gguf", "--out", str(tmp_path / "x.gguf")]) == 2


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_the_narrow_model_of_a_config_has_the_head_size_that_its_class_derives(name: str) -> None:
    model = whole_model(name)
    rlprune.trace(model, torch.arange(2, 14)[None], drop=True)
    narrow: Any = skeleton(model.config)
    with torch.no_grad():
        assert narrow(input_ids=torch.arange(2, 14)[None]).logits.shape == (1, 12, 128)
