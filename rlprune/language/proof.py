"""The proof that cutting a language model is exact: random units against the masked dense model, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
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
_NEW = 6  # tokens of the comparison with and without cache
# float64 sums in another order differ by this much, relative to the largest output.
_EXACT = 1e-8
# Families that none has looked at may compute a step in float32 whatever the format of the weights.
_EXACT_MIXED = 1e-6
# Of the largest logit, between generation with and without the cache. Mixers with states compute them in float32, and
# what follows enlarges the rounding: 1e-4 in Nemotron-H, in the masked dense model as in the cut one.
_EXACT_CACHED = 1e-2
# Random matrices: standard deviation times the root of the inputs.
_SPREAD = 0.7


def prove(
    model: nn.Module, space: PruningSpace, space_of: Callable[[nn.Module, int, bool], PruningSpace]
) -> None:
    """Cut random units and compare; on the model itself where it is small, else on its skeleton.

    Args:
        space_of: (model, sequence length, is it a copy of ``model``) -> the space of exact cuts.

    Raises:
        GraphError: the outputs or the costs differ.
    """
    small = _is_small(model)
    twin = twin_of(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, _vocabulary(twin), (1, _TOKENS), generator=generator)
    plan = random_plan(space_of(twin, _TOKENS, small), np.random.default_rng(0))
    reason = difference(twin, ids.to(next(twin.parameters()).device), plan)
    if reason is not None:
        raise GraphError(f"{type(model).__name__}: cutting it is not exact ({reason}); not supported")


def _is_small(model: nn.Module) -> bool:
    tensors = list(model.parameters())
    return sum(t.numel() for t in tensors) <= _SMALL and tensors[0].device.type != "meta"


def twin_of(model: nn.Module, matrices: bool = False) -> nn.Module:
    """What cuts are proved on, in float64: a copy of the model where it is small, else its skeleton.

    With ``matrices`` these are random too: some families begin with zeros, which no cut would change.
    """
    source: Any = model  # torch takes a model's config for a module
    twin: Any = copy.deepcopy(model).double().eval() if _is_small(model) else skeleton(source.config).double()
    _lively(twin)
    if matrices:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in (p for p in twin.parameters() if p.ndim > 1):
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
                tensor.copy_(noise * _SPREAD / tensor.shape[-1] ** 0.5)
    return twin  # type: ignore[no-any-return]


def _vocabulary(model: nn.Module) -> int:
    source: Any = model
    return int(source.config.get_text_config().vocab_size)


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
    listed = families.family_of(twin).listed
    exact = _EXACT_MIXED if listed else _EXACT
    if not torch.allclose(got, wanted, rtol=0.0, atol=exact * max(1.0, float(wanted.abs().max()))):
        return f"outputs differ by {float((got - wanted).abs().max()):.1e}"
    if not float(wanted.abs().max()) or not bool(torch.isfinite(wanted).all()):
        return "its outputs are zero or not finite"
    space, spent = plan.space, macs / len(ids)
    if listed:  # its mixers compute what no formula here counts, before and after
        spent += space.dense_cost("macs") - counted(twin, ids)[1] / len(ids)
    facts = {"macs": spent, "params": sum(p.numel() for p in slim.parameters())}
    for metric, value in facts.items():
        if not math.isclose(value, space.cost(plan.widths, metric), rel_tol=1e-12):
            return f"its {metric} do not follow the formula"
    return None


def same_with_cache(twin: nn.Module, plans: Sequence[Plan]) -> str | None:
    """Why greedy generation with the cache is not that without; None where it is, or where the dense one's differs."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, _vocabulary(twin), (1, 5), generator=generator)
    if not generates_alike(twin, ids):
        return None  # not of our making
    if all(generates_alike(prune(twin, plan), ids) for plan in plans):
        return None
    return "the cut model generates other tokens with its cache than without"


def generates_alike(model: nn.Module, ids: Tensor) -> bool:
    """Whether greedy generation with the cache has the logits and the tokens of that without.

    Logits, because equal tokens may be luck: some families attend farther without the cache than with it.
    """
    generate: Any = getattr(model, "generate", None)
    if generate is None:
        return False
    options = {
        "max_new_tokens": _NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    with torch.no_grad():
        cached, plain = (generate(ids, use_cache=use, **options) for use in (True, False))
    if not torch.equal(cached.sequences, plain.sequences):
        return False
    found, wanted = torch.stack(cached.logits).double(), torch.stack(plain.logits).double()
    return torch.allclose(found, wanted, rtol=0.0, atol=_EXACT_CACHED * max(1.0, float(wanted.abs().max())))


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
    """A narrow random model of the same config: two blocks, few heads of the same size and ratio, few tokens.

    Of a hybrid model there are as many blocks as it takes to have one of every kind. Apart from the language part, the
    other parts of a model (towers for pictures and sound) get one block each.
    """
    from .modeling_rlprune import stock_class

    whole = copy.deepcopy(stock_config(config))
    small: Any = whole.get_text_config()
    family = families.family_of(config)
    _, kv_name, neurons_name = family.sizes
    heads = int(small.num_attention_heads)
    kv = int(getattr(small, kv_name, None) or heads) if kv_name else heads
    if getattr(small, "multi_query", False) and not getattr(small, "new_decoder_architecture", False):
        kv = 1
    hidden = int(small.hidden_size)
    size = int(getattr(small, "head_dim", None) or hidden // heads)
    fewer = min(kv, 3)
    _shorten(small)
    small.num_attention_heads = fewer * (heads // kv)
    if kv_name:
        setattr(small, kv_name, fewer)
    # Some classes derive the head size from the hidden size though their config has a field for it (Qwen-VL).
    independent = "head_dim" in vars(small) and small.head_dim is not None and size * heads != hidden
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
    if families.family_of(config).listed:  # Gemma 4 puts it where pictures are
        small.pad_token_id = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return stock_class(whole)(whole).float().eval()  # type: ignore[no-any-return]


def _shorten(config: PreTrainedConfig) -> None:
    """Leave the first blocks of a config: two, or more where the first two are not of every kind."""
    depth = int(config.num_hidden_layers)
    kinds = list(getattr(config, "layer_types", None) or ())
    few = min(depth, max(2, *(kinds.index(kind) + 1 for kind in set(kinds)))) if kinds else min(depth, 2)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(config, name, value[:few])
    config.num_hidden_layers = few
