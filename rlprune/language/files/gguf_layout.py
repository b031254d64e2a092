"""What stands in a GGUF file of a pruned language model: which architecture of llama.cpp reads it, and its tensors.

llama.cpp reads the sizes of every layer for a few architectures only. ``deci`` (src/models/deci.cpp) takes arrays of
query heads, key-value heads and neurons and computes what Llama computes; ``openelm`` does the same with norms of the
queries and keys. A family whose blocks are alike is written as its own architecture.

Shapes: H hidden size, D head size, Q query heads, K key-value heads, F neurons of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gguf
import torch
from torch import Tensor

from ...errors import ArtifactError
from .. import families
from ..linear import tensor_of
from ..sizes import hidden_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION_BIASES = frozenset({"attn_q", "attn_k", "attn_v"})
_ALL_BIASES = _ATTENTION_BIASES | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}


@dataclass(frozen=True)
class Architecture:
    """What one of llama.cpp's architectures reads (its ``load_arch_tensors`` and graph in src/models).

    ``paired``: the two numbers that a rotation mixes stand side by side in a head (``LLAMA_ROPE_TYPE_NORM``), where
    transformers has them half a head apart. ``per_layer``: sizes may differ from block to block. ``drops``: a block
    of 0 heads has no attention. ``square``: the heads must be as wide as the hidden size together. ``fused``: one
    tensor holds queries, keys and values. ``own_head``: an output layer that is not the embedding is read.
    """

    name: str
    paired: bool = False
    per_layer: bool = False
    drops: bool = False
    square: bool = False
    fused: bool = False
    own_head: bool = True
    biases: frozenset[str] = _ATTENTION_BIASES


_LLAMA = Architecture("llama", paired=True, biases=_ALL_BIASES)
_DECI = Architecture("deci", paired=True, per_layer=True, drops=True, biases=_ALL_BIASES)
_QWEN2 = Architecture("qwen2", square=True)
_QWEN3 = Architecture("qwen3")
_OPENELM = Architecture("openelm", per_layer=True, fused=True, own_head=False, biases=frozenset())
_SMOLLM3 = Architecture("smollm3", paired=True)
_GRANITE = Architecture("granite", paired=True, biases=_ALL_BIASES)

# Of each family those that compute the same, the first that fits is taken.
_READERS: Mapping[str, tuple[Architecture, ...]] = {
    "llama": (_LLAMA, _DECI),
    "mistral": (_LLAMA, _DECI),
    "ministral": (_LLAMA, _DECI),
    "qwen2": (_QWEN2, _DECI),
    "seed_oss": (_DECI,),
    "qwen3": (_QWEN3, _OPENELM),
    "smollm3": (_SMOLLM3,),
    "granite": (_GRANITE,),
}
# Config fields of Granite that scale what flows, and how GGUFWriter is told of them.
_SCALES = {
    "embedding_multiplier": "add_embedding_scale",
    "residual_multiplier": "add_residual_scale",
    "attention_multiplier": "add_attention_scale",
    "logits_scaling": "add_logit_scale",
}
_PARTS = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"} | {
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down", "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file under llama.cpp's name; ``make`` gives its numbers, in torch's order of dimensions."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Layout:
    """The content of a file but for the vocabulary; the lists have an entry for each block that is written."""

    architecture: Architecture
    tensors: tuple[FileTensor, ...]
    query_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    neurons: tuple[int, ...]
    head_dim: int
    hidden: int
    vocabulary: int
    context: int
    epsilon: float
    rope: Mapping[str, Any]
    scales: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Write the fields that describe the model."""
        sizes = (self.query_heads, self.kv_heads, self.neurons)
        listed = self.architecture.per_layer
        heads, kv, neurons = (list(each) if listed else each[0] for each in sizes)
        writer.add_block_count(len(self.neurons))
        writer.add_context_length(self.context)
        writer.add_embedding_length(self.hidden)
        writer.add_feed_forward_length(neurons)
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv)
        # Stated always: without them the reader divides the hidden size by the heads of the first block.
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_layer_norm_rms_eps(self.epsilon)
        writer.add_vocab_size(self.vocabulary)
        writer.add_rope_freq_base(float(self.rope["rope_theta"]))
        if self.rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(self.rope["factor"]))
        for method, value in self.scales.items():
            getattr(writer, method)(value)


