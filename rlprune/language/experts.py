"""Mixtures of experts: where their tensors are, which of their entries belong to an expert or to a neuron of each.

This file imports nothing of rlprune but files that travel with it in every saved folder of a pruned language model.

The experts of a layer lie in fused tensors whose first dimension counts them, as transformers 5 stores them. A router
gives each token a score for every expert and sends it to the ``top_k`` highest.

Shapes: E experts, F neurons of each, H hidden size, T tokens, k experts that a token is sent to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .linear import UnsupportedModel, set_attribute

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_total_experts")
_ALIGNED = 8
_IMPLEMENTATION = "_experts_implementation"  # of transformers' configs, read at every call
_NEURONS = ("intermediate_dim", "intermediate_size", "moe_intermediate_size", "expert_dim")


@dataclass(frozen=True)
class Mixture:
    """How to find the parts of a family's mixtures; paths are relative to the feed-forward part.

    ``shared`` is a plain feed-forward part that all tokens pass as well, "" where there is none. ``sizes``
    are the config's own names of (experts, neurons of each, neurons of the shared part).
    """

    router: str = "gate"
    experts: str = "experts"
    shared: str = ""
    sizes: tuple[str, str, str] = ("num_experts", "moe_intermediate_size", "")


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor of all experts or of the router, (E, ...), with the dimension that counts neurons (0: none does).

    That dimension holds ``halves`` entries a neuron (gate and up are fused): one half after the other, or ``paired``
    neuron by neuron. ``consumer`` marks the tensor that reads the neurons.
    """

    name: str
    dim: int = 0
    halves: int = 1
    paired: bool = False
    consumer: bool = False


@dataclass(frozen=True)
class Experts:
    """The experts of one block: module paths inside the causal LM, sizes, and all tensors by their full names.

    ``owner`` is the feed-forward part that router and experts belong to.
    """

    owner: str
    module: str
    router: str
    count: int
    top_k: int
    neurons: int
    tensors: tuple[ExpertTensor, ...]
    routing: tuple[ExpertTensor, ...]

    @property
    def down(self) -> ExpertTensor:
        """The tensor that reads the neurons: (E, H, F), or (E, F, H) where ``dim`` is 1."""
        return next(t for t in self.tensors if t.consumer)


def find_experts(modules: Mapping[str, nn.Module], owner: str, mixture: Mixture) -> Experts | None:
    """The experts of a feed-forward part, sizes read from the tensors' shapes; None where it has no router.

    Raises:
        UnsupportedModel: tensors that are not one slice an expert, or a router without ``top_k``; the module is named.
    """
    module, router = f"{owner}.{mixture.experts}", f"{owner}.{mixture.router}"
    if module not in modules or router not in modules:
        return None
    experts, gate = modules[module], modules[router]
    own = dict(experts.named_parameters(recurse=False))
    if "down_proj" not in own or own["down_proj"].ndim != 3 or len(list(experts.children())) > 1:
        raise UnsupportedModel(
            f"{module!r} ({type(experts).__name__}): its experts should lie in one tensor 'down_proj' of 3 dimensions"
        )
    count = len(own["down_proj"])
    tensors = tuple(_tensor(module, experts, name, parameter) for name, parameter in own.items())
    down = next(t for t in tensors if t.consumer)
    routing = dict(gate.named_parameters()) | dict(gate.named_buffers())
    top_k = next((n for m in (gate, modules[owner]) if (n := _whole(m, "top_k"))), 0)
    if not top_k or any(len(t) != count for t in (*own.values(), *routing.values())):
        raise UnsupportedModel(
            f"{router!r} ({type(gate).__name__}): should have one row for each of {count} experts, and a top_k"
        )
    return Experts(
        owner, module, router, count, top_k, int(own["down_proj"].shape[down.dim]), tensors,
        tuple(ExpertTensor(f"{router}.{name}") for name in routing),
    )  # fmt: skip


