"""SliceGPT (Ashkboos et al. 2024, arXiv 2401.15024) on a Llama, for `language.py slice`: what another way to cut costs.

It keeps directions where a plan keeps units: each hidden state is projected on its leading principal components. The
authors' code turns the weights, cuts their last rows and columns and puts a matrix into each shortcut; a dense model
whose hidden states are projected in the same places computes the same, because RMS norms (whose weights are moved into
the next matrix there) do not change under a rotation. So nothing is cut here, and the parameters are counted.
That code also takes the mean off each embedding, which changes a model of RMS norms: left out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

DAMP = 0.01  # of the mean diagonal, as in the authors' code


class SlicedLayer(nn.Module):
    """A decoder layer of transformers' Llama whose hidden states are projected: (batch, length, hidden)."""

    def __init__(self, layer: nn.Module, hidden: int) -> None:
        super().__init__()
        self.layer = layer
        for name in ("middle", "end"):  # after attention, after the feed-forward part
            self.register_buffer(name, torch.eye(hidden))

    def attend(self, hidden: Tensor, **keywords: Any) -> Tensor:
        """What is added up after attention, before it is projected."""
        added: Tensor = self.layer.self_attn(hidden_states=self.layer.input_layernorm(hidden), **keywords)[0]
        return hidden + added

    def feed(self, attended: Tensor) -> Tensor:
        """What is added up after the feed-forward part, before it is projected."""
        return attended + self.layer.mlp(self.layer.post_attention_layernorm(attended))

    def forward(self, hidden: Tensor, **keywords: Any) -> Tensor:
        return self.feed(self.attend(hidden, **keywords) @ self.middle) @ self.end


@torch.no_grad()
def sliced(model: nn.Module, batches: Iterable[Tensor], width: int) -> nn.Module:
    """A copy of a Llama whose hidden states keep `width` directions; those after the last block keep all, as published.

    Args:
        batches: token ids of the calibration split, (sequences, length) each. Every projection is measured behind
            those before it, as published.
    """
    slim = copy.deepcopy(model)
    body = slim.model
    hidden = [body.embed_tokens(ids) for ids in batches]
    first = projection(hidden, width)
    hidden = [state @ first for state in hidden]
    embedding = nn.Embedding.from_pretrained(body.embed_tokens.weight @ first)
    slim.lm_head.weight = nn.Parameter(slim.lm_head.weight.clone())  # tied ones part
    body.embed_tokens = embedding
    layers = [SlicedLayer(layer, hidden[0].shape[-1]) for layer in body.layers]
    body.layers = nn.ModuleList(layers)
    for layer in layers:
        middle = [layer.attend(state, **_keywords(body, state)) for state in hidden]
        layer.middle = projection(middle, width)
        end = [layer.feed(state @ layer.middle) for state in middle]
        if layer is not layers[-1]:
            layer.end = projection(end, width)
        hidden = [state @ layer.end for state in end]
    return slim


def projection(states: list[Tensor], width: int) -> Tensor:
    """Q Q^T of the `width` leading principal components Q of hidden states, (hidden, hidden); not centred."""
    gram = sum((s.flatten(0, 1).double().T @ s.flatten(0, 1).double()) for s in states)
    assert isinstance(gram, Tensor)
    gram.diagonal().add_(DAMP * gram.diagonal().mean())
    leading = torch.linalg.eigh(gram).eigenvectors[:, -width:]  # eigenvalues ascend
    return (leading @ leading.T).to(states[0].dtype)


def parameters(config: Any, width: int) -> int:
    """Parameters of the sliced model: embeddings, head, blocks and their shortcut matrices; norms have none."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    head = hidden // config.num_attention_heads
    attention = head * (config.num_attention_heads + 2 * config.num_key_value_heads)
    into = width * (attention + 2 * config.intermediate_size)
    out = config.num_attention_heads * head
    layers = config.num_hidden_layers
    blocks = layers * (into + width * out + width * width)
    ends = (config.intermediate_size + width) * (
        width * (layers - 1) + hidden
    )  # the last block's ends are whole
    return vocabulary * (width + hidden) + blocks + ends


def _keywords(body: Any, state: Tensor) -> dict[str, Any]:
    """What a decoder layer is called with: causal attention over whole sequences."""
    positions = torch.arange(state.shape[1], device=state.device)[None]
    return {"attention_mask": None, "position_embeddings": body.rotary_emb(state, positions)}
