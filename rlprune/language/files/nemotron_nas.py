"""A pruned language model as a checkpoint of NVIDIA's Llama-Nemotron family (``nemotron-nas``, ``DeciLMForCausalLM``).

Such a checkpoint is a Llama whose blocks differ: ``block_configs`` in config.json says for each block whether its
attention and its feed-forward part are there, how many query heads share a key-value head, and how wide the
feed-forward part is. Written after what reads it:

- vLLM, ``model_executor/models/nemotron_nas.py``: ``ffn_mult`` or, where that is missing, ``intermediate_size``;
- TensorRT-LLM (``modeling_nemotron_nas.py``), SGLang (``nemotron_nas.py``) and mlx-lm (``nemotron_nas.py``):
  ``ffn_mult`` only.

``ffn_mult`` m means ``int(2 m H / 3)`` neurons rounded up to a multiple of 256, H the hidden size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from ...artifacts.safetensors import MAX_SHARD_SIZE, TensorFiles, write_checkpoint
from ...errors import ArtifactError
from ...utils.files import replacing_folder, write_json_atomic
from ...workloads.adapter import TokenizerSource
from .. import families
from ..families import Block
from ..sizes import hidden_size
from . import pretrained
from .tokenizers import write_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CODE = "configuration_decilm.py"
MARKER = "rlprune_export.json"
STEP = 256
"""Neurons by ``ffn_mult`` are a multiple of this."""
TYPES = ("llama", "mistral")
_SHOWN = 3  # groups that an error names
_CHECKED_TOKENS = (2, 9)
# Of config.json: what names other classes, and the older spellings of what stands there as well.
_SAID_AGAIN = ("architectures", "auto_map", "torch_dtype", "rope_theta", "rope_scaling")


class AttentionConfig(TypedDict):
    """A block's attention; None where it is missing."""

    n_heads_in_group: int | None
    no_op: bool
    num_sink_tokens: int | None
    replace_with_linear: bool
    sparsify: list[str] | None
    unshifted_sink: bool
    use_prefill_window_in_sink_attention: bool
    window_length: int | None


class FFNConfig(TypedDict, total=False):
    """A block's feed-forward part, with one of the two sizes; None where it is missing."""

    no_op: bool
    replace_with_linear: bool
    sparsify: list[str] | None
    ffn_mult: float | None
    intermediate_size: int | None


class BlockConfig(TypedDict):
    """An entry of ``block_configs``."""

    attention: AttentionConfig
    ffn: FFNConfig


@dataclass(frozen=True)
class Exported:
    """What was written, in words."""

    needs: str
    notes: tuple[str, ...]


def ffn_mult(neurons: int, hidden: int) -> float:
    """The multiplier that stands for a number of neurons, a multiple of 256.

    It lies half a neuron below, so that neither its six decimals in some readers nor a float's rounding lifts it over.
    """
    return round(3 * (neurons - 0.5) / (2 * hidden), 6)


