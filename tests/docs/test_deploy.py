"""docs/deploy.md as the text stands: a folder is loaded alone, and pruned again."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import rlprune
from helpers.pages import blocks
from tests.helpers.own_models import Tagger

PAGE = Path(__file__).parent.parent.parent / "docs" / "deploy.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dense, example = Tagger().eval(), torch.rand(1, 3, 8, 8)
    space = rlprune.trace(dense, example)
    scores = [np.arange(group.width) for group in space.groups]
    first = rlprune.make_plan(space, importance=scores, widths=space.widths - 2)
    rlprune.save(rlprune.prune(dense, first), first, "once")
    scores, widths = [s[2:] for s in scores], first.widths - 1
    alone, again = blocks(PAGE, "python")
    names = {"rlprune": rlprune, "dense": dense, "example": example, "scores": scores, "widths": widths}
    exec(again, names)
    monkeypatch.syspath_prepend(tmp_path / "twice")
    own = alone.replace("model = load()  ", "# model = load()")
    exec(own, found := {"MyModel": Tagger})
    assert torch.equal(found["model"](example), rlprune.load("twice", base=dense)(example))
    assert rlprune.load_plan("twice", space).widths.tolist() == (space.widths - 3).tolist()
    error = importlib.import_module("load_pruned").ArtifactError
    with pytest.raises(error, match="pass base=model"):
        exec(alone, {"MyModel": Tagger})
    del sys.modules["load_pruned"]
