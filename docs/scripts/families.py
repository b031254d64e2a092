"""The language-model families with tiny random models -> docs/families.md.

    python docs/scripts/families.py             # all of them, about a minute
    python docs/scripts/families.py llama opt   # only print these
    python docs/scripts/families.py --types     # the rows of the variants stay as the page has them

The rows of all causal types come from `docs/family-types.json`, which `family_types.py --all` fills.

What has to hold for "works", on widths and units drawn at random (some parts dropped whole): the output equals
that of the masked dense model in float64, the cost formulas equal torch's FLOP counter, the parameter count and
the bytes of the real cache, and greedy generation gives the same tokens with and without the cache.
"""

from __future__ import annotations

import argparse
import logging
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

import rlprune
from rlprune import masked
from rlprune.language import counted, families, random_plan
from rlprune.report import markdown_table

DOCS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(DOCS.parent / "tests"))
import family_types  # noqa: E402  (next to this file)

from helpers.lm import MIXTURES, VARIANTS, tiny_lm, tokens  # noqa: E402  (the tests' own models)

EXACT, LENGTH, PLANS = 1e-9, 12, 8
# Of what is no causal language model.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", {"intermediate_size": 32}),
    "t5": ("T5ForConditionalGeneration", {"d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 4, "d_kv": 8}),
}  # fmt: skip


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def examine(name: str) -> dict[str, Any]:
    """What one variant shows over several random plans."""
    model: Any = tiny_lm(name, dtype=torch.float64)
    space = rlprune.trace(model, tokens(LENGTH), drop=True)
    worst, changed, costs, same = 0.0, np.inf, True, True
    for seed in range(PLANS):
        plan = random_plan(space, np.random.default_rng(seed))
        slim: Any = rlprune.prune(model, plan)
        ids = tokens(LENGTH, batch=2, seed=seed)
        wanted = logits(masked(model, plan), ids)
        scale = float(wanted.abs().max())
        worst = max(worst, float((logits(slim, ids) - wanted).abs().max()) / scale)
        changed = min(changed, float((logits(model, ids) - wanted).abs().max()) / scale)
        costs &= counted(slim, ids[:1])[1] == space.cost(plan.widths, "macs")
        costs &= sum(p.numel() for p in slim.parameters()) == space.cost(plan.widths, "params")
        with torch.no_grad():
            cache = slim(input_ids=ids[:1, :6], use_cache=True).past_key_values
            options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
            outs = [slim.generate(ids[:, :6], use_cache=use, **options) for use in (True, False)]
        held = 2 * sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values))
        costs &= held == 6 * space.cost(plan.widths, "kv_cache")
        same &= torch.equal(*outs)
    plain = rlprune.trace(model, tokens(LENGTH), verify=False)
    return {
        "class": type(model).__name__, "block": families.blocks_of(model)[0], "worst": worst, "changed": changed,
        "costs": costs, "same": same, "whole": all(g.kind != "attention" for g in plain.groups),
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    }  # fmt: skip


def works(facts: dict[str, Any]) -> bool:
    return bool(facts["worst"] <= EXACT < facts["changed"] and facts["costs"] and facts["same"])


def row(name: str, facts: dict[str, Any]) -> list[str]:
    """One line of the table."""
    block = facts["block"]
    heads = f"{block.query_heads} / {block.kv_heads}"
    units = f"whole: {block.whole}" if facts["whole"] else "key-value heads"
    layers = [n.rsplit(".", 1)[-1] for n in (*block.qkv, block.out, *block.up, block.down) if n]
    if block.experts is not None:
        layers += [block.experts.router.rsplit(".", 1)[-1], block.experts.module.rsplit(".", 1)[-1]]
    return [
        name, facts["class"], "works" if works(facts) else "WRONG", heads, units, ", ".join(layers),
        "yes" if facts["tied"] else "no", f"{facts['worst']:.0e}" if facts["worst"] else "0",
        "yes" if facts["costs"] else "NO", "yes" if facts["same"] else "NO",
    ]  # fmt: skip


def refusal(name: str) -> str:
    """The line that a model which is not supported gets."""
    kind, settings = REFUSED[name]
    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**(common | settings)))
    try:
        rlprune.trace(model, tokens(LENGTH))
    except rlprune.GraphError as error:
        return str(error)
    return "NOT REFUSED"


HEADER = ["variant", "class", "result", "query / key-value heads", "attention's units", "layers cut", "tied",
          "largest difference", "costs equal", "same tokens with and without cache"]  # fmt: skip


TYPES_HEADER = ["model_type", "class", "parts found by", "blocks with attention / feed-forward / all", "units cut",
                "dropped whole only", "what stays whole, and why", "largest difference",
                "same tokens with and without cache"]  # fmt: skip
_UNITS = {"attention": "key-value heads", "ffn": "neurons", "experts": "experts"}
_WRONG = "largest difference {worst:.0e}; same tokens with and without cache: {same}; loads: {loads}"
_RESULTS = ("works", "refused", "not tried", "WRONG")


def type_row(kind: str, facts: dict[str, Any]) -> list[str]:
    """One line of the table of causal types, of what `family_types.look` found."""
    attention, ffn = facts["blocks"][1:]
    units = [_UNITS.get(name, name) for name in facts["kinds"]]
    return [
        kind, facts["class"], "an adapter" if facts["known"] else "structure",
        f"{attention} / {ffn} / {facts['blocks'][0]}",
        ", ".join(units) or "-", ", ".join(facts["whole"]) or "-", "; ".join(facts["reasons"]) or "-",
        f"{facts['worst']:.0e}" if facts["worst"] else "0",
        "yes" if facts["own_cache"] else "no, nor does the dense model",
    ]  # fmt: skip


