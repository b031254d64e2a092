"""Every causal type of the installed transformers with a tiny random model: what of it can be cut, and how exactly.

    python docs/scripts/family_types.py arcee lfm2   # print what is found of these types
    python docs/scripts/family_types.py --all        # every type -> docs/family-types.json

`docs/scripts/families.py` writes the page. Types that the file holds for this version of transformers are not looked
at again; `--again` names some that are.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import select
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

import rlprune
from rlprune import masked
from rlprune.language import families, generates_alike, random_plan

DOCS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(DOCS.parent / "tests"))
from helpers.lm_types import VOCABULARY, type_config, type_model  # noqa: E402  (the tests' own models)
from helpers.whole_models import WHOLE, whole_model  # noqa: E402

CACHE = DOCS / "family-types.json"
SECONDS, START_SECONDS, MEMORY, LARGEST = 60, 600, 12 << 30, 60_000_000
PLANS, LENGTH = 4, 12
# float32 steps inside of some families' mixers are rounded; the largest output is the scale.
EXACT = 1e-6


class TooLarge(Exception):
    """The configuration class does not follow the sizes given here."""


def tiny(kind: str) -> Any:
    """A tiny random model of the type in float64; what cannot be made raises anything."""
    if kind in WHOLE:
        return whole_model(kind, torch.float64)
    with torch.device("meta"):
        outline = transformers.AutoModelForCausalLM.from_config(type_config(kind))
    size = sum(p.numel() for p in outline.parameters())
    if size > LARGEST:
        raise TooLarge(f"its smallest configuration made here has {size:,} parameters")
    return type_model(kind, torch.float64)


def look(kind: str) -> dict[str, Any]:
    """What is cut of one type, and how exactly; the line of the refusal where nothing is."""
    try:
        model = tiny(kind)
    except TooLarge as error:
        return {"result": "not tried", "why": str(error)}
    except Exception as error:  # types of every kind
        line = (str(error).strip().splitlines() or [""])[0]
        return {
            "result": "not tried",
            "why": f"no tiny model of it could be made ({type(error).__name__}: {line[:90]})",
        }
    ids = torch.arange(2, 2 + LENGTH)[None] % VOCABULARY
    known = model.config.model_type in families.FAMILIES
    try:
        space = rlprune.trace(model, ids, drop=True)
    except rlprune.RlpruneError as error:
        return {"result": "refused", "why": str(error)}
    except Exception as error:
        return {"result": "WRONG", "why": f"tracing fails with {type(error).__name__}: {error}"}
    try:
        return {"class": type(model).__name__, "known": known, **_cut(model, space, ids)}
    except Exception as error:  # of the model's own code too
        return {"result": "WRONG", "why": f"fails after tracing with {type(error).__name__}: {error}"}


def _cut(model: Any, space: Any, ids: torch.Tensor) -> dict[str, Any]:
    worst, same, changed = 0.0, True, np.inf
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
        own = generates_alike(model, ids[:, :6])
        for seed in range(PLANS):
            plan = random_plan(space, np.random.default_rng(seed))
            slim: Any = rlprune.prune(model, plan)
            wanted = masked(model, plan)(input_ids=ids, use_cache=False).logits
            scale = float(wanted.abs().max())
            worst = max(
                worst, float((slim(input_ids=ids, use_cache=False).logits - wanted).abs().max()) / scale
            )
            if not np.array_equal(plan.widths, space.widths):  # where heads cannot be told apart all may stay
                changed = min(changed, float((dense - wanted).abs().max()) / scale)
            same &= generates_alike(slim, ids[:, :6]) or not own
        with tempfile.TemporaryDirectory() as folder:
            rlprune.save(slim, plan, Path(folder) / "pruned")
            loaded: Any = rlprune.load(Path(folder) / "pruned")
            if hasattr(model.config, "_experts_implementation"):
                loaded.config._experts_implementation = model.config._experts_implementation
            found = loaded(input_ids=ids, use_cache=False).logits
            back = float((found - slim(input_ids=ids, use_cache=False).logits).abs().max()) <= EXACT * scale
    good = worst <= EXACT < changed < np.inf and same and back
    kinds = {group.kind for group in space.groups if group.width > 1}
    whole = {group.kind for group in space.groups} - kinds
    family = families.family_of(model)
    reasons = [why for _, why in family.kept] or [b.whole for b in families.blocks_of(model) if b.whole][:1]
    blocks = families.blocks_of(model)
    return {
        "result": "works" if good else "WRONG", "kinds": sorted(kinds), "whole": sorted(whole), "worst": worst,
        "same": same, "own_cache": own, "loads": back, "reasons": reasons,
        "blocks": [len(blocks), sum(bool(b.attention) for b in blocks), sum(bool(b.ffn) for b in blocks)],
    }  # fmt: skip


class Looker:
    """A process that looks at one type after the other; one that takes too long or dies is replaced."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, kind: str) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-W", "ignore", __file__, "--serve"]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
            )
            self._answer(START_SECONDS)
        assert self._process.stdin is not None
        self._process.stdin.write(kind + "\n")
        self._process.stdin.flush()
        line = self._answer(SECONDS)
        if line is None:
            self._process.kill()
            self._process.wait()
            return {"result": "not tried", "why": f"took more than {SECONDS} s"}
        if not line:
            return {"result": "not tried", "why": f"its process ended with {self._process.wait()}"}
        found: dict[str, Any] = json.loads(line)
        return found

    def _answer(self, seconds: float) -> str | None:
        """The next line; None where none came in time, "" where the process ended."""
        assert self._process is not None and self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return self._process.stdout.readline() if ready else None


def serve() -> None:
    """Read types, write what was found, a line each."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answers, sys.stdout = sys.stdout, sys.stderr  # models print
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(look(line.strip())), file=answers, flush=True)


def stored_types() -> dict[str, dict[str, Any]]:
    """{type: what was found} in the file, where it is of this transformers; else nothing."""
    if not CACHE.exists():
        return {}
    content = json.loads(CACHE.read_text(encoding="utf-8"))
    return dict(content["types"]) if content["transformers"] == transformers.__version__ else {}


def all_types(again: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """{type: what was found} of every causal type; what the file holds of this transformers is not done again."""
    found = {kind: facts for kind, facts in stored_types().items() if kind not in again}
    looker = Looker()
    for kind in sorted(CAUSAL):
        if kind not in found:
            start = time.perf_counter()
            found[kind] = looker(kind)
            print(f"{kind}: {found[kind]['result']} ({time.perf_counter() - start:.1f} s)", flush=True)
            content = {"transformers": transformers.__version__, "types": found}
            CACHE.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return found


def quiet() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="only these, printed and not kept")
    parser.add_argument("--all", action="store_true", help="every causal type, kept in the file")
    parser.add_argument(
        "--again", nargs="+", default=[], metavar="TYPE", help="with --all: look at these anew"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet()
    if arguments.serve:
        serve()
    elif arguments.all:
        all_types(arguments.again)
    else:
        looker = Looker()
        for name in arguments.names:
            print(name, json.dumps(looker(name)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
