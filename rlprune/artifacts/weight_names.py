"""The names of a model's tensors and those of a file, and under which prefixes the two are the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

# What wrappers of modules put into names, at any depth; no module of a model is called so.
_INSERTED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
# What a wrapper around the whole model calls it, where the file is of the bare model.
_AROUND = frozenset({"module", "model", "net", "network", "backbone", "encoder", "base_model", "_orig_mod"})
# Buffers that a model computes itself: files may lack them, and hold some that the model no longer keeps.
COMPUTED = (
    *("num_batches_tracked", "relative_position_index", "relative_coords_table", "position_ids", "inv_freq"),
    *("attn_mask", "masked_bias", "_extra_state", "total_ops", "total_params", "n_averaged"),
)


class Names:
    """The names of a model and those of a checkpoint, without what wrappers insert."""

    def __init__(self, own: Mapping[str, Tensor], stored: Collection[str]) -> None:
        self.own = {_bare(name, _INSERTED): name for name in own}
        # Parts of a model that were wrapped one by one have `module` inside of names, unless it is the model's word.
        own_word = any("module" in name.split(".") for name in own)
        for dropped in (_INSERTED if own_word else _INSERTED | {"module"}, _INSERTED, frozenset[str]()):
            self.stored = {_bare(name, dropped): name for name in stored}
            if len(self.stored) == len(stored):
                break
        self.tied = _tied(own)
        self.counts = self._counted()
        if not self.counts:
            self._unwrap_own()

    def _counted(self) -> Counter[str]:
        """How many of the model's names stand under each prefix of the file."""
        counts: Counter[str] = Counter()
        for name in self.stored:
            parts = name.split(".")
            for i in range(len(parts)):
                if ".".join(parts[i:]) in self.own:
                    counts[".".join(parts[:i])] += 1
        return counts

    def _unwrap_own(self) -> None:
        """Take wrappers off the model's names, where the file is of what they wrap."""
        while not self.counts:
            first = {name.partition(".")[0] for name in self.own}
            if len(first) != 1 or not first <= _AROUND:
                return
            self.own = {bare.partition(".")[2]: name for bare, name in self.own.items()}
            self.counts = self._counted()

    def under(self, prefix: str) -> dict[str, str]:
        """The model's name -> the whole stored name, for all that the file has under a prefix."""
        pairs = (
            (name, self.stored.get(f"{prefix}.{bare}" if prefix else bare)) for bare, name in self.own.items()
        )
        return {name: stored for name, stored in pairs if stored is not None}

    def missing(self, prefix: str) -> list[str]:
        """The model's names that the file lacks there, but for computed buffers and tied tensors."""
        there = self.under(prefix)
        covered = {self.tied[name] for name in there}
        return [
            name
            for name in self.own.values()
            if name not in there and self.tied[name] not in covered and not name.endswith(COMPUTED)
        ]

    def shown(self, prefix: str) -> str:
        """A prefix as it stands in the file, so that it can be typed."""
        name, stored = next(iter(self.under(prefix).items()))
        if stored.endswith(f".{name}"):
            return stored[: -len(name) - 1]
        return prefix or "."


def _bare(name: str, dropped: Collection[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in dropped)


def _tied(own: Mapping[str, Tensor]) -> dict[str, object]:
    """What tensors of a model that share their memory have in common."""
    return {
        name: (t.data_ptr(), tuple(t.shape))
        if t.numel() and t.layout == torch.strided and t.data_ptr()
        else name
        for name, t in own.items()
    }
