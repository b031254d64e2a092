"""Writing the folder of a pruned causal language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from ...artifacts.documents import PLAN_FILE, VERSION
from ...artifacts.fitting import checksum
from ...artifacts.pruned_model import check_against_plan, plan_document
from ...artifacts.safetensors import MAX_SHARD_SIZE, Entry, parse_size, write_checkpoint
from ...pruning.plan import Plan
from ...utils.files import replacing_folder, write_json_atomic
from ...workloads.adapter import TokenizerSource
from . import pretrained
from .mark import MARK, mark_of


def save_language_model(
    slim: nn.Module,
    plan: Plan,
    directory: str | Path,
    base: Mapping[str, object] | None,
    tokenizer: TokenizerSource | None,
    max_shard_size: str | int,
) -> Path:
    """Write a pruned language model with all that transformers needs to load it; see `rlprune.save`."""
    tensors = slim.state_dict()
    stored = pretrained.stored_entries(slim)

    def stream(names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            pretrained.refuse_nan(name, tensors[name], "the model")
            yield name, tensors[name]

    return write_language_model(slim, plan, directory, stored, stream, base, tokenizer, max_shard_size)


def write_language_model(
    slim: nn.Module,
    plan: Plan,
    directory: str | Path,
    stored: Mapping[str, Entry],
    stream: Callable[[Sequence[str]], Iterator[tuple[str, Tensor]]],
    base: Mapping[str, object] | None = None,
    tokenizer: TokenizerSource | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
) -> Path:
    """The folder of a language model whose tensors come from a stream; ``slim`` may be on ``meta``.

    Args:
        stored: the tensors to write, in order; of tied ones the first.
        stream: gives (name, tensor) for a list of these names.
    """
    parse_size(max_shard_size)
    check_against_plan(slim.state_dict(), plan)
    model = pretrained.pretrained_model(slim)
    dense = pretrained.dense_config(model, plan.space.fingerprint)
    name = (base or {}).get("name")
    config = pretrained.pruned_config(model, dense)
    config[MARK] = mark_of(plan, None if name is None else str(name), pretrained.uneven_fields(dense))
    source = {"source": pretrained.SOURCE, "name": name, "config": dense}
    document = plan_document(plan, source, {name: entry.shape for name, entry in stored.items()})
    document |= pretrained.plan_fields(slim, config)
    checksums: dict[str, str] = {}

    def summed(names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stream(names):
            checksums[name] = checksum(tensor)
            yield name, tensor

    with replacing_folder(directory, PLAN_FILE) as folder:
        metadata = {"format": "pt", "rlprune": str(VERSION)}
        write_checkpoint(folder, stored, summed, max_shard_size, metadata)
        document["checksums"] = checksums
        pretrained.write_side_files(folder, config, model, tokenizer)
        write_json_atomic(folder / PLAN_FILE, document)
    return Path(directory)