def readable_families() -> list[str]:
    """The model types that can be written."""
    return sorted(_READERS)


def layout_of(slim: PreTrainedModel) -> Layout:
    """How llama.cpp is to read a pruned model of any widths.

    Raises ArtifactError: the family or the plan has no architecture that computes the same; the line says which part
    stands in the way and what would help.
    """
    kind = slim.config.model_type
    if kind not in _READERS:
        known = ", ".join(readable_families())
        raise ArtifactError(
            f"--to gguf: no architecture of llama.cpp is known to compute a pruned {kind!r}; allowed: {known}; with "
            "equal widths (prune.runtime=uniform) --to hf gives a folder that llama.cpp's own converter may read"
        )
    _check_config(slim)
    blocks = [_Block.of(slim, found) for found in families.blocks_of(slim)]
    kept = [block for block in blocks if not block.empty]
    if not kept:
        raise ArtifactError(
            "--to gguf: every block was dropped; nothing is left that a runtime could compute"
        )
    reasons = []
    for architecture in _READERS[kind]:
        reason = _obstacle(architecture, slim, kept)
        if not reason:
            return _laid_out(architecture, slim, kept, len(blocks) - len(kept))
        reasons.append(f"{architecture.name}: {reason}")
    raise ArtifactError(f"--to gguf: no architecture of llama.cpp fits this {kind!r} ({'; '.join(reasons)})")


@dataclass(frozen=True)
class _Block:
    """A block, and the biases that stand in it: llama.cpp's name of the layer -> ours. Zeros are no biases."""

    found: families.Block
    biases: Mapping[str, str]

    @classmethod
    def of(cls, slim: PreTrainedModel, found: families.Block) -> _Block:
        tensors = dict(slim.named_parameters())
        biases = {}
        for name in (*found.qkv, found.out, *found.up, found.down):
            bias = tensors.get(f"{name}.bias")
            if bias is not None and bool(bias.detach().any()):
                biases[_PARTS[name.rpartition(".")[2]]] = f"{name}.bias"
        return cls(found, biases)

    @property
    def empty(self) -> bool:
        """Whether nothing of it is left, so that the others are numbered on."""
        return not (self.found.kv_heads or self.found.neurons or self.biases)


