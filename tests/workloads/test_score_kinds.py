"""Registered scores: one number a sample, from the outputs of a batch, for images, text and tasks of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import rlprune
from helpers.language_workload import Sentences, workload_of
from helpers.lm import tiny_lm
from helpers.nets import Residual
from helpers.registries import forgotten
from helpers.workloads import Images
from rlprune.config.config import ScoreConfig
from rlprune.errors import ConfigError
from rlprune.evaluation.evaluator import Evaluator


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with forgotten():
        yield


def other_net() -> torch.nn.Module:
    torch.manual_seed(5)
    return Residual().eval()


def test_the_shipped_scores_written_as_functions_give_the_same_numbers() -> None:
    @rlprune.score_kind("-KL")
    def my_kl(outputs: Any, targets: Any, dense: Any) -> Any:
        logs, ours = F.log_softmax(dense, -1), F.log_softmax(outputs, -1)
        return -(logs.exp() * (logs - ours)).sum(-1)

    @rlprune.score_kind("-loss")
    def my_loss(outputs: Any, targets: Any) -> Any:
        return -F.cross_entropy(outputs, targets, reduction="none")

    workload, model = Images(Residual().eval()), other_net()
    kl, mine = workload.judge("kl")(model), workload.judge("my_kl")(model)
    assert torch.allclose(mine.scores, kl.scores, rtol=1e-6) and len(mine.scores) == mine.count
    assert (mine.loss, mine.metric) == (kl.loss, kl.metric)
    loss = workload.judge("my_loss")(model)
    assert float(loss.scores.mean()) == pytest.approx(-loss.loss)
    whole, part = workload.judge("my_kl"), workload.judge("my_kl", 5)
    assert torch.equal(part(model).scores, whole(model, 0, 5).scores), "a prefix is scored as in the whole"


def test_tokens_are_scored_by_log_probabilities() -> None:
    @rlprune.score_kind("-loss of a sequence", wing="language")
    def token_loss(logs: Any, targets: Any) -> Any:
        assert logs.shape[:2] == targets.shape
        return logs.gather(2, targets[:, :, None])[:, :, 0].mean(1)

    for workload in (workload_of(tiny_lm()), Plain(tiny_lm())):
        model = tiny_lm(seed=3)
        mine, theirs = workload.judge("token_loss")(model), workload.judge("loss")(model)
        assert torch.allclose(mine.scores, theirs.scores, rtol=1e-5)
        assert (mine.loss, mine.metric, mine.count) == (theirs.loss, theirs.metric, theirs.count)


class Plain(Sentences):
    """Sequences whose loss is the adapter's."""

    loss = rlprune.Workload.loss  # type: ignore[assignment]


def test_a_search_uses_it() -> None:
    rlprune.score_kind("minus the outputs' size", name="small")(lambda outputs, targets: -outputs.norm(dim=1))
    evaluator = Evaluator(Images(Residual().eval()), importance="l2", score=ScoreConfig(kind="small"))
    found = evaluator.evaluate(evaluator.space.widths // 2)
    assert found.score < 0 and evaluator.logit_cache() is None, "logits are modelled for kl only"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda o, t: o,
            r"score_kind 'odd': must return a tensor of shape \(\d+,\), one score a sample, got",
        ),
        (lambda o, t: 1.0, r"one score a sample, got float"),
        (lambda o, t: 1 / 0, "score_kind 'odd': ZeroDivisionError"),
    ],
)
def test_what_is_no_score_is_named(function: Any, message: str) -> None:
    rlprune.score_kind("odd", name="odd")(function)
    with pytest.raises(ConfigError, match=message):
        Images(Residual().eval()).judge("odd")(other_net())


def test_a_score_of_another_wing_is_refused() -> None:
    rlprune.score_kind("text", name="texty", wing="language")(lambda o, t: o)
    with pytest.raises(ConfigError, match="'texty' is for language models only, this is a vision model"):
        Images(Residual().eval()).judge("texty")
