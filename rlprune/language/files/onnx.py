"""A causal language model as one ONNX file that reads a prompt and goes on from its cache.

Inputs and outputs are named as Hugging Face's optimum names them:

- ``input_ids`` (B, L), ``attention_mask`` (B, P + L), ``position_ids`` (B, L), all int64; for every block that has an
  attention ``past_key_values.N.key`` and ``.value`` (B, K_N, P, D), float32, N the block's own number.
- ``logits`` (B, L, V), and ``present.N.key`` and ``.value`` (B, K_N, P + L, D).

B, L and P are free, and P may be 0: the same file reads a prompt without a past. K_N differs from block to block where
heads were cut, and a block whose attention was dropped has neither past nor present. Weights are float32.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArtifactError
from ...utils.onnx_files import mark_onnx, silent_exporter, why_not_exported
from ...utils.unfinished import fresh_folder
from ..families import Block, blocks_of

TOLERANCE = 1e-4
"""Largest difference of a logit that is allowed, as a share of the largest logit, and at least in absolute numbers."""
ONE_FILE = 1_900_000_000
"""Bytes of weights up to which one file holds them: protobuf ends at 2 GiB."""
GREEDY = 8
_CHECKED = ((1, 1, 0), (2, 6, 0), (1, 1, 7), (3, 4, 5))  # (B, L, P)
# What versions of transformers call the cache that a model is handed.
_CACHES = ("cache", "past_key_values", "layer_past")


@dataclass(frozen=True)
class Checked:
    """What was found when a file was run against PyTorch."""

    difference: float
    """Largest difference of any logit."""
    greedy: int
    """Tokens of greedy decoding that were equal."""
    files: tuple[str, ...]

    def __str__(self) -> str:
        more = f"; the weights are in {self.files[1]} next to it" if len(self.files) > 1 else ""
        return (
            f"float32, with and without past; onnxruntime gives PyTorch's logits within {self.difference:.1e} and the "
            f"same {self.greedy} greedy tokens{more}"
        )


def export_onnx(model: nn.Module, target: Path, *, one_file: int = ONE_FILE) -> Checked:
    """Write a causal language model as ONNX, run it in onnxruntime against PyTorch, and only then move it into place.

    Args:
        model: a transformers causal LM on the CPU, pruned or not; its weights are made float32.
        target: the file; weights above ``one_file`` bytes go to ``target.data`` next to it.

    Raises ArtifactError: the exporter cannot follow the model, its logits differ by more than `TOLERANCE`, greedy
    decoding gives other tokens, or the files cannot be written.
    """
    model = model.float().eval()
    shared = sum({id(p): p.numel() * 4 for p in model.parameters()}.values()) > one_file
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with fresh_folder(target) as folder:
            fresh = folder / target.name
            try:
                with torch.no_grad(), silent_exporter():
                    _write(model, fresh, shared)
                difference = _check(model, fresh)
            except (ArtifactError, OSError):
                raise
            except Exception as error:  # exporters raise whatever their many parts raise
                raise ArtifactError(
                    f"export: {type(model).__name__} cannot be exported ({why_not_exported(error)})"
                ) from error
            files = sorted((p.name for p in folder.iterdir()), key=len)
            for name in files[::-1]:  # the weights first: the graph is what says that they are whole
                os.replace(folder / name, target.parent / name)
    except OSError as error:
        raise ArtifactError(f"{target}: cannot be written ({error.strerror or error})") from error
    return Checked(difference, GREEDY, tuple(files))


@dataclass(frozen=True)
class _Entry:
    """One block's place in the cache: its number, key-value heads and head sizes."""

    block: int
    heads: int
    key: int
    value: int


class _Stateless(nn.Module):
    """A model as a function of tensors: the cache comes in and goes out as a list of keys and values."""

    def __init__(self, model: nn.Module, blocks: int, entries: Sequence[_Entry]) -> None:
        super().__init__()
        self.model = model
        self._blocks, self._entries = blocks, entries
        known = inspect.signature(model.forward).parameters
        self._cache = next(name for name in _CACHES if name in known)
        self.reads_positions = "position_ids" in known

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        cache = _cache_of(self._blocks, self._entries, past)
        places = {"position_ids": position_ids} if self.reads_positions else {}
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=True,
            **places,
            **{self._cache: cache},
        )
        layers = [cache.layers[entry.block] for entry in self._entries]
        return (output.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values)))


