"""A pruned folder under transformers' other auto classes: the body, and a classifier with a fresh head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import rlprune
from helpers.lm import tokens
from helpers.pruned_lm import pruned
from helpers.transformers_quiet import quiet_transformers
from rlprune.language.sizes import layer_sizes

NAMES = ("llama-mha-tied", "gemma2", "gpt2", "opt-project", "gpt_neox")


@pytest.mark.parametrize("name", NAMES)
def test_body_and_classifier_have_the_pruned_blocks(name: str, tmp_path: Path) -> None:
    slim, plan = pruned(name, 4)
    folder = rlprune.save(slim, plan, tmp_path / "a")
    ids = tokens(9, 2)
    with quiet_transformers():
        whole = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        body = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        classifier = AutoModelForSequenceClassification.from_pretrained(
            folder, trust_remote_code=True, num_labels=3, pad_token_id=0
        ).eval()
    assert layer_sizes(body) == layer_sizes(whole) == layer_sizes(classifier) == layer_sizes(slim)
    with torch.no_grad():
        hidden = whole(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(body(input_ids=ids).last_hidden_state, hidden)
        assert classifier(input_ids=ids).logits.shape == (2, 3)
    own = dict(classifier.named_parameters())
    shared = {n: p for n, p in whole.named_parameters() if n in own}
    assert len(shared) >= len(own) - 1  # all but the head
    assert all(torch.equal(p, own[n]) for n, p in shared.items())


def test_added_biases_and_hidden_size_reach_the_body(tmp_path: Path) -> None:
    slim, plan = pruned(seed=5, hidden=True)
    for block in slim.model.layers:
        for layer in (block.mlp.down_proj, block.self_attn.o_proj):
            layer.bias = torch.nn.Parameter(torch.randn(int(plan.widths[-1])))
    folder = rlprune.save(slim, plan, tmp_path / "a")
    with quiet_transformers():
        body = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        wanted = rlprune.load(folder)(input_ids=tokens(), output_hidden_states=True).hidden_states[-1]
        assert torch.equal(body(input_ids=tokens()).last_hidden_state, wanted)


def test_a_classifier_of_a_cut_hidden_size(tmp_path: Path) -> None:
    slim, plan = pruned(seed=5, hidden=True)
    folder = rlprune.save(slim, plan, tmp_path / "a")
    with quiet_transformers():
        found = AutoModelForSequenceClassification.from_pretrained(
            folder, trust_remote_code=True, num_labels=3, pad_token_id=0
        ).eval()
    assert found.score.weight.shape == (3, int(plan.widths[-1]))
    with torch.no_grad():
        assert found(input_ids=tokens()).logits.shape == (1, 3)


def test_a_saved_classifier_keeps_its_classes(tmp_path: Path) -> None:
    """Trained and saved by transformers, it loads again: sizes, code and head are in its folder."""
    folder = rlprune.save(*pruned(seed=2), tmp_path / "a")
    with quiet_transformers():
        first = AutoModelForSequenceClassification.from_pretrained(
            folder, trust_remote_code=True, num_labels=2, pad_token_id=0
        ).eval()
        first.save_pretrained(tmp_path / "b")
        again = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "b", trust_remote_code=True
        ).eval()
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForSequenceClassification"].endswith("ForSequenceClassification")
    with torch.no_grad():
        assert torch.equal(first(input_ids=tokens()).logits, again(input_ids=tokens()).logits)
