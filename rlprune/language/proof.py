"""The proof that cutting a language model is exact: random units against the masked dense model, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import GraphError
from ..pruning.plan import Plan, best_units
from ..pruning.space import PruningSpace
from ..pruning.surgery import masked, prune
from ..tracing.counting import flop_counter
from . import families
from .expert_groups import few_experts
from .files.pretrained import stock_config
from .transformers_internals import eager_experts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Models with more parameters than this are proved on a narrow skeleton of the same config.
_SMALL = 4_000_000
_TOKENS = 16
# float64 sums in another order differ by this much, relative to the largest output.
_EXACT = 1e-8


def prove(
    model: nn.Module, space: PruningSpace, space_of: Callable[[nn.Module, int, bool], PruningSpace]
) -> None:
    """Cut random units and compare; on the model itself where it is small, else on its skeleton.

    Args:
        space_of: (model, sequence length, is it a copy of ``model``) -> the space of exact cuts.

    Raises:
        GraphError: the outputs or the costs differ.
    """
    source: Any = model  # torch takes a model's config for a module
    small = space.dense_cost("params") <= _SMALL and next(model.parameters()).device.type != "meta"
    twin: Any = copy.deepcopy(model).double().eval() if small else skeleton(source.config).double()
    _lively(twin)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, twin.config.vocab_size, (1, _TOKENS), generator=generator)
    plan = random_plan(space_of(twin, _TOKENS, small), np.random.default_rng(0))
    reason = difference(twin, ids.to(next(twin.parameters()).device), plan)
    if reason is not None:
        raise GraphError(f"{type(model).__name__}: cutting it is not exact ({reason}); not supported")


def _lively(twin: nn.Module) -> None:
    """Random biases and gains: zeros or ones would hide a wrong cut."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in twin.named_parameters():
            if tensor.ndim == 1:
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
                tensor.copy_(noise - 0.5 if name.endswith("bias") else 0.5 + noise)


def random_plan(space: PruningSpace, rng: np.random.Generator) -> Plan:
    """Random units of every group, except of the hidden size, which cannot be cut exactly."""
    widths, scores = space.widths.copy(), []
    for index, group in enumerate(space.groups):
        if group.kind != "hidden":
            widths[index] = rng.integers(group.minimum, group.width + 1)
        scores.append(rng.permutation(group.units))
    return Plan(space, widths, best_units(space, scores, widths))


def difference(twin: nn.Module, ids: Tensor, plan: Plan) -> str | None:
    """Why the cut model is not the masked dense one, or does not cost what the formula says; None when it is."""
    slim = prune(twin, plan)
    got, macs = counted(slim, ids)
    oracle = masked(twin, plan)
    with torch.no_grad(), eager_experts(oracle):
        wanted = oracle(input_ids=ids, use_cache=False).logits
    if not torch.allclose(got, wanted, rtol=0.0, atol=_EXACT * max(1.0, float(wanted.abs().max()))):
        return f"outputs differ by {float((got - wanted).abs().max()):.1e}"
    facts = {
        "macs": macs / len(ids),
        "params": sum(p.numel() for p in slim.parameters()),
    }
    for metric, value in facts.items():
        if not math.isclose(value, plan.space.cost(plan.widths, metric), rel_tol=1e-12):
            return f"its {metric} do not follow the formula"
    return None


def counted(model: nn.Module, ids: Tensor) -> tuple[Tensor, float]:
    """Logits (B, L, V) of a forward pass without cache, and its multiply-adds by torch's FLOP counter.

    The angles of rotary embeddings are left out: some versions of transformers get them from a product of
    positions and frequencies, others from a plain multiplication, and no width changes them. Experts run one by one:
    the counter does not see into products of several of them.
    """
    with eager_experts(model), flop_counter() as counter:
        logits = model(input_ids=ids, use_cache=False).logits.detach()
    angles = {name for name, part in model.named_modules() if "Rotary" in type(part).__name__}
    counts = counter.get_flop_counts()
    left_out = sum(sum(counts[key].values()) for key in counts if key.partition(".")[2] in angles)
    return logits, (counter.get_total_flops() - left_out) / 2


def skeleton(config: PreTrainedConfig) -> nn.Module:
    """A narrow random model of the same config: two blocks, few heads of the same size and ratio, few tokens."""
    from transformers import AutoModelForCausalLM

    small = copy.deepcopy(stock_config(config))
    family = families.family_of(config)
    _, kv_name, neurons_name = family.sizes
    heads = int(small.num_attention_heads)
    kv = int(getattr(small, kv_name, None) or heads) if kv_name else heads
    if getattr(small, "multi_query", False) and not getattr(small, "new_decoder_architecture", False):
        kv = 1
    size = int(getattr(small, "head_dim", None) or small.hidden_size // heads)
    fewer = min(kv, 3)
    depth = int(small.num_hidden_layers)
    for name, value in list(vars(small).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(small, name, value[:2])
    small.num_hidden_layers = min(depth, 2)
    small.num_attention_heads = fewer * (heads // kv)
    if kv_name:
        setattr(small, kv_name, fewer)
    independent = "head_dim" in vars(small) and small.head_dim is not None
    small.hidden_size = 64 if independent else small.num_attention_heads * size
    if hasattr(small, "word_embed_proj_dim"):
        small.word_embed_proj_dim = small.hidden_size
    if hasattr(small, neurons_name):
        setattr(small, neurons_name, 96)
    if family.mixture is not None:
        few_experts(small, family.mixture)
    small.vocab_size = 128
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, name, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(small, trust_remote_code=False, dtype=torch.float32).eval()
