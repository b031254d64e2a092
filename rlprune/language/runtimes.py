"""Where a pruned language model runs: what of a pruning space each runtime loads (``prune.runtime``).

What is said of llama.cpp and vLLM was read in their sources: src/models/deci.cpp and openelm.cpp there,
model_executor/models/nemotron_nas.py here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..config.names import RUNTIMES
from ..errors import ArtifactError, ConfigError
from ..pruning.space import Group, PruningSpace
from ..tracing.trace import TraceOptions
from ..utils.registry import Named, named_errors
from . import families
from .files import pretrained
from .files.uniform import NotUniform, plain_form
from .sizes import layer_sizes, resize

_KINDS = {"ffn": "feed-forward part", "attention": "attention"}


@dataclass(frozen=True)
class Restriction:
    """What a runtime loads of what could be cut.

    Args:
        stays: {part: reason} of attentions and feed-forward parts (module paths) that are not cut at all.
        heads: the step in which key-value heads may go.
        whole_heads: why heads cannot go one by one; "" where they can. The attention is then kept or dropped.
        drops: kinds of parts ("attention", "ffn") that may be removed whole, where ``prune.drop`` allows it.
        alike: whether all blocks have one number of neurons and one of heads.
        hidden: why the hidden size cannot be cut; "" where it can.
        widths: what else its formats ask of the number of neurons, in words for `rlprune inspect`.
    """

    stays: Mapping[str, str] = field(default_factory=dict)
    heads: int = 1
    whole_heads: str = ""
    drops: frozenset[str] = frozenset(_KINDS)
    alike: bool = False
    hidden: str = ""
    widths: str = ""

    def applied(self, space: PruningSpace, runtime: str) -> PruningSpace:
        """The space with only the steps and drops that load; its groups have to be alike where all blocks are."""
        groups = tuple(self._group(g) for g in space.groups)
        ties = _ties(space, runtime) if self.alike else ()
        return replace(space, groups=groups, ties=ties)

    def _group(self, g: Group) -> Group:
        if g.kind not in _KINDS:
            return g
        step = g.step
        if g.kind == "attention":
            step = g.width if self.whole_heads else min(self.heads, g.width)
        may_go = g.minimum == 0 and g.kind in self.drops
        return replace(g, step=step, minimum=0 if may_go else max(g.minimum, min(step, g.width)))


Make = Callable[[nn.Module], Restriction]


def runtime(summary: str, *, name: str | None = None) -> Callable[[Make], Make]:
    """Register a runtime (a name for ``prune.runtime``) under the name of the function below.

    The function takes the dense causal language model of transformers, which may lie on ``meta``, and returns a
    `Restriction`. It raises ConfigError where the runtime does not read the model (`read_by`).

    Args:
        summary: one line for ``rlprune list runtimes``.
        name: instead of the function's own.

    Raises (when applied):
        ConfigError: the name is taken, or the summary is missing.
    """
    return RUNTIMES.decorator(
        "runtime", summary, lambda own, make: Named(own, summary, make, wing="language"), name
    )


def restriction(model: nn.Module, options: TraceOptions) -> Restriction:
    """What the runtime of the options loads of a model.

    Raises ConfigError: it does not read the model, or does not load what is asked for.
    """
    name = options.runtime
    if name == "any":
        return Restriction()
    make = RUNTIMES[name].function
    assert make is not None
    with named_errors("runtime", name):
        found = make(model)
        if not isinstance(found, Restriction):
            raise ConfigError(f"runtime {name!r}: must return a Restriction, got {type(found).__name__}")
    if options.drop and not found.drops:
        raise ConfigError(
            f"prune.drop: {name!r} loads no model in which single parts are missing; leave it out"
            + (", or drop whole blocks: prune --same-widths --drop-blocks N" if found.alike else "")
        )
    if options.hidden and found.hidden:
        raise ConfigError(f"prune.hidden: not with the runtime {name!r}: {found.hidden}")
    if found.whole_heads and not (options.drop and "attention" in found.drops):
        blocks = families.blocks_of(model)
        how = "; prune.drop lets whole attentions go" if "attention" in found.drops else ""
        reason = f"runtime {name}: {found.whole_heads}{how}"
        found = replace(found, stays={b.attention: reason for b in blocks} | dict(found.stays))
    return found


def _instead(model: nn.Module) -> str:
    """The runtimes that read any type, where they read this model."""
    return "any" if families.why_never_plain(model) else "any, uniform"


def read_by(name: str, model: nn.Module, types: Sequence[str], instead: str = "") -> None:
    """ConfigError where a model's ``model_type`` is none of those that a runtime reads."""
    kind = _type(model)
    if kind not in types:
        raise ConfigError(
            f"prune.runtime: {name!r} reads blocks of different sizes of {', '.join(types)}, and this model is "
            f"of type {kind!r}; allowed here: {instead or _instead(model)}"
        )