def by_result(types: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{result: {type: what was found}}."""
    return {r: {kind: facts for kind, facts in types.items() if facts["result"] == r} for r in _RESULTS}


def types_text(types: dict[str, dict[str, Any]]) -> str:
    """The page's part on all causal types of transformers."""
    parts = by_result(types)
    good, wrong = parts["works"].values(), _reasons(parts["WRONG"])
    return TYPES.format(
        all=len(types), of=len(family_types.CAUSAL), exact=family_types.EXACT, plans=family_types.PLANS,
        works=len(good), known=sum(f["known"] for f in good), found=sum(not f["known"] for f in good),
        heads=sum("attention" in f["kinds"] for f in good),
        refused=len(parts["refused"]), untried=len(parts["not tried"]), wrong=len(parts["WRONG"]),
        table=markdown_table(TYPES_HEADER, [type_row(k, f) for k, f in parts["works"].items()]),
        refusals=markdown_table(["model_type", "in the words of the error"], _reasons(parts["refused"])),
        wrong_rows=markdown_table(["model_type", "what is wrong"], wrong) if wrong else "None.",
        untried_rows=markdown_table(["model_type", "why"], _reasons(parts["not tried"])),
    )  # fmt: skip


def _wrong(facts: dict[str, Any]) -> str:
    return _WRONG.format(worst=facts["worst"], same=facts["same"], loads=facts["loads"])


def _reasons(types: dict[str, dict[str, Any]]) -> list[list[str]]:
    return [[kind, (facts.get("why") or _wrong(facts)).replace("|", "\\|")] for kind, facts in types.items()]


def rows_of_the_page() -> list[list[str]]:
    """The variants' rows as they were written last."""
    page = (DOCS / "families.md").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(page) if line.startswith("| variant "))
    last = page.index("", first)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in page[first + 2 : last]]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="only these, printed and not written")
    parser.add_argument("--types", action="store_true", help="keep the page's rows of the variants")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    lines, good = [], 0
    for name in () if arguments.types else arguments.names or VARIANTS | MIXTURES:
        facts = examine(name)
        good += works(facts)
        lines.append(row(name, facts))
        print("  ".join(lines[-1]), flush=True)
    if arguments.names:
        return 0
    if arguments.types:
        lines = rows_of_the_page()
        good = sum(line[2] == "works" for line in lines)
    text = PAGE.format(
        table=markdown_table(HEADER, lines), good=good, all=len(lines), exact=EXACT, plans=PLANS,
        kinds=len({kind for kind, _ in (VARIANTS | MIXTURES).values()}),
        types=", ".join(f"`{n}`" for n in families.FAMILIES),
        refused=markdown_table(["model_type", "in the words of the error"], [[n, refusal(n)] for n in REFUSED]),
        every=types_text(family_types.stored_types()),
        torch=torch.__version__, transformers=transformers.__version__, python=platform.python_version(),
    )  # fmt: skip
    (DOCS / "families.md").write_text(text, encoding="utf-8")
    return 0


PAGE = """# Language-model families

Written by `python docs/scripts/families.py` (torch {torch}, transformers {transformers}, Python {python}, CPU,
random weights, float64). {good} of {all} variants of {kinds} model types work.

"works" means, for {plans} plans of random units and widths, parts dropped whole among them: the output equals
that of the masked dense model to {exact:g} of the largest output; the formulas for `macs`, `params` and
`kv_cache` equal torch's FLOP counter, the parameter count and the bytes of the real cache; and greedy generation
gives the same tokens with and without the cache. The tests hold every variant to the same contract.

A feed-forward unit is one neuron. An attention unit is one key-value head with the query heads that read it and
their columns of the output layer. Where heads cannot be told apart, the attention is one unit: it stays, or with
`prune.drop: true` it may be dropped whole.

{table}

In mixtures of experts a unit is a neuron of every expert, or a whole expert with its row of the router; the masked
dense model's router gives the removed experts a score of minus infinity
([language-models.md](language-models.md#mixtures-of-experts)).

A difference of exactly 0 is a rounding too: these families' last norm computes in float32 whatever the model's
format, so that differences of 1e-16 before it vanish.

Adapters exist for {types}; the parts of other types are found by shape (below).
Each model passes the same proof when it is traced: random units against the masked
dense model, on a narrow skeleton of its config where the model is large.

The hidden size as one group (`prune.hidden: true`) is not exact by nature: every norm crosses it.

Not causal language models, so not supported:

{refused}

{every}"""
TYPES = """## All causal types of transformers

{all} of the {of} causal types of this transformers were looked at, once each, with a tiny random model made from
its own configuration class ({plans} plans each, float64, `python docs/scripts/family_types.py --all`):
**{works} work**,
{refused} are refused, {untried} were not tried, {wrong} came out wrong. Of those that work {known} have an adapter
and the parts of {found} are found by structure; {heads} are cut by key-value heads, in the others the attention is
dropped whole or stays.

"works" means here: the output equals that of the masked dense model to {exact:g} of the largest output (some of
these families compute steps in float32); greedy generation gives the same tokens with and without the cache, and
logits within 1% of the largest, where the dense model's does; and the saved folder loads with the same outputs, to the
same bound. The real sizes of a type may have parts
that its tiny model has not: tracing proves every model anew.

{table}

### Refused

{refusals}

### Wrong

Of these tracing lets plans through that do not hold what is said above: do not use them.

{wrong_rows}

### Not tried

No tiny model could be made of these, or it took too long: nothing is said of them.

{untried_rows}
"""

if __name__ == "__main__":
    sys.exit(main())
