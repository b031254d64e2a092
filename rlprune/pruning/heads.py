"""Multi-head attention of torch that may have fewer heads than its width asks for.

A copy of this file travels in saved folders: it needs nothing but torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` written in plain operations, with ``num_heads`` heads of ``head_dim`` channels.

    The tensors keep their names: ``in_proj_weight`` (3 * heads * head_dim, embed_dim) or ``q_proj_weight`` and so on,
    ``out_proj.weight`` (embed_dim, heads * head_dim). Shapes of inputs, masks and outputs are those of torch's module.
    A module becomes one by `as_head_attention`.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self._heads(x) for x in self._projected(query, key, value))  # (N, heads, L, head_dim)
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, self.dropout, self.training)
            mixed = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            dropout = self.dropout if self.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        outputs = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            outputs = outputs.squeeze(0)
        elif not self.batch_first:
            outputs = outputs.transpose(0, 1)
        return outputs, weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores."""
        total = None
        if attn_mask is not None:
            total = _additive(attn_mask, q)
            if total.dim() == 3:  # (N * heads, L, S)
                total = total.view(q.shape[0], -1, *total.shape[1:])
        if padding is not None:
            hidden = _additive(padding, q).view(k.shape[0], 1, 1, k.shape[2])
            total = hidden if total is None else total + hidden
        return total


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def can_lose_heads(module: nn.Module) -> bool:
    """Whether a module is an attention of torch that `as_head_attention` can stand in for."""
    return type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn


def as_head_attention(module: nn.Module) -> None:
    """Turn an attention of torch into a `HeadAttention`, in place; its tensors stay."""
    if can_lose_heads(module):
        module.__class__ = HeadAttention
        # The fused paths of torch's transformer layers count on as many heads as the width has room for.
        vars(module)["_qkv_same_embed_dim"] = False


def as_plain_attention(module: nn.Module, packed: bool) -> None:
    """The way back; ``packed``: its projections are one weight."""
    module.__class__ = nn.MultiheadAttention
    vars(module)["_qkv_same_embed_dim"] = packed


def fit_attention(model: nn.Module) -> None:
    """Turn those attentions of a cut model into `HeadAttention` whose weights are not those of torch's module."""
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and can_lose_heads(module) and not _fits(module):
            as_head_attention(module)
    if any(isinstance(module, HeadAttention) for module in model.modules()):
        for module in model.modules():
            # It would hand padded batches on as nested tensors, which only torch's own attention takes.
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False


def _fits(module: nn.MultiheadAttention) -> bool:
    """Whether the weights have the sizes that torch's module takes for granted."""
    width = module.embed_dim
    inner = module.num_heads * module.head_dim
    if module.in_proj_weight is not None:
        ins = module.in_proj_weight.shape == (3 * width, width)
    else:
        projections = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        wanted = ((width, width), (width, module.kdim), (width, module.vdim))
        ins = all(tuple(w.shape) == shape for w, shape in zip(projections, wanted, strict=True))
    return bool(ins and inner == width and tuple(module.out_proj.weight.shape) == (width, width))


def set_heads(module: nn.Module, attribute: str, value: int) -> None:
    """Set ``num_heads`` of an attention of torch."""
    as_head_attention(module)
    setattr(module, attribute, value)