def _cache_of(blocks: int, entries: Sequence[_Entry], past: Sequence[Tensor]) -> Any:
    """A cache that holds ``past`` and keeps all of it: sliding windows are the masks' affair.

    A layer of transformers calls a past of length 0 no past, which would fix that length in the file.
    """
    from transformers.cache_utils import Cache, DynamicLayer

    class Layer(DynamicLayer):
        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__()
            self.keys, self.values, self.is_initialized = keys, values, True
            self.dtype, self.device = keys.dtype, keys.device

        def get_seq_length(self, *args: object) -> int:
            assert self.keys is not None
            return self.keys.shape[-2]

    first = past[0]
    nothing = first.new_empty((first.shape[0], 1, first.shape[2], 0))
    layers: list[Any] = [Layer(nothing, nothing) for _ in range(blocks)]
    for number, entry in enumerate(entries):
        layers[entry.block] = Layer(past[2 * number], past[2 * number + 1])
    return Cache(layers=layers)


def _entries(model: nn.Module, blocks: Sequence[Block]) -> list[_Entry]:
    """What each block keeps of two tokens, seen in a call; dropped attentions keep nothing."""
    known = inspect.signature(model.forward).parameters
    name = next((name for name in _CACHES if name in known), None)
    if name is None:
        raise ArtifactError(f"export: {type(model).__name__} takes no cache ({', '.join(_CACHES)})")
    with torch.no_grad():
        cache = model(torch.zeros(1, 2, dtype=torch.long), use_cache=True)[name]
    found = []
    for index, layer in enumerate(cache.layers):
        keys, values = layer.keys, layer.values
        if keys is not None and keys.shape[-1]:
            found.append(_Entry(index, keys.shape[1], keys.shape[-1], values.shape[-1]))
    if len(cache.layers) != len(blocks) or not found:
        raise ArtifactError(
            f"export: {type(model).__name__} has {len(found)} attentions with a cache in {len(blocks)} blocks; at "
            "least one has to be left"
        )
    return found


def _write(model: nn.Module, path: Path, external: bool) -> None:
    blocks = blocks_of(model)
    entries = _entries(model, blocks)
    stateless = _Stateless(model, len(blocks), entries).eval()
    batch, length, before = 2, 5, 3  # exporters take a size of 0 or 1 for a constant
    free = torch.export.Dim.DYNAMIC
    past = [
        torch.zeros(batch, entry.heads, before, size)
        for entry in entries
        for size in (entry.key, entry.value)
    ]
    positions = torch.arange(before, before + length).expand(batch, length)
    sides = [f"{entry.block}.{side}" for entry in entries for side in ("key", "value")]
    torch.onnx.export(
        stateless,
        (
            torch.zeros(batch, length, dtype=torch.long),
            torch.ones(batch, before + length, dtype=torch.long),
            positions,
            past,
        ),
        path,
        dynamo=True,
        external_data=external,
        verbose=False,
        input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{s}" for s in sides)],
        output_names=["logits", *(f"present.{s}" for s in sides)],
        dynamic_shapes=(*({0: free, 1: free} for _ in range(3)), [{0: free, 2: free} for _ in past]),
    )
    _name_sizes(path)
    mark_onnx(path)


def _name_sizes(path: Path) -> None:
    """Call the free sizes what optimum calls them; the exporter numbers them."""
    import onnx

    file = onnx.load(path, load_external_data=False)
    wanted = {
        "input_ids": ("batch_size", "sequence_length"),
        "attention_mask": ("batch_size", "total_sequence_length"),
        "position_ids": ("batch_size", "sequence_length"),
    }
    names: dict[str, str] = {}
    for value in file.graph.input:
        sizes = wanted.get(value.name, ("batch_size", "", "past_sequence_length", ""))
        for size, name in zip(value.type.tensor_type.shape.dim, sizes, strict=True):
            if size.dim_param:
                names.setdefault(size.dim_param, name)
    for value in [*file.graph.input, *file.graph.output, *file.graph.value_info]:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), size.dim_param)
    onnx.save(file, path)


