"""docs/scripts/slicegpt.py against weights that are turned and cut for good, with a matrix in every shortcut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.scripts import load_script

HIDDEN = 24


def llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=HIDDEN, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied,
        )
    ).eval()  # fmt: skip
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)  # so that a norm's weights must be moved
    return model


def texts(count: int = 2) -> list[Tensor]:
    return [torch.randint(0, 50, (3, 16), generator=torch.Generator().manual_seed(i)) for i in range(count)]


class Norm(nn.Module):
    """RMS norm without weights, of the dense width."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * torch.rsqrt((hidden**2).sum(-1, keepdim=True) / HIDDEN + 1e-6)


def basis(projected: Tensor, width: int) -> Tensor:
    """Q of Q Q^T."""
    return torch.linalg.eigh(projected.double()).eigenvectors[:, -width:].float()


def cut(linear: nn.Linear, weight: Tensor) -> None:
    linear.weight = nn.Parameter(weight)


class CutLayer(nn.Module):
    """A decoder layer on turned and cut hidden states."""

    def __init__(self, sliced: Any, before: Tensor, middle: Tensor, end: Tensor) -> None:
        super().__init__()
        layer = self.layer = sliced.layer
        self.shortcuts = nn.ParameterList([before.T @ middle, middle.T @ end])
        attention, feed = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            cut(linear, linear.weight * layer.input_layernorm.weight @ before)
        cut(attention.o_proj, middle.T @ attention.o_proj.weight)
        for linear in (feed.gate_proj, feed.up_proj):
            cut(linear, linear.weight * layer.post_attention_layernorm.weight @ middle)
        cut(feed.down_proj, end.T @ feed.down_proj.weight)
        layer.input_layernorm = layer.post_attention_layernorm = Norm()

    def forward(self, hidden: Tensor, **keywords: Any) -> Tensor:
        layer = self.layer
        added = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **keywords)[0]
        attended = hidden @ self.shortcuts[0] + added
        return attended @ self.shortcuts[1] + layer.mlp(layer.post_attention_layernorm(attended))


def cut_for_good(slim: Any, width: int) -> Any:
    """The sliced model with smaller matrices in place of projections."""
    body = slim.model
    before = basis(body.embed_tokens.weight.T @ body.embed_tokens.weight, width)
    body.embed_tokens = nn.Embedding.from_pretrained(body.embed_tokens.weight @ before)
    layers = []
    for index, layer in enumerate(body.layers):
        middle = basis(layer.middle, width)
        last = index == len(body.layers) - 1
        end = torch.eye(HIDDEN) if last else basis(layer.end, width)
        layers.append(CutLayer(layer, before, middle, end))
        before = end
    body.layers = nn.ModuleList(layers)
    cut(slim.lm_head, slim.lm_head.weight * body.norm.weight)
    body.norm = Norm()
    return slim


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_projected_states_are_a_sliced_model(tied: bool) -> None:
    script, model = load_script("slicegpt"), llama(tied)
    slim = script.sliced(model, texts(), 14)
    ids = texts(3)[-1]
    expected = slim(ids, use_cache=False).logits
    cut_model = cut_for_good(slim, 14)
    assert torch.allclose(cut_model(ids, use_cache=False).logits, expected, atol=1e-4)
    assert not torch.allclose(model(ids, use_cache=False).logits, expected, atol=1e-2)
    assert script.parameters(model.config, 14) == sum(p.numel() for p in cut_model.parameters())


@torch.no_grad()
def test_the_whole_width_changes_nothing() -> None:
    model, ids = llama(tied=True), texts(1)[0]
    slim = load_script("slicegpt").sliced(model, texts(), HIDDEN)
    assert torch.allclose(slim(ids, use_cache=False).logits, model(ids, use_cache=False).logits, atol=1e-4)
    assert not isinstance(model.model.layers[0], type(slim.model.layers[0]))  # the dense model stays as it is