def _computes(name: str, model: nn.Module, ropes: Sequence[str] | None = None) -> None:
    """ConfigError where a model's activation, or its rotation (None: any), is not what a runtime computes."""
    config = _config(model)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    for setting, value, known in (
        ("hidden_act", config.hidden_act, ("silu", "swish")),
        ("rope_type", rope, ropes or (rope,)),
    ):
        if value not in known:
            raise ConfigError(
                f"prune.runtime: {name!r} computes {', '.join(known)}, and this model's {setting} is {value!r}; "
                f"allowed here: {_instead(model)}"
            )


def _config(model: nn.Module) -> Any:
    """A model's config, which torch takes for a tensor or a module."""
    return model.config


def _type(model: nn.Module) -> str:
    return str(getattr(_config(model), "model_type", ""))


def _ties(space: PruningSpace, runtime: str) -> tuple[tuple[int, ...], ...]:
    """All groups of a kind as one tie (the hidden size is one group); ConfigError where one of a kind is missing."""
    ties = []
    for kind in dict.fromkeys(g.kind for g in space.groups if g.kind != "hidden"):
        found = [i for i, g in enumerate(space.groups) if g.kind == kind]
        last = {space.groups[i].name.rpartition(".")[2] for i in found}
        for name, reason in space.protected.items():
            if name.rpartition(".")[2] in last:
                raise ConfigError(
                    f"prune.runtime: {runtime!r} needs all blocks alike, and {name!r} stays as it is ({reason})"
                )
        sizes = {(space.groups[i].width, space.groups[i].step): space.groups[i].name for i in found}
        if len(sizes) > 1:
            (first, one), (second, other) = list(sizes.items())[:2]
            raise ConfigError(
                f"prune.runtime: {runtime!r} needs every {_KINDS.get(kind, kind)} alike, and {one!r} is {first[0]} "
                f"wide, {other!r} {second[0]}"
            )
        ties.append(tuple(found))
    return tuple(tie for tie in ties if len(tie) > 1)


# What ships


def _llama_cpp(model: nn.Module) -> Restriction:
    """GGUF: the architecture ``deci`` reads query heads, key-value heads and neurons of each layer, and 0 of either.

    It computes what Llama computes. ``openelm`` reads the same arrays with norms on queries and keys (Qwen3), but no
    block without attention.
    """
    name = "llama.cpp"
    read_by(name, model, ("llama", "mistral", "ministral", "qwen2", "qwen3", "seed_oss"))
    _computes(name, model, ("default", "linear", "llama3"))
    if _type(model) == "qwen3" and not _config(model).tie_word_embeddings:
        raise ConfigError(
            f"prune.runtime: {name!r} reads blocks of different sizes of a 'qwen3' only where its output layer is the "
            "embedding, and this model has one of its own; allowed here: any, uniform"
        )
    drops = {"ffn"} if _type(model) == "qwen3" else set(_KINDS)
    return Restriction(
        drops=frozenset(drops),
        widths="q8_0 and q4_0 take neurons in steps of 32, k-quants in steps of 256, f16 any",
    )