class OnnxLanguageModel:
    """A written file in onnxruntime, on the CPU, called as the torch model is; for checks and figures.

    Args:
        path: what `export_onnx` wrote.
        threads: of one operator; None for onnxruntime's own choice.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {entry.name: entry.shape for entry in self._session.get_inputs()}
        self.outputs = [entry.name for entry in self._session.get_outputs()]

    def __call__(
        self, ids: Tensor, past: Sequence[Tensor] | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, L, V) of token ids (B, L), and the new past; ``mask`` (B, P + L) is 0 where a token is padding."""
        names = [name for name in self.inputs if name.startswith("past_key_values.")]
        if past is None:
            past = [torch.zeros(len(ids), self.inputs[n][1], 0, self.inputs[n][3]) for n in names]
        before = past[0].shape[2]
        whole = torch.ones(len(ids), before + ids.shape[1], dtype=torch.long) if mask is None else mask
        places = (whole.cumsum(-1) - 1).clamp_min(0)[:, before:]
        given = {
            "input_ids": ids,
            "attention_mask": whole,
            "position_ids": places,
            **dict(zip(names, past, strict=True)),
        }
        found = self._session.run(None, {n: t.numpy() for n, t in given.items() if n in self.inputs})
        logits, *present = (torch.from_numpy(array) for array in found)
        return logits, present

    def greedy(self, ids: Tensor, count: int) -> Tensor:
        """The ``count`` likeliest tokens after a prompt (1, L), one after the other from the cache, (count,)."""
        logits, past = self(ids)
        tokens = [logits[:, -1].argmax(-1)]
        while len(tokens) < count:
            logits, past = self(tokens[-1][:, None], past)
            tokens.append(logits[:, -1].argmax(-1))
        return torch.cat(tokens)


def greedy_tokens(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    """The same by PyTorch, which reads the whole text anew for every token, (count,)."""
    whole = ids
    with torch.no_grad():
        for _ in range(count):
            whole = torch.cat([whole, model(whole, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return whole[0, ids.shape[1] :]


def _check(model: nn.Module, path: Path) -> float:
    """The largest difference of a logit; ArtifactError where it is too large or greedy decoding takes another way."""
    import onnx

    onnx.checker.check_model(path)
    ours = OnnxLanguageModel(path)
    config: Any = model.config
    vocabulary = int(config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch, length, before in _CHECKED:
        ids = torch.randint(vocabulary, (batch, before + length), generator=generator)
        mask = torch.ones_like(ids)
        if batch > 1:
            mask[0, :2] = 0  # padded on the left, as batches of prompts are
        past = ours(ids[:, :before], None, mask[:, :before])[1] if before else None
        found, _ = ours(ids[:, before:], past, mask)
        with torch.no_grad():
            places = (mask.cumsum(-1) - 1).clamp_min(0)
            known = (
                {"position_ids": places}
                if "position_ids" in inspect.signature(model.forward).parameters
                else {}
            )
            wanted = model(ids, attention_mask=mask, use_cache=False, **known).logits[:, before:]
        real = mask[:, before:].bool()
        apart = float((found - wanted)[real].abs().max())
        if not apart <= TOLERANCE * max(1.0, float(wanted[real].abs().max())):
            raise ArtifactError(
                f"export: logits differ from PyTorch by {apart:.2g} (allowed {TOLERANCE:g} of the largest one) at "
                f"{batch} sequences of {length} tokens after {before}"
            )
        worst = max(worst, apart)
    prompt = torch.randint(vocabulary, (1, 5), generator=generator)
    if not torch.equal(ours.greedy(prompt, GREEDY), greedy_tokens(model, prompt, GREEDY)):
        raise ArtifactError("export: greedy decoding from the cache gives other tokens than PyTorch")
    return worst
