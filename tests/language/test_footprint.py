"""Predicted memory: every term that can be counted is what is really held."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import rlprune
from helpers.language_workload import workload_of
from helpers.lm import tiny_lm
from helpers.lm_folder import write_folder
from rlprune.config.config import Config, ScoreConfig
from rlprune.config.training import RecoveryConfig
from rlprune.evaluation.evaluator import Evaluator
from rlprune.experiments.inspect import inspect
from rlprune.language.calibration.fisher import output_moments
from rlprune.language.calibration.grams import collect
from rlprune.language.footprints import footprint, size


def config(*overrides: str) -> Config:
    plain = Config.from_dict(
        {
            "model": {"name": "tiny_llama"},
            "data": {"name": "help_texts", "sequence_length": 16, "calibration": 6, "validation": 8},
            "budget": {"metric": "params", "target": 0.7},
            "prune": {"importance": "obs_fisher"},
            "recovery": {"steps": ["reconstruct"]},
            "score": {"dtype": "float32", "top_k": 20},
        }
    )
    return plain.override(overrides)


@pytest.mark.parametrize("name", ["llama", "llama-mha-tied", "gpt_neox", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_can_be_counted_is_exact(name, dtype):
    workload = workload_of(tiny_lm(name, dtype=dtype))
    model = workload.model
    settings = config("score.dtype=bfloat16")
    evaluator = Evaluator(
        workload,
        importance="wanda_sp",
        recovery=RecoveryConfig(steps=("reconstruct",)),
        score=ScoreConfig(dtype="bfloat16", top_k=20),
        metric="params",
    )
    space = evaluator.space
    said = footprint(model, space, settings, element=next(model.parameters()).element_size())
    assert said.search["weights"] == sum(p.nbytes for p in model.parameters())
    means = sum(4 * (p.numel()) for n, p in model.named_parameters() if n.endswith("bias"))
    assert said.search["factors"] == pytest.approx(evaluator.recovery.nbytes, abs=40 * means + 1)
    moments = output_moments(model, space, workload.batches("calibration"))
    assert said.prepare["output moments"] == sum(m.nbytes for m in moments.values())
    grams = collect(model, space, workload.batches("calibration"))
    blocks = [[n for n in grams.names if f".{b}." in n] for b in range(3)]
    most = max(sum(grams[n].product.nbytes for n in names) for names in blocks)
    assert said.prepare["one block's Gram matrices"] == most
    widths = space.project(np.ones(len(space.groups)), 0.7, "params")
    slim = evaluator.build(widths, scoring=True)
    dense = {p.data_ptr() for p in model.parameters()}
    own = sum(p.nbytes for p in slim.parameters() if p.data_ptr() not in dense)
    vectors = sum(p.nbytes for p in slim.parameters() if p.ndim == 1)
    assert said.search["candidate"] == pytest.approx(own, abs=vectors)


def test_spilled_factors_are_on_the_disk(tmp_path):
    model = tiny_lm("llama")
    space = rlprune.trace(model, torch.zeros(1, 16, dtype=torch.long))
    held = footprint(model, space, config())
    spilled = footprint(model, space, config(f"recovery.spill={tmp_path}"))
    assert spilled.spilled == held.search["factors"] and held.spilled == 0
    assert spilled.search["factors"] == 0 < held.search["factors"]
    assert any(line.startswith("disk, recovery.spill: ") for line in spilled.lines())


def test_the_fullest_of_several_devices_holds_its_share_and_what_one_of_them_computes():
    model = tiny_lm("llama")
    space = rlprune.trace(model, torch.zeros(1, 16, dtype=torch.long))
    said = footprint(model, space, config("prune.importance=obs_fisher"), device="cuda")
    assert said.fullest(1) == (said.prepare_peak, said.search_peak)
    prepare, search = said.fullest(4)
    alone = sum(v for k, v in said.search.items() if k in ("judging", "dense answers", "process"))
    assert search == alone + (said.search_peak - alone) / 4
    for parts in (said.prepare, *said.lower):
        assert sum(parts.values()) / 4 < prepare < said.prepare_peak


def test_inspect_says_both_peaks_without_reading_weights(tmp_path):
    folder = write_folder(tmp_path / "model", hidden_size=128, intermediate_size=4096)
    (folder / "model.safetensors").unlink()
    text = inspect(config(f"model.name=hf:{folder}")).text
    prepare, search = text.splitlines()[-2:]
    assert prepare.startswith("memory, prepare: ") and search.startswith("memory, search: ")
    assert "MB at the peak (weights " in search and "candidate" in search
    assert "factors" not in inspect(config(f"model.name=hf:{folder}", "recovery.steps=[none]")).text


def test_images_have_no_formula():
    text = inspect(rlprune.load_config("digits")).text
    assert "memory: not predicted for such a model" in text and "MiB" not in text


def test_sizes_in_words():
    assert [size(n) for n in (1.5e6, 999e6, 1.25e9)] == ["2 MB", "999 MB", "1.25 GB"]