def _check_config(slim: PreTrainedModel) -> None:
    config = slim.config
    act = getattr(config, "hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise ArtifactError(f"--to gguf: hidden_act is {act!r}, where llama.cpp computes silu")
    rope = rope_of(slim)
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise ArtifactError(
            f"--to gguf: rope_type {rope['rope_type']!r} cannot be written; allowed: default, linear, llama3"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ArtifactError(
            "--to gguf: only part of each head is rotated, which these architectures do not read"
        )


def rope_of(slim: PreTrainedModel) -> dict[str, Any]:
    """The rotary settings, with ``rope_type`` and ``rope_theta``."""
    found = dict(getattr(slim.config, "rope_parameters", None) or {})
    if "rope_theta" not in found:
        raise ArtifactError("--to gguf: the configuration has no single rope_theta for all layers")
    return {"rope_type": "default"} | found


def _obstacle(architecture: Architecture, slim: PreTrainedModel, kept: Sequence[_Block]) -> str:
    """Why an architecture does not compute this model; empty where it does."""
    tied = bool(slim.config.tie_word_embeddings)
    if not architecture.own_head and not tied:
        return "reads no output layer apart from the embedding"
    for block in kept:
        for name in block.biases:
            if name not in architecture.biases:
                return (
                    f"reads no bias of {block.biases[name].removesuffix('.bias')!r}; "
                    "leave 'bias' out of recovery.steps"
                )
    if not architecture.per_layer:
        first = kept[0].found
        for block in kept:
            for name in ("query_heads", "kv_heads", "neurons"):
                mine, other = getattr(block.found, name), getattr(first, name)
                if mine != other or not mine:
                    return (
                        f"has one number of {name.replace('_', ' ')} for all blocks, and {first.path!r} has "
                        f"{other}, {block.found.path!r} {mine}; prune.runtime=uniform keeps them alike"
                    )
        if architecture.square and first.query_heads * first.head_dim != slim.config.hidden_size:
            return "wants all query heads together as wide as the hidden size"
    if architecture.name == "smollm3":
        return _rotation_obstacle(slim, kept)
    return ""


def _rotation_obstacle(slim: PreTrainedModel, kept: Sequence[_Block]) -> str:
    """SmolLM3 leaves the rotation out of some blocks; llama.cpp takes it that these are every fourth."""
    pattern = list(slim.config.no_rope_layers)
    for place, block in enumerate(kept):
        if bool(pattern[block.found.index]) != bool((place + 1) % 4):
            return (
                f"rotates all but every fourth block, which {block.found.path!r} as block {place} is against"
            )
    return ""


def _laid_out(
    architecture: Architecture, slim: PreTrainedModel, kept: Sequence[_Block], dropped: int
) -> Layout:
    config = slim.config
    tensors = _whole_tensors(slim, architecture)
    sizes = []
    stand_ins = []
    for place, block in enumerate(kept):
        made = _BlockTensors(slim, architecture, block, place)
        tensors += made.tensors()
        sizes.append((made.query_heads, made.kv_heads, made.neurons))
        if made.stand_ins:
            stand_ins.append(f"{block.found.path} ({' and '.join(made.stand_ins)})")
    notes = [f"{dropped} dropped blocks are left out, the others numbered anew"] if dropped else []
    if stand_ins:
        # Neurons and heads of zeros compute nothing; without them the readers drop what stands next to the part.
        notes.append(f"dropped parts that llama.cpp wants something for hold zeros: {', '.join(stand_ins)}")
    context, window = int(config.max_position_embeddings), _window(config)
    if window and window < context:
        notes.append(f"{architecture.name} has no sliding window: the file's context is its {window} tokens")
        context = window
    heads, kv, neurons = zip(*sizes, strict=True)
    return Layout(
        architecture, tuple(tensors), heads, kv, neurons, kept[0].found.head_dim, hidden_size(slim),
        int(tensor_of(slim.get_input_embeddings(), "weight").shape[0]), context,
        float(config.rms_norm_eps), rope_of(slim),
        {method: float(getattr(config, name)) for name, method in _SCALES.items() if hasattr(config, name)},
        tuple(notes),
    )  # fmt: skip


def _window(config: Any) -> int:
    """Tokens that a sliding attention looks back, 0 where none slides."""
    if not getattr(config, "sliding_window", None) or not getattr(config, "use_sliding_window", True):
        return 0
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or any(kind == "sliding_attention" for kind in kinds)
    return int(config.sliding_window) if slides else 0


def _whole_tensors(slim: PreTrainedModel, architecture: Architecture) -> list[FileTensor]:
    """The tensors outside of the blocks."""
    state = slim.state_dict()
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if not slim.config.tie_word_embeddings:
        names["lm_head.weight"] = "output.weight"
    known = {*names, "lm_head.weight"}  # of tied tensors the embedding alone is written
    left = [name for name in state if not name.startswith("model.layers.") and name not in known]
    if left:
        raise ArtifactError(f"--to gguf: {architecture.name} has no place for the tensor {left[0]!r}")
    found = [_plain(theirs, state[ours]) for ours, theirs in names.items()]
    if rope_of(slim)["rope_type"] == "llama3":
        factors = _rope_factors(slim)
        found.append(FileTensor("rope_freqs.weight", tuple(factors.shape), lambda: factors))
    return found


def _plain(name: str, tensor: Tensor) -> FileTensor:
    return FileTensor(name, tuple(tensor.shape), lambda: tensor)


def _rope_factors(slim: PreTrainedModel) -> Tensor:
    """By how much every rotation (D/2) is slower than without scaling; llama.cpp divides its angles by them."""
    scaled = tensor_of(slim.get_submodule("model.rotary_emb"), "inv_freq").double().cpu()
    theta = float(rope_of(slim)["rope_theta"])
    steps = torch.arange(len(scaled), dtype=torch.float64) / len(scaled)
    return (theta**-steps / scaled).float()


class _BlockTensors:
    """The tensors of one block under its new number, and the sizes that the reader is told."""

    def __init__(self, slim: PreTrainedModel, architecture: Architecture, block: _Block, place: int) -> None:
        found = block.found
        self._slim, self._architecture, self._block, self._place = slim, architecture, block, place
        self.query_heads, self.kv_heads, self.neurons = found.query_heads, found.kv_heads, found.neurons
        self.stand_ins: list[str] = []
        # The first block's heads tell the reader that there is attention at all (llama-model.cpp, load_hparams); the
        # output's bias is read together with heads only.
        needed = not architecture.drops or place == 0 or "attn_output" in block.biases
        if not self.kv_heads and needed:
            self.query_heads = self.kv_heads = 1
            self.stand_ins.append("one head")
        # Without neurons deci goes on with what came into the block: its attention would be lost.
        if not self.neurons:
            self.neurons = 1
            self.stand_ins.append("one neuron")

    def tensors(self) -> list[FileTensor]:
        """All tensors of the block in the reader's order."""
        found = self._block.found
        made: list[FileTensor] = []
        if self.kv_heads:
            made.append(self._norm("input_layernorm"))
            made += self._attention()
            for name in ("q_norm", "k_norm"):
                if f"{found.attention}.{name}.weight" in self._slim.state_dict():
                    made.append(self._norm(name, found.attention))
        made.append(self._norm("post_attention_layernorm"))
        hidden = hidden_size(self._slim)
        for layer in found.up:
            made += self._layer(layer, (self.neurons, hidden), not found.neurons)
        made += self._layer(found.down, (hidden, self.neurons), not found.neurons)
        return made

    def _attention(self) -> list[FileTensor]:
        found, hidden = self._block.found, hidden_size(self._slim)
        gone = not found.kv_heads
        counts = (self.query_heads, self.kv_heads, self.kv_heads)
        made: list[FileTensor] = []
        for layer, heads, rotated in zip(found.qkv, counts, (True, True, False), strict=True):
            turned = heads if rotated and self._architecture.paired else 0
            made += self._layer(layer, (heads * found.head_dim, hidden), gone, turned)
        if self._architecture.fused:
            rows = sum(tensor.shape[0] for tensor in made)
            parts = tuple(made)
            name = f"blk.{self._place}.attn_qkv.weight"
            made = [FileTensor(name, (rows, hidden), lambda: torch.cat([part.make() for part in parts]))]
        return [*made, *self._layer(found.out, (hidden, self.query_heads * found.head_dim), gone)]

    def _layer(self, layer: str, shape: tuple[int, int], gone: bool, turned: int = 0) -> list[FileTensor]:
        """A linear layer: its weight, of zeros where its part is gone, and its bias where that is not zero."""
        part = _PARTS[layer.rpartition(".")[2]]
        weight = torch.zeros(shape) if gone else self._slim.get_parameter(f"{layer}.weight")
        made = [self._turned(f"{part}.weight", weight, turned)]
        if part in self._block.biases:
            made.append(self._turned(f"{part}.bias", self._slim.get_parameter(f"{layer}.bias"), turned))
        return made

    def _turned(self, name: str, tensor: Tensor, heads: int) -> FileTensor:
        def make() -> Tensor:
            return paired_rows(tensor.detach(), heads) if heads else tensor.detach()

        return FileTensor(f"blk.{self._place}.{name}", tuple(tensor.shape), make)

    def _norm(self, name: str, owner: str | None = None) -> FileTensor:
        tensor = self._slim.get_parameter(f"{owner or self._block.found.path}.{name}.weight")
        return _plain(f"blk.{self._place}.{_PARTS[name]}.weight", tensor.detach())


def paired_rows(rows: Tensor, heads: int) -> Tensor:
    """The rows (heads * D, ...) of a query or key layer with the two numbers of each rotation side by side.

    transformers rotates number i of a head with number i + D/2 (``rotate_half``), ``LLAMA_ROPE_TYPE_NORM`` number 2i
    with 2i + 1.
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
