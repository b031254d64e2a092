"""The configuration of a nemotron-nas folder, for readers that load it with ``trust_remote_code``; made by rlprune.

A copy of this file stands in every folder that ``rlprune export --to nemotron-nas`` writes, and needs transformers
only. ``block_configs`` holds a block's attention and feed-forward part as objects with the attributes that vLLM's
``nemotron_nas`` asks for. What the file leaves out (``ffn_mult`` with an ``intermediate_size``) is no attribute
either: vLLM decides by that which of them counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from transformers import LlamaConfig


class DeciLMConfig(LlamaConfig):
    """A Llama configuration with ``block_configs``: for each block an attention and a feed-forward part."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Sequence[object] | None = None, **fields: Any) -> None:
        self.block_configs = [_block(block) for block in block_configs or ()]
        super().__init__(**fields)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields, the blocks as they stand in config.json."""
        blocks = self.__dict__.pop("block_configs", [])
        try:
            fields: dict[str, Any] = super().to_dict()
        finally:
            self.__dict__["block_configs"] = blocks
        return fields | {"block_configs": [{k: dict(vars(v)) for k, v in vars(b).items()} for b in blocks]}


def _block(block: object) -> Any:
    """A block as an object; one that is an object already stays."""
    if not isinstance(block, Mapping):
        return block
    return SimpleNamespace(**{part: SimpleNamespace(**fields) for part, fields in block.items()})