def _vllm(model: nn.Module) -> Restriction:
    """vLLM's nemotron_nas: one number of query heads for all blocks, so that key-value heads cannot take theirs along.

    A block's attention or feed-forward part may be missing; the first attention not, because it is what the residual
    stream begins with there.
    """
    read_by("vllm", model, ("llama", "mistral"))
    _computes("vllm", model)
    window = getattr(model.config, "sliding_window", None)
    if window is not None:
        raise ConfigError(
            f"prune.runtime: 'vllm' (nemotron_nas) reads no sliding window, and this model has one of {window}"
        )
    first = families.blocks_of(model)[0].attention
    return Restriction(
        stays={first: "runtime vllm: the first block's attention begins the residual stream"},
        whole_heads="all blocks have one number of query heads",
        widths="vLLM takes any number of neurons; TensorRT-LLM and mlx-lm steps of 256 (prune.round_to)",
    )


def _uniform(model: nn.Module) -> Restriction:
    """Stock transformers: a single ``intermediate_size`` and a single number of heads.

    Which numbers the family's own config and classes take is tried on a model of its sizes without weights.
    """
    mixed = families.why_never_plain(model)
    if mixed:
        raise ConfigError(
            f"prune.runtime: 'uniform' is not for {type(model).__name__}: {mixed}; allowed here: {_instead(model)}"
        )
    step, whole = _plain_heads(model)
    blocks, neurons = families.blocks_of(model), families.family_of(model).sizes[2]
    stays = {}
    if blocks[0].neurons > 1 and not _is_plain(model, {neurons: blocks[0].neurons - 1}):
        reason = f"runtime uniform: the classes of {_type(model)!r} fix the number of neurons"
        stays = {block.ffn: reason for block in blocks}
    return Restriction(
        stays=stays,
        heads=step,
        whole_heads=whole,
        hidden="a plain folder keeps it",
        drops=frozenset(),
        alike=True,
        widths="transformers takes any number",
    )


def _plain_heads(model: nn.Module) -> tuple[int, str]:
    """The step in which key-value heads may go so that stock classes of a family take what is left, or why none may."""
    block, fields = families.blocks_of(model)[0], pretrained.dense_fields(_config(model))
    heads, kv, _ = families.family_of(model).sizes
    if block.whole or block.kv_heads < 2:
        return 1, block.whole and "its heads cannot be told apart"
    derived = isinstance(getattr(type(_config(model)), "head_dim", None), property)

    def fits(count: int) -> bool:
        own = {heads: count * block.ratio} | ({kv: count} if kv else {})
        own |= {} if derived else {"head_dim": block.head_dim}
        try:
            pretrained.build_config(fields | own)
        except ArtifactError:
            return False
        return True

    steps = (n for n in range(1, block.kv_heads) if block.kv_heads % n == 0)
    step = next((n for n in steps if all(map(fits, range(n, block.kv_heads, n)))), 0)
    if not step:
        return 1, f"the config takes no number of heads below {block.query_heads} at this hidden size"
    if not _is_plain(model, {heads: (block.kv_heads - step) * block.ratio}):
        return 1, "transformers' own classes derive a head's size from the hidden size"
    return step, ""


def _is_plain(model: nn.Module, sizes: Mapping[str, int]) -> bool:
    """Whether stock classes take all layers at these sizes, under the config's own names."""
    twin = pretrained.skeleton(pretrained.build_config(pretrained.dense_fields(_config(model))))
    resize(twin, [layer | dict(sizes) for layer in layer_sizes(twin)])
    try:
        plain_form(twin)
    except NotUniform:
        return False
    return True


for _name, _make in {"llama.cpp": _llama_cpp, "vllm": _vllm, "uniform": _uniform}.items():
    RUNTIMES[_name] = replace(RUNTIMES[_name], function=_make)
