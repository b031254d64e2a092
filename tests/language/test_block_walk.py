"""Statistics block by block: the same numbers as in one pass, with one block's in memory; factors on disk."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import rlprune
from helpers.language_workload import Sentences, evaluator_of, plan_of, plans, workload_of
from helpers.lm import VARIANTS, tiny_lm
from rlprune.config.training import RecoveryConfig
from rlprune.errors import ArtifactError
from rlprune.evaluation.evaluator import Evaluator
from rlprune.evaluation.recovery import Recovery
from rlprune.language.calibration import grams, walk
from rlprune.recovery.shelf import DiskShelf


def all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain pass, with every layer's matrix in memory at the end."""
    monkeypatch.setattr(walk, "_paths", lambda model: [])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_gives_the_bits_of_a_plain_pass(name, monkeypatch):
    workload = Sentences(tiny_lm(name))
    space = rlprune.trace(workload.model, workload.example_inputs)
    assert len(list(walk.parts(workload.model, workload.batches("calibration")))) == 3
    found = grams.collect(workload.model, space, workload.batches("calibration"))
    all_at_once(monkeypatch)
    plain = grams.collect(workload.model, space, workload.batches("calibration"))
    assert found.names == plain.names == sorted(c.module for c in grams.unit_consumers(space))
    for module in found.names:
        assert torch.equal(found[module].product, plain[module].product)
        assert torch.equal(found[module].mean, plain[module].mean)
        assert found[module].count == plain[module].count


@pytest.mark.parametrize("importance", ["obs", "obs_fisher", "wanda_sp"])
def test_a_prepared_evaluator_is_the_one_of_a_plain_pass(importance, monkeypatch):
    def candidates() -> list[object]:
        evaluator = evaluator_of(
            workload_of(tiny_lm("llama-biases")), importance=importance, steps=("reconstruct",)
        )
        some = [evaluator.evaluate(w) for w in plans(evaluator, 4)]
        return [(c.score, c.loss, c.widths) for c in some]

    found = candidates()
    all_at_once(monkeypatch)
    assert found == candidates()


def test_blocks_that_hand_on_more_than_the_stream_are_run_at_once():
    model = tiny_lm("llama")
    parts = list(walk.parts(model, [(torch.zeros(1, 8, dtype=torch.long), None)]))
    assert [part.path for part in parts] == [f"model.layers.{i}" for i in range(3)]
    left: list[torch.Tensor] = []
    forward = model.model.layers[1].forward

    def forgetful(hidden_states, *args, **kwargs):
        left.append(hidden_states)
        return forward(hidden_states + len(left), *args, **kwargs)

    model.model.layers[1].forward = forgetful
    parts = list(walk.parts(model, [(torch.zeros(1, 8, dtype=torch.long), None)]))
    assert [part.path for part in parts] == [""]
    assert model.model.layers[1].forward is forgetful and "forward" not in vars(model.model.layers[0])


class TestSpill:
    def settings(self, folder: Path | None) -> RecoveryConfig:
        return RecoveryConfig(steps=("reconstruct",), spill=None if folder is None else str(folder))

    def test_factors_on_disk_give_the_same_models_and_take_no_memory(self, tmp_path):
        workload = workload_of(tiny_lm("llama"))
        built, held = [], []
        for folder in (None, tmp_path / "spill"):
            recovery = self.settings(folder)
            evaluator = Evaluator(workload, importance="obs", recovery=recovery, metric="params")
            some = plans(evaluator, 2)
            other = plan_of(evaluator.space, seed=3)  # no prefix of the ranking: the whole factor is read
            slim = rlprune.prune(workload.model, other)
            evaluator.recovery(slim, other)
            models = [*(evaluator.build(w) for w in some), slim]
            built.append([m.state_dict() for m in models])
            held.append(evaluator.recovery.nbytes)
        for ours, theirs in zip(*built, strict=True):
            assert all(torch.equal(ours[k], theirs[k]) for k in ours)
        assert held[0] > 0 and held[1] == 0
        assert list((tmp_path / "spill").iterdir()) == []

    def test_a_shelf_travels_to_another_process(self, tmp_path):
        shelf = DiskShelf(tmp_path)
        matrices = [torch.randn(5, 7), torch.randn(3, 2, dtype=torch.float64), torch.zeros(0, 4)]
        places = [shelf.put(m) for m in matrices]
        again = pickle.loads(pickle.dumps(shelf))
        for place, matrix in zip(places, matrices, strict=True):
            for count in range(len(matrix) + 1):
                assert torch.equal(shelf.rows(place, count), matrix[:count])
                assert torch.equal(again.rows(place, count), matrix[:count])
        assert shelf.nbytes == 0

    @pytest.mark.skipif(sys.platform == "win32", reason="signals")
    def test_a_killed_process_leaves_no_file(self, tmp_path):
        code = (
            "import os, signal, sys, torch; from rlprune.recovery.shelf import DiskShelf; "
            "s = DiskShelf(sys.argv[1]); s.put(torch.zeros(9, 9)); os.kill(os.getpid(), signal.SIGKILL)"
        )
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ArtifactError, match="file/spill: cannot be written"):
            workload = workload_of(tiny_lm("llama"))
            space = rlprune.trace(workload.model, workload.example_inputs)
            Recovery(workload, space, self.settings(tmp_path / "file" / "spill"))


def test_the_ranking_that_the_recovery_gets_decides():
    """Factors of another ranking than the importance's are made anew."""
    workload = workload_of(tiny_lm("llama"))
    space = rlprune.trace(workload.model, workload.example_inputs)
    settings = RecoveryConfig(steps=("reconstruct",))
    from rlprune.evaluation.importance import compute

    known = workload.adapter.calibration(workload, space, workload.model, recovery=settings)
    ranked = compute("obs", workload, space, calibration=known)
    other = [np.arange(g.width, dtype=float) for g in space.groups]
    plan = rlprune.make_plan(space, importance=other, widths=np.maximum(space.widths // 2, 1))
    found, plain = (rlprune.prune(workload.model, plan) for _ in range(2))
    Recovery(workload, space, settings, importance=other, calibration=known)(found, plan)
    Recovery(workload, space, settings, importance=other)(plain, plan)
    assert not np.array_equal(ranked[1], other[1])
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in found.state_dict().items())
