"""Tiny language models pruned at random, their folders, and changes to the files in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rlprune
from helpers.lm import tiny_lm, tokens
from rlprune.errors import ArtifactError

REPO = Path(__file__).parent.parent.parent
Made = tuple[Any, rlprune.Plan]  # the pruned model and its plan


def widths_of(space: rlprune.PruningSpace, seed: int, drop: bool = True) -> np.ndarray:
    """Random widths; with ``drop`` some attention and some feed-forward part is gone."""
    generator = np.random.default_rng(seed)
    widths = np.array([generator.integers(1, w + 1) for w in space.widths])
    if drop:
        for kind in ("attention", "ffn"):
            places = [i for i, group in enumerate(space.groups) if group.kind == kind]
            if places:
                widths[generator.choice(places)] = 0
    return widths


def plan_of(space: rlprune.PruningSpace, widths: np.ndarray, seed: int = 0) -> rlprune.Plan:
    """A plan of widths (G,) that keeps random units."""
    generator = np.random.default_rng(seed)
    scores = [generator.random(group.width) for group in space.groups]
    return rlprune.make_plan(space, importance=scores, widths=widths)


def pruned(
    name: str = "llama", seed: int = 0, *, drop: bool = True, hidden: bool = False, **more: Any
) -> Made:
    """A variant of `lm` cut to random widths, and the plan."""
    model = tiny_lm(name, **more)
    space = rlprune.trace(model, tokens(), drop=True, hidden=hidden, verify=False)
    plan = plan_of(space, widths_of(space, seed, drop), seed)
    return rlprune.prune(model, plan), plan


def pruned_folder(path: Path) -> Path:
    """A pruned Llama of several shards, saved at ``path``."""
    return rlprune.save(*pruned(seed=2), path, max_shard_size="30KB")


def logits(model: Any) -> torch.Tensor:
    """What a model says of two random sequences, (2, 10, V)."""
    with torch.no_grad():
        return model(input_ids=tokens(10, 2)).logits


def error_of(action: Callable[[], Any], kind: type[Exception] = ArtifactError) -> str:
    """The one line that an action is refused with."""
    with pytest.raises(kind) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the content of a JSON file in place."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def tokenizer() -> Any:
    """Words w0 to w95 for the ids 0 to 95."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2")