def neurons_of(multiplier: float, hidden: int) -> int:
    """The number of neurons that readers make of ``ffn_mult``."""
    return -(-int(2 * multiplier * hidden / 3) // STEP) * STEP


def block_configs(slim: PreTrainedModel) -> list[BlockConfig]:
    """The entry of each block.

    Raises ArtifactError: the model does not map; the groups that stand in the way are named, and what would avoid it.
    """
    _check_model(slim)
    blocks, heads = families.blocks_of(slim), int(slim.config.num_attention_heads)
    _check_blocks(slim, blocks, heads)
    hidden = hidden_size(slim)
    exact = all(block.neurons % STEP == 0 for block in blocks)
    return [_entry(block, hidden, exact) for block in blocks]


def _entry(block: Block, hidden: int, exact: bool) -> BlockConfig:
    attention: AttentionConfig = {
        "n_heads_in_group": block.ratio if block.kv_heads else None,
        "no_op": not block.kv_heads,
        "num_sink_tokens": None,
        "replace_with_linear": False,
        "sparsify": None,
        "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False,
        "window_length": None,
    }
    ffn: FFNConfig = {"no_op": not block.neurons, "replace_with_linear": False, "sparsify": None}
    if exact:
        ffn["ffn_mult"] = ffn_mult(block.neurons, hidden) if block.neurons else None
    else:
        ffn["intermediate_size"] = block.neurons or None
    return {"attention": attention, "ffn": ffn}


def _check_model(slim: PreTrainedModel) -> None:
    config = slim.config
    if config.model_type not in TYPES:
        raise ArtifactError(
            f"--to nemotron-nas: a {config.model_type!r} is not what its readers compute; allowed: {', '.join(TYPES)}"
        )
    if getattr(config, "sliding_window", None) is not None:
        raise ArtifactError("--to nemotron-nas: its readers have no sliding window, and this model has one")
    if config.hidden_act not in ("silu", "swish"):
        raise ArtifactError(
            f"--to nemotron-nas: hidden_act is {config.hidden_act!r}, where its readers compute silu"
        )


def _check_blocks(slim: PreTrainedModel, blocks: Sequence[Block], heads: int) -> None:
    """ArtifactError naming the groups that no entry of ``block_configs`` can say."""
    wrong: list[str] = []
    tensors = dict(slim.named_parameters())
    for block in blocks:
        if block.query_heads not in (0, heads):
            wrong.append(f"{block.attention} ({block.query_heads} of {heads} query heads)")
        elif not block.kv_heads and block.index == 0:
            wrong.append(f"{block.attention} (the first attention is missing)")
        for part, left, out in (
            (block.attention, block.kv_heads, block.out),
            (block.ffn, block.neurons, block.down),
        ):
            bias = tensors.get(f"{out}.bias")
            if not left and bias is not None and bool(bias.detach().any()):
                wrong.append(f"{part} (removed, but its output bias stays)")
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ArtifactError(
            f"--to nemotron-nas: all blocks have {heads} query heads there or no attention, the first one has one; "
            f"not so: {', '.join(wrong[:_SHOWN])}{more}; prune with prune.runtime=vllm"
        )
    added = sorted(getattr(slim.config, "added_biases", None) or [])
    if added:
        raise ArtifactError(
            f"--to nemotron-nas: {added[0]!r} has a bias that its family does not have (recovery step 'bias')"
        )


def config_fields(slim: PreTrainedModel) -> dict[str, Any]:
    """config.json: the dense Llama's fields, ``block_configs``, and both spellings of the rotary settings."""
    blocks = block_configs(slim)
    fields = pretrained.dense_fields(slim.config)
    rope = dict(fields.get("rope_parameters") or {})
    theta = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    plain = scaling.get("rope_type", "default") == "default"
    size = families.blocks_of(slim)[0].head_dim
    return fields | {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{CODE.removesuffix('.py')}.DeciLMConfig"},
        "model_type": "nemotron-nas",
        "block_configs": blocks,
        "hidden_size": hidden_size(slim),
        "head_dim": size,
        "rope_theta": theta,
        "rope_scaling": None if plain else scaling,
        "torch_dtype": pretrained.one_dtype(slim),
    }


def write_nemotron_nas(
    slim: PreTrainedModel,
    out: str | Path,
    *,
    tokenizer: TokenizerSource | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
) -> Exported:
    """Write the folder and check it: read by the rules above, it gives the same logits to the bit.

    Args:
        tokenizer: the tokenizer, or a folder whose tokenizer files are copied.

    Raises ArtifactError: the model does not map (`block_configs`), or the folder cannot be written.
    """
    fields = config_fields(slim)
    blocks: list[BlockConfig] = fields["block_configs"]
    entries = {n: e for n, e in pretrained.stored_entries(slim).items() if not _missing(n, blocks)}
    tensors = slim.state_dict()

    def stream(names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            pretrained.refuse_nan(name, tensors[name], "the model")
            yield name, tensors[name]

    with replacing_folder(out, MARKER) as folder:
        write_checkpoint(folder, entries, stream, max_shard_size, {"format": "pt"})
        write_json_atomic(folder / pretrained.CONFIG, fields)
        shutil.copyfile(Path(__file__).with_name(CODE), folder / CODE)
        generation = getattr(slim, "generation_config", None)
        if generation is not None:
            write_json_atomic(folder / pretrained.GENERATION, json.loads(generation.to_json_string()))
        write_tokenizer(folder, tokenizer)
        write_json_atomic(folder / MARKER, {"format": "rlprune export", "tensors": len(entries)})
        _check(slim, folder)
    square = fields["head_dim"] * fields["num_attention_heads"] == fields["hidden_size"]
    return _told(blocks, square)


def _told(blocks: Sequence[BlockConfig], square: bool) -> Exported:
    notes = [
        "checked: the folder, read by the rules of block_configs, gives the same logits to the bit",
        "not run: vLLM, TensorRT-LLM, SGLang, mlx-lm",
    ]
    if any("intermediate_size" in block["ffn"] for block in blocks):
        notes.append(
            f"for vLLM only: widths that are no multiple of {STEP} are written as intermediate_size, which "
            f"TensorRT-LLM, SGLang and mlx-lm do not read; prune.round_to={STEP} gives widths for all of them"
        )
    if not square:
        notes.append("not for mlx-lm: it divides the hidden size by the heads")
    return Exported("loads with trust_remote_code=True (its config class stands in the folder)", tuple(notes))


def _missing(name: str, blocks: Sequence[BlockConfig]) -> bool:
    """Whether a tensor belongs to a part that is not there: the part itself, or the norm before it."""
    if not name.startswith("model.layers."):
        return False
    index, _, rest = name.removeprefix("model.layers.").partition(".")
    block = blocks[int(index)]
    attention = rest.startswith(("self_attn.", "input_layernorm."))
    return block["attention"]["no_op"] if attention else block["ffn"]["no_op"]


def read_nemotron_nas(folder: str | Path) -> PreTrainedModel:
    """The model of such a folder, as its public readers build it: widths from ``block_configs``, classes of Llama.

    Raises ArtifactError: no such folder, or tensors that do not fit it.
    """
    path = Path(folder)
    fields = pretrained.read_fields(path)
    if fields.get("model_type") != "nemotron-nas":
        raise ArtifactError(f"{path}: no nemotron-nas checkpoint")
    fields = {name: value for name, value in fields.items() if name not in _SAID_AGAIN}
    blocks: list[BlockConfig] = fields.pop("block_configs")
    config = pretrained.build_config(
        fields | _uneven(blocks, fields["hidden_size"], fields["num_attention_heads"])
    )
    files = TensorFiles(path)
    state = dict(files.read())
    for name, entry in pretrained.stored_entries(pretrained.skeleton(config)).items():
        if _missing(name, blocks):  # nothing computes with them
            state[name] = torch.ones(entry.shape, dtype=entry.dtype)
        elif name not in state or tuple(state[name].shape) != tuple(entry.shape):
            raise ArtifactError(f"{path}: {name!r} does not fit block_configs")
    return pretrained.model_of(config, state)


def _uneven(blocks: Sequence[BlockConfig], hidden: int, heads: int) -> dict[str, Any]:
    """The fields that make the configuration of a folder that of a Llama whose layers differ."""
    wide = [_neurons(block["ffn"], hidden) for block in blocks]
    groups = [each for b in blocks if (each := b["attention"]["n_heads_in_group"])]
    layers = {}
    for index, (block, neurons) in enumerate(zip(blocks, wide, strict=True)):
        queries = 0 if block["attention"]["no_op"] else heads
        layers[str(index)] = {
            "num_attention_heads": queries,
            "num_key_value_heads": queries // groups[0],
            "intermediate_size": neurons,
        }
    return {
        "model_type": "llama",
        "num_key_value_heads": heads // groups[0],
        "intermediate_size": max(*wide, 1),
        "per_layer_config": layers,
    }


def _neurons(ffn: FFNConfig, hidden: int) -> int:
    if ffn["no_op"]:
        return 0
    multiplier = ffn.get("ffn_mult")
    return neurons_of(multiplier, hidden) if multiplier is not None else int(ffn["intermediate_size"] or 0)


def _check(slim: PreTrainedModel, folder: Path) -> None:
    """ArtifactError unless the folder gives the same logits to the bit on random tokens."""
    other = read_nemotron_nas(folder)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(slim.config.vocab_size, _CHECKED_TOKENS, generator=generator)
    was = slim.training
    with torch.no_grad():
        wanted = slim.eval()(input_ids=ids.to(slim.device)).logits.cpu()
        found = other(input_ids=ids).logits
    slim.train(was)
    if not torch.equal(wanted, found):
        raise ArtifactError(
            f"--to nemotron-nas: the folder gives other logits (by up to {float((wanted - found).abs().max()):.2g})"
        )