def _tensor(path: str, experts: nn.Module, name: str, parameter: Tensor) -> ExpertTensor:
    turned, full = bool(getattr(experts, "is_transposed", False)), f"{path}.{name}"
    paired = not getattr(experts, "is_concatenated", True)
    if name == "down_proj":
        return ExpertTensor(full, 1 if turned else 2, consumer=True)
    first, fused = name.removesuffix("_bias"), name.startswith("gate_up_proj")
    if first in ("gate_up_proj", "up_proj", "gate_proj"):
        return ExpertTensor(full, parameter.ndim - 1 if turned else 1, 2 if fused else 1, paired and fused)
    if name == "down_proj_bias":
        return ExpertTensor(full)
    raise UnsupportedModel(
        f"{path!r} ({type(experts).__name__}): the role of its tensor {name!r} is not known"
    )


def _whole(module: nn.Module, name: str) -> int:
    """An attribute that is a whole number; 0 where there is none."""
    value = vars(module).get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def expert_attributes(modules: Mapping[str, nn.Module], experts: Experts) -> list[tuple[str, str]]:
    """(module, attribute) of everything that counts the experts."""
    places = (experts.owner, experts.router, experts.module)
    return [(p, name) for p in places for name in _COUNTS if _whole(modules[p], name) == experts.count]


def expert_neuron_attributes(modules: Mapping[str, nn.Module], experts: Experts) -> list[tuple[str, str]]:
    """(module, attribute) of everything that counts the neurons of one expert."""
    own = modules[experts.module]
    return [
        (experts.module, name)
        for name in _NEURONS
        if name in vars(own) and experts.neurons == _whole(own, name)
    ]


def set_expert_neurons(module: nn.Module, attribute: str, value: int) -> None:
    """Set an attribute that counts the neurons of one expert, and choose how the experts are computed.

    transformers multiplies with all experts at once (``grouped_mm``), for which torch wants rows of whole 16 bytes: 8
    neurons in bfloat16. Experts of any other width run one by one.
    """
    set_attribute(module, attribute, value)
    if value % _ALIGNED and hasattr(module, "config"):
        set_attribute(module, f"config.{_IMPLEMENTATION}", "eager")


def resize_experts(model: nn.Module, experts: Experts, count: int, neurons: int) -> None:
    """Give a block's experts other sizes; values of the tensors that change are undefined."""
    modules = dict(model.named_modules())
    counts = expert_attributes(modules, experts)
    widths = expert_neuron_attributes(modules, experts)
    for tensor in (*experts.tensors, *experts.routing):
        owner, _, name = tensor.name.rpartition(".")
        old: Tensor = getattr(modules[owner], name)
        shape = [count, *old.shape[1:]]
        if tensor.dim:
            shape[tensor.dim] = tensor.halves * neurons
        new = old.detach().new_empty(shape)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(modules[owner], name, new)
    for path, attribute in counts:
        set_attribute(modules[path], attribute, count)
    for path, attribute in widths:
        set_expert_neurons(modules[path], attribute, neurons)
    if neurons == 0:
        drop_experts(model, experts.module)


class DroppedExperts(nn.Module):
    """Experts of no neurons: what is left of them is their output bias, weighted by the router.

    Made by `drop_experts`.
    """

    def forward(self, hidden_states: Tensor, chosen: Tensor, weights: Tensor, *args: object) -> Tensor:
        """Tokens (T, H), the experts that they are sent to (T, k) and their weights (T, k) -> (T, H)."""
        bias: Any = getattr(self, "down_proj_bias", None)
        if bias is None:
            return hidden_states.new_zeros(hidden_states.shape)
        added = (bias[chosen] * weights.unsqueeze(-1)).sum(dim=-2)
        return added.to(hidden_states.dtype)


def drop_experts(model: nn.Module, module: str) -> None:
    """Turn the experts at ``module`` into a stub; their router and their tensors, cut by others, stay."""
    model.get_submodule(module).__class__ = DroppedExperts
