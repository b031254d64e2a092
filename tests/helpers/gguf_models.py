"""GGUF files read by the gguf package and computed in plain torch, as llama.cpp's sources say it.

`deci_logits` follows src/models/deci.cpp and the sizes of llama-model.cpp's ``load_hparams``, with the two things that
go wrong there without a word: a block of no neurons ends before its attention is added, and a file whose first block
has no heads has no head size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor


def fields(path: Path) -> dict[str, Any]:
    """All fields of a file by name."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file as float32, in torch's order of dimensions."""
    found = {}
    for entry in gguf.GGUFReader(path).tensors:
        shape = [int(n) for n in reversed(entry.shape)]
        found[entry.name] = torch.from_numpy(gguf.dequantize(entry.data, entry.tensor_type).copy()).reshape(
            shape
        )
    return found


def deci_logits(path: Path, ids: Tensor) -> Tensor:
    """What the architecture ``deci`` computes for token ids (L) -> logits (L, V)."""
    said, weights = fields(path), tensors(path)
    assert said["general.architecture"] == "deci"
    heads, kv_heads, neurons = (
        said[f"deci.{key}"]
        for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    )
    blocks = said["deci.block_count"]
    assert len(heads) == len(kv_heads) == len(neurons) == blocks
    assert heads[0] > 0, "the head size is read where the first block has heads"
    size = said["deci.attention.key_length"]
    assert size == said["deci.attention.value_length"] == said["deci.rope.dimension_count"]
    epsilon, x = said["deci.attention.layer_norm_rms_epsilon"], weights["token_embd.weight"][ids]
    angles = _angles(said, weights, len(ids), size)
    for i in range(blocks):
        came, out = x, x
        if heads[i]:
            normed = _norm(x, weights[f"blk.{i}.attn_norm.weight"], epsilon)
            assert kv_heads[i], "a linear attention is not what we write"
            out = _attention(normed, weights, i, (heads[i], kv_heads[i], size), angles)
        if not neurons[i]:
            continue  # and the attention's output is lost
        if heads[i]:
            out = out + came
        normed = _norm(out, weights[f"blk.{i}.ffn_norm.weight"], epsilon)
        gate, up = (_linear(normed, weights, f"blk.{i}.ffn_{name}") for name in ("gate", "up"))
        x = out + _linear(torch.nn.functional.silu(gate) * up, weights, f"blk.{i}.ffn_down")
    x = _norm(x, weights["output_norm.weight"], epsilon)
    return x @ weights.get("output.weight", weights["token_embd.weight"]).T


def _angles(said: dict[str, Any], weights: dict[str, Tensor], length: int, size: int) -> Tensor:
    """Angles (L, D/2) of the rotations."""
    steps = torch.arange(size // 2, dtype=torch.float32) * 2 / size
    speeds = said["deci.rope.freq_base"] ** -steps / weights.get("rope_freqs.weight", torch.ones(size // 2))
    if said.get("deci.rope.scaling.type") == "linear":
        speeds = speeds / said["deci.rope.scaling.factor"]
    return torch.outer(torch.arange(length, dtype=torch.float32), speeds)


def _attention(
    x: Tensor, weights: dict[str, Tensor], i: int, counts: tuple[int, int, int], angles: Tensor
) -> Tensor:
    heads, kv_heads, size = counts
    q, k, v = (
        _linear(x, weights, f"blk.{i}.attn_{name}").reshape(len(x), number, size)
        for name, number in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    q, k = _rotated(q, angles), _rotated(k, angles)
    k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
    scores = torch.einsum("lhd,mhd->hlm", q, k) / size**0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), float("-inf"))
    mixed = torch.einsum("hlm,mhd->lhd", scores.softmax(-1), v).reshape(len(x), heads * size)
    return _linear(mixed, weights, f"blk.{i}.attn_output")


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Neighbouring numbers rotated (``LLAMA_ROPE_TYPE_NORM``)."""
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).reshape(x.shape)


def _linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def _norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * gain
