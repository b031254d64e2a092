"""The language workload: its batches, the closed test split, its protocol, and a plan of it that generates."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rlprune
from helpers.language_workload import workload_of
from helpers.lm import tiny_lm
from rlprune.errors import DataError
from rlprune.importance.importance import l2
from rlprune.language.text import TextData
from rlprune.language.workload import LanguageWorkload
from rlprune.pruning.plan import make_plan
from rlprune.workloads import SPLITS
from rlprune.workloads.checks import check_workload


@pytest.fixture(scope="module")
def workload() -> LanguageWorkload:
    return workload_of(tiny_lm("llama"))


class TestContract:
    def test_batches(self, workload):
        check_workload(workload)
        assert workload.adapter.wing == "language" and workload.metric_name == "perplexity"
        assert workload.example_inputs.shape == (1, 16) and workload.example_inputs.dtype == torch.int64
        for split in SPLITS[:3]:
            once, again = list(workload.batches(split)), list(workload.batches(split))
            assert all(
                torch.equal(a[0], b[0]) and torch.equal(a[1], a[0]) for a, b in zip(once, again, strict=True)
            )
            assert sum(len(ids) for ids, _ in once) == workload.size(split)
            first = torch.cat([ids for ids, _ in workload.batches(split, 3)])
            assert torch.equal(first, torch.cat([ids for ids, _ in once])[:3])

    def test_test_split_is_closed(self, workload):
        with pytest.raises(DataError, match="closed"):
            workload.evaluate(workload.model, "test")
        with workload.test_opened():
            assert workload.evaluate(workload.model, "test").count == 5 * 15

    def test_training_epochs_are_shuffled_blocks_of_train(self, workload):
        def epoch(seed):
            batches = workload.train_batches(torch.Generator().manual_seed(seed), 2)
            return [ids for ids, _ in batches]

        assert len(epoch(0)) == workload.train_steps(2) == 2
        assert all(torch.equal(a, b) for a, b in zip(epoch(0), epoch(0), strict=True))
        rows = {tuple(r) for batch in epoch(0) for r in batch.tolist()}
        assert rows == {tuple(r) for ids, _ in workload.batches("train") for r in ids.tolist()}

    def test_evaluation_leaves_the_model_as_it_was(self, workload):
        workload.model.train()
        workload.model.config.use_cache = True
        before = {k: v.clone() for k, v in workload.model.state_dict().items()}
        workload.evaluate(workload.model, "validation")
        assert workload.model.training and workload.model.config.use_cache
        assert all(torch.equal(v, before[k]) for k, v in workload.model.state_dict().items())
        workload.model.eval()

    def test_protocol_says_what_a_perplexity_means(self, workload):
        splits = workload.protocol()["splits"]
        assert splits["test"] == {
            "text": "random", "length": 16, "stride": 16, "sequences": 5, "tokens": 75
        }  # fmt: skip
        assert workload.stride == 16 and workload.length("validation") == 16
        assert json.loads(json.dumps(workload.protocol())) == workload.protocol()

    def test_base_rebuilds_the_architecture(self, workload):
        base = json.loads(json.dumps(workload.base))
        assert base["source"] == "transformers" and base["config"]["model_type"] == "llama"
        again = LlamaForCausalLM(LlamaConfig(**base["config"]))
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in workload.model.state_dict().items()
        }


def test_a_plan_of_the_tiny_llama_is_built_and_generates(workload):
    space = rlprune.trace(workload.model, workload.example_inputs)
    widths = space.project(np.ones(len(space.groups)), 0.7, "block_params")
    slim = rlprune.prune(
        workload.model, make_plan(space, importance=l2(workload.model, space), widths=widths)
    )
    ids = workload.example_inputs[:, :5]
    made = [slim.generate(ids, max_new_tokens=8, do_sample=False, use_cache=c) for c in (True, False)]
    assert torch.equal(*made)


def test_text_data_is_frozen(workload):
    data = workload.data
    assert isinstance(data, TextData) and data.largest_id() < 96
    with pytest.raises(AttributeError):
        data.name = "other"
