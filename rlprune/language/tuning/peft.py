"""What a fine-tune trains: adapters that are put onto a language model's layers and merged away again.

After `attached` the model is a plain model again, with the modules, names and shapes it had before.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...config.training import FinishConfig
from ...errors import ConfigError, GraphError
from ...utils.torch_internals import parameter_slots
from ..families import blocks_of

GROUP_COLUMNS = 64
"""Columns of a weight that share a scale in `group` (the usual group size of group-wise quantisation is 128;
pruned layers are narrower)."""
_ADAPTER = "rlprune"
TakeOff = Callable[[nn.Module, bool], None]
"""take_off(model, merge): removes the adapters from the model, merged into its weights or not."""


@dataclass
class Attached:
    """A model with its adapters: ``trained`` numbers learn; ``model`` is what they are merged in at the end."""

    model: nn.Module
    trained: int = 0


@contextlib.contextmanager
def attached(model: nn.Module, settings: FinishConfig, merge: bool = True) -> Iterator[Attached]:
    """Make ``model`` trainable as ``settings.method`` says; what was learned is merged into its weights at the end.

    Without ``merge`` the model is at the end what it was. Draws its initial values from torch's global generator. The
    merge is done in float32; which parameters want gradients is put back as it was. When the block raises, the adapters
    are taken off without being merged. A block that had to copy the model (FSDP) puts the copy into the `Attached` that
    it is given.

    Raises:
        ConfigError: `lora` without peft.
        GraphError: the model has no layer to adapt.
    """
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    kinds = {name: type(m) for name, m in model.named_modules()}
    take_off = _put_on(model, settings)
    handle = Attached(model, sum(p.numel() for p in model.parameters() if p.requires_grad))
    try:
        yield handle
    except BaseException:
        take_off(model, False)
        _restore_gradients(model, wanted)
        raise
    take_off(handle.model, merge)
    _restore_gradients(handle.model, wanted)
    if {name: type(m) for name, m in handle.model.named_modules()} != kinds:
        raise AssertionError("the merged model does not have the modules it had before")


def _put_on(model: nn.Module, settings: FinishConfig) -> TakeOff:
    if settings.method == "full":
        _want_gradients(model, {name for name, p in model.named_parameters() if p.numel()})
        return lambda model, merge: None
    names = target_layers(model, settings.adapters)
    if not names:
        raise GraphError("finish: no linear layer inside the model's blocks is left to adapt")
    return (_lora if settings.method == "lora" else _factors)(model, names, settings)


def _restore_gradients(model: nn.Module, wanted: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(wanted[name])


def target_layers(model: nn.Module, which: str = "all") -> list[str]:
    """Names of the linear layers (transformers' Conv1D too) inside the model's blocks; dropped parts have none.

    Those are all that stand in a list of modules: the attention's and the feed-forward's, fused or not,
    and neither embeddings nor the head. ``which``: as ``finish.adapters``.
    """
    if which == "query_value":
        wanted = {name for block in blocks_of(model) for name in block.qkv if name not in block.qkv[1:2]}
        return [name for name in target_layers(model) if name in wanted]
    lists = [name + "." for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or stored_inputs_first(module))
        and any(name.startswith(start) for start in lists)
    ]


def stored_inputs_first(module: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D, whose weight is stored (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


@dataclass(frozen=True)
class LowRank:
    """What LoRA adds to a layer's weight: ``b @ a``, (out, in), or its transpose where inputs are stored first."""

    layer: str
    a: Tensor
    b: Tensor
    transposed: bool

    def delta(self) -> Tensor:
        """The difference of the weight, as the weight is stored."""
        product = self.b @ self.a
        return product.T if self.transposed else product


def low_rank(model: nn.Module) -> list[LowRank]:
    """What the adapters of `attached` (method `lora`) have learned so far, a copy on the CPU in float32."""
    found = []
    for name, layer in model.named_modules():
        factors: Any = getattr(layer, "lora_A", None)
        if not isinstance(factors, nn.ModuleDict) or _ADAPTER not in factors:
            continue
        own: Any = layer
        a, b = (part[_ADAPTER].weight.detach().float().cpu().clone() for part in (own.lora_A, own.lora_B))
        stored = stored_inputs_first(own.get_base_layer())
        found.append(LowRank(name, a, b * float(own.scaling[_ADAPTER]), stored))
    return found


def _want_gradients(model: nn.Module, names: set[str]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def _lora(model: nn.Module, names: list[str], settings: FinishConfig) -> TakeOff:
    """LoRA by peft (Hu et al. 2021, arXiv 2106.09685): W + alpha / rank * B A, B zero at the start.

    peft takes its layers by name, so layers of different widths and dropped ones need nothing special.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "finish.method: 'lora' needs the package peft; install it with: pip install 'rlprune[language]'"
        ) from error
    before = set(vars(model))
    transposed = [stored_inputs_first(model.get_submodule(name)) for name in names]
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=names,
        fan_in_fan_out=all(transposed),
        bias="none",
    )
    with warnings.catch_warnings():
        # peft says that it corrects fan_in_fan_out where a model has layers of both kinds.
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:  # a step of 1e-4 would be lost in 16 bits
            parameter.data = parameter.data.float()

    def take_off(model: nn.Module, merge: bool) -> None:
        for name in names:
            layer: Any = model.get_submodule(name)
            base = layer.get_base_layer()
            if merge:
                delta = layer.get_delta_weight(_ADAPTER)
                base.weight.data = (base.weight.data.float() + delta.float()).to(base.weight.dtype)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, base)
        for extra in set(vars(model)) - before:  # peft leaves its configuration on the model
            delattr(model, extra)

    return take_off


def _factors(model: nn.Module, names: list[str], settings: FinishConfig) -> TakeOff:
    """`group` and `spp`: a parametrisation that computes each weight from the frozen one; merged exactly."""
    kind = GroupScale if settings.method == "group" else RowColumn
    _want_gradients(model, set())
    for name in names:
        layer = model.get_submodule(name)
        weight: Any = layer.weight
        rows, columns = weight.shape[::-1] if stored_inputs_first(layer) else weight.shape
        factor = kind(rows, columns, settings.rank, settings.alpha, stored_inputs_first(layer)).to(
            weight.device
        )
        parametrize.register_parametrization(layer, "weight", factor, unsafe=True)

    def take_off(model: nn.Module, merge: bool) -> None:
        for name in names:
            layer = model.get_submodule(name)
            slots = parameter_slots(layer)
            order = list(slots)
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=merge)
            # Removal puts the weight last; the order of a module's parameters is part of how it was.
            for last in [n for n in order if n != "weight"]:
                slots[last] = slots.pop(last)

    return take_off


class _Factor(nn.Module):
    """A weight computed from the frozen one, stored (out, in) or, ``transposed``, (in, out)."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed

    def forward(self, weight: Tensor) -> Tensor:
        w = weight.T if self.transposed else weight
        new = self.adapted(w.float()).to(weight.dtype)
        return new.T.contiguous() if self.transposed else new

    def adapted(self, weight: Tensor) -> Tensor:
        """The new weight of a weight (out, in), in float32."""
        raise NotImplementedError


class GroupScale(_Factor):
    """SAAP's group fine-tuning (arXiv 2412.15127): W * (1 + s[row, group of columns]) + alpha / rank * B A.

    The paper splits the columns of each weight into groups that are scaled independently and adds a
    low-rank part; it gives no formula. Derived here: one scale a row and group of `GROUP_COLUMNS` columns
    (as in group-wise quantisation, from which the paper takes the groups), kept as a difference from 1 so
    that weight decay pulls towards the pruned weight, and LoRA's own start (B zero, A Kaiming-uniform) for the
    low-rank part. The input dropout of LoRA has no place in a weight and is left out.
    """

    def __init__(self, rows: int, columns: int, rank: int, alpha: float, transposed: bool) -> None:
        super().__init__(transposed)
        self.columns, self.scaling = columns, alpha / rank
        self.scale = nn.Parameter(torch.zeros(rows, math.ceil(columns / GROUP_COLUMNS)))
        self.a = nn.Parameter(torch.empty(rank, columns))
        self.b = nn.Parameter(torch.zeros(rows, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def adapted(self, weight: Tensor) -> Tensor:
        scale = (1 + self.scale).repeat_interleave(GROUP_COLUMNS, dim=1)[:, : self.columns]
        return weight * scale + self.scaling * (self.b @ self.a)


class RowColumn(_Factor):
    """SPP (arXiv 2405.16057): W + alpha / rank * W * (rows' factor) * (columns' factors), elementwise.

    Each row has one factor, zero at the start; the rows are split into ``rank`` runs that have one factor
    a column each, with the Kaiming-uniform start of the authors' code (Lucky-Lance/SPP, peft/tuners/lora.py: 16 runs,
    alpha / rank = 2). A weight that is zero stays zero, so masks survive the merge. Their dropout of the inputs has no
    place in a weight and is left out.
    """

    def __init__(self, rows: int, columns: int, rank: int, alpha: float, transposed: bool) -> None:
        super().__init__(transposed)
        runs = min(rank, rows)
        self.scaling = alpha / rank
        self.row = nn.Parameter(torch.zeros(rows, 1))
        self.column = nn.Parameter(torch.empty(runs, columns))
        nn.init.kaiming_uniform_(self.column, a=math.sqrt(5))
        self.register_buffer("run", torch.arange(rows) * runs // rows, persistent=False)

    def adapted(self, weight: Tensor) -> Tensor:
        run: Any = self.run
        return weight * (1 + self.scaling * self.row * self.column[run])
