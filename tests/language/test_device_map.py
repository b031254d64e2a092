"""A dense model that accelerate has spread over devices: cut, measured and scored where its layers lie."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

from helpers.language_workload import evaluator_of, plans, workload_of
from helpers.lm import tiny_lm
from rlprune.config.config import Config
from rlprune.errors import ConfigError
from rlprune.experiments.build import build_workload
from rlprune.language import loading

accelerate = pytest.importorskip("accelerate")


def hooked(model: torch.nn.Module) -> torch.nn.Module:
    """Every layer with accelerate's hooks, as on several devices; they are one and the same here."""
    names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(3)), "model.norm", "lm_head"]
    names.append("model.rotary_emb")
    found = accelerate.dispatch_model(model, dict.fromkeys(names, "cpu"), force_hooks=True)
    for method in ("to", "cuda"):
        vars(found).pop(method, None)
    return found


@pytest.mark.parametrize("importance", ["obs_fisher", "wanda_sp"])
def test_candidates_of_a_spread_model_are_those_of_a_plain_one(importance):
    plain = tiny_lm("llama")
    spread = hooked(copy.deepcopy(plain))
    assert hasattr(spread, "hf_device_map") and hasattr(spread.model.layers[1], "_hf_hook")
    scores = []
    for model in (plain, spread):
        evaluator = evaluator_of(workload_of(model), importance=importance, steps=("reconstruct",))
        some = plans(evaluator, 3)
        scores.append([evaluator.evaluate(w).score for w in some])
    assert scores[0] == scores[1]
    # A candidate's hooks are its own: its forward pass runs its own layers, not the dense model's.
    slim = evaluator.build(some[0], scoring=True)
    layer = slim.model.layers[1]
    assert layer._old_forward.__self__ is layer and layer.forward.args[0] is layer
    assert slim.model.embed_tokens.weight.data_ptr() == spread.model.embed_tokens.weight.data_ptr()


def config(**model: object) -> Config:
    return Config.from_dict({"model": model, "data": {"name": "help_texts", "sequence_length": 16}})


def test_a_folder_is_loaded_over_the_devices_that_there_are(tmp_path):
    tiny_lm("llama", vocab_size=300).save_pretrained(tmp_path)
    loading.help_tokenizer(300).save_pretrained(tmp_path)
    settings = config(name=f"hf:{tmp_path}", device_map="auto")
    workload = build_workload(settings.override(["data.calibration=4", "data.validation=4", "data.test=4"]))
    assert workload.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert not {"to", "cuda"} & set(vars(workload.model))
    with pytest.raises(ConfigError, match="device_map: chooses the devices; leave device at auto"):
        build_workload(settings.override(["device=cpu"]))
    with pytest.raises(ConfigError, match=r"finish.steps: .*accelerate launch -m rlprune.experiments.tune"):
        build_workload(settings.override(["finish.steps=3"]))


def test_what_cannot_be_spread_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="model.device_map: 'tiny_llama' fits on one device"):
        build_workload(config(name="tiny_llama", device_map="auto"))
    with pytest.raises(ConfigError, match="model.device_map: .ballanced. is not one of auto, balanced"):
        config(name="tiny_llama", device_map="ballanced")
    away = tiny_lm("llama")
    away.model.layers[2].to("meta")
    with pytest.raises(
        ConfigError, match=r"9 tensors \('model.layers.2.self_attn.q_proj.weight' among them\)"
    ):
        loading._refuse_offloaded(away)
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"device_map: needs accelerate; pip install 'rlprune\[language\]'"):
        loading._require_accelerate("hf:somewhere")
    assert "accelerate" in sys.modules
