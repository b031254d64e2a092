"""`prune.importance: auto`: which importance it is for a model, and that files say its name."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

import rlprune
from helpers.language_workload import evaluator_of, workload_of
from helpers.lm import tiny_lm
from helpers.small import SMALL_RUN, without
from helpers.tasks import TASKS, Made, labelled, made
from helpers.workloads import Noise
from rlprune import Evaluator
from rlprune.agents.ppo.policy import PortablePolicy, load_policy
from rlprune.cli.main import main
from rlprune.config import load_config
from rlprune.config.config import AUTO, ScoreConfig, shipped_configs
from rlprune.config.training import RecoveryConfig
from rlprune.errors import ConfigError
from rlprune.evaluation.importance import compute
from rlprune.experiments.usage import check_usage
from rlprune.importance.importance import IMPORTANCES
from rlprune.language.footprints import footprint
from rlprune.vision import calibration
from rlprune.vision.calibration import VisionCalibration
from rlprune.workloads.adapter import DefaultImportance

BY_TARGETS = {"detection"}
NO_DIVERGENCE = "the task does not say what small changes of its outputs cost"


def ranking(workload: Any, **arguments: Any) -> DefaultImportance | None:
    return Evaluator(workload, recovery=RecoveryConfig(steps=("none",)), **arguments).ranking


class TestWhichOne:
    @pytest.mark.parametrize("kind", TASKS)
    def test_every_task_has_one_that_prepares(self, kind: str) -> None:
        evaluator = Evaluator(made(kind))
        expected = "taylor" if kind in BY_TARGETS else "obs_fisher"
        assert evaluator.ranking is not None and evaluator.ranking.name == expected
        assert evaluator.ranking.name in IMPORTANCES and (evaluator.ranking.reason is None) == (
            expected == "obs_fisher"
        )
        named = Evaluator(made(kind), importance=expected)
        for ours, theirs in zip(evaluator.importance, named.importance, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert evaluator.ranks_by_divergence == (expected == "obs_fisher")
        assert evaluator.plan(evaluator.space.widths).origin == {"importance": expected}

    def test_a_loss_of_the_users_own_on_outputs_that_mean_nothing_known(self) -> None:
        class Mine(Made):
            def loss(self, outputs: Any, targets: Any) -> Tensor:
                return (outputs["logits"].mean() - targets.float().mean()) ** 2

        data = TASKS["two inputs"]()
        workload = Mine(data.model, data.example_inputs, lambda g, n: data.parts["train"], task="own")
        score = ScoreConfig(kind="loss")
        assert ranking(workload, score=score) == DefaultImportance("taylor", NO_DIVERGENCE)
        named = ranking(workload, score=score, importance="obs_fisher")
        assert named == DefaultImportance("obs_fisher")

    def test_a_layer_that_is_not_called_as_one_keeps_its_group_from_being_measured(self) -> None:
        torch.manual_seed(0)
        model = VisionTransformer(16, 8, 1, 2, 16, 24, num_classes=4).eval()
        data = labelled(lambda x, g: torch.randint(4, (len(x),), generator=g))
        workload = made("classification")
        workload.model, workload.example_inputs = model, torch.zeros(1, 3, 16, 16)
        workload.parts = {
            name: (torch.nn.functional.interpolate(x, 16), y)
            for name, (x, y) in ((s, data(torch.Generator().manual_seed(1), 12)) for s in workload.parts)
        }
        found = ranking(workload)
        assert found is not None and found.name == "taylor"
        assert found.reason == (
            "no gradient comes to what reads the group 'encoder.layers.encoder_layer_0.self_attention'"
        )

    def test_matrices_that_are_too_large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(calibration, "MOST_BYTES", 100)
        found = ranking(made("classification"))
        assert found is not None and found.name == "taylor"
        assert str(found) == "taylor: second moments of gradients would take 0.0 GB"

    def test_no_calibration_data(self) -> None:
        workload = made("classification")
        space = rlprune.trace(workload.model, workload.example_inputs)
        workload.parts["calibration"] = (torch.zeros(0, 3, 8, 8), torch.zeros(0))
        workload.size_of_split = 0
        found = workload.adapter.default_importance(VisionCalibration(workload, space, workload.model))
        assert found == DefaultImportance("taylor", "there are no calibration samples")

    def test_language_models(self) -> None:
        workload = workload_of(tiny_lm("llama"))
        evaluator = evaluator_of(workload, importance=AUTO)
        assert evaluator.ranking == DefaultImportance("obs_fisher") and evaluator.ranks_by_divergence
        told = footprint(
            workload.model, evaluator.space, load_config("tiny_llama", ["prune.importance=auto"])
        )
        assert told == footprint(workload.model, evaluator.space, load_config("tiny_llama"))
        assert told.prepare.keys() | {"output moments"} == told.prepare.keys()

    def test_a_name_or_scores_are_taken_as_they_are(self) -> None:
        workload = made("classification")
        assert ranking(workload, importance="l1") == DefaultImportance("l1")
        space = rlprune.trace(workload.model, workload.example_inputs)
        scores = [np.arange(g.units) for g in space.groups]
        evaluator = Evaluator(workload, space, importance=scores)
        assert evaluator.ranking is None and evaluator.plan(space.widths).origin == {}
        with pytest.raises(ConfigError, match=r"unknown 'autto' \(did you mean 'auto'\?\); allowed: auto, "):
            ranking(workload, importance="autto")

    def test_unit_scores_by_name_alone(self) -> None:
        workload = made("regression")
        space = rlprune.trace(workload.model, workload.example_inputs)
        for one, other in zip(
            compute(AUTO, workload, space), compute("obs_fisher", workload, space), strict=True
        ):
            np.testing.assert_array_equal(one, other)

    def test_its_name_is_not_free(self) -> None:
        def auto(context: Any) -> list[Any]:
            return []

        for register in (rlprune.importance.register, rlprune.rule):
            with pytest.raises(ConfigError, match="the name 'auto' is taken"):
                register("takes the name of a setting")(auto)


def test_inputs_that_hardly_vary_about_a_large_mean_are_ranked() -> None:
    """Rounding leaves a covariance that no factor exists of."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(6, 16), nn.Linear(16, 4)
            with torch.no_grad():
                self.first.weight.mul_(1e-3)
                self.first.bias.uniform_(300.0, 500.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(x))

    class Rows(Noise):
        def __init__(self) -> None:
            torch.manual_seed(1)
            self.model = Shifted().eval()
            self.images, self.labels = torch.randn(64, 6), torch.randint(4, (64,))
            self.example_inputs = self.images[:1]

    evaluator = Evaluator(Rows(), recovery=RecoveryConfig(steps=("none",)))
    assert evaluator.ranking == DefaultImportance("obs_fisher")
    assert sorted(evaluator.importance[0]) == list(range(16))


def test_settings_and_configs() -> None:
    assert load_config("digits").prune.importance == AUTO
    check_usage(load_config("digits", ["prune.importance=auto"]), "train")
    published = [name for name in shipped_configs() if name.startswith("published/")]
    assert len(published) > 10
    assert not [name for name in published if load_config(name).prune.importance == AUTO]


def texts(value: Any) -> list[str]:
    """All texts in a JSON document, keys apart."""
    if isinstance(value, dict):
        return [text for part in value.values() for text in texts(part)]
    if isinstance(value, list):
        return [text for part in value for text in texts(part)]
    return [value] if isinstance(value, str) else []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("default") / "run"
    assert (
        main(
            [
                "train",
                "digits",
                "--out",
                str(folder),
                *without(SMALL_RUN),
                "--set",
                "search.baselines=[]",
                "finish.epochs=0",
            ]
        )
        == 0
    )
    return folder


class TestWholeRuns:
    def test_log_results_plan_and_policy_name_it(self, run: Path) -> None:
        assert "cifar_resnet20 on digits: units ranked by obs_fisher" in (run / "run.log").read_text()
        results = json.loads((run / "results.json").read_text())
        assert results["importance"] == {"name": "obs_fisher", "reason": None}
        assert {row.get("importance") for row in results["rows"]} == {None, "obs_fisher"}
        assert "importance: name" in (run / "report.html").read_text()
        assert load_policy(run / "policy").importance == "obs_fisher"
        for file in ("results.json", "pruned/plan.json", "policy/policy.json"):
            document = json.loads((run / file).read_text())
            assert "auto" not in texts(document), file
        origin = json.loads((run / "pruned" / "plan.json").read_text())["origin"]
        assert origin["importance"] == "obs_fisher"

    def test_a_policy_brings_its_ranking(
        self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sets = without(SMALL_RUN, "search.", "finish.")
        for name, more in (("obs_fisher", []), ("l1", ["--set", "prune.importance=l1"])):
            out = tmp_path / name
            words = ["apply", str(run), "digits", "--budget", "60%", "--out", str(out)]
            assert main([*words, *sets, *more]) == 0
            told = capsys.readouterr().err
            origin = json.loads((out / "plan.json").read_text())["origin"]
            assert origin["importance"] == name
            assert ("units ranked by obs_fisher, as in the policy's training" in told) == (not more)

    def test_policies_that_do_not_say_it(self, run: Path) -> None:
        known = load_policy(run / "policy")
        meta = {key: value for key, value in known.meta.items() if key != "importance"}
        assert (
            PortablePolicy(known.network, meta).importance == "obs_fisher"
        )  # its columns are measured with it
        assert PortablePolicy(known.network, meta | {"feature_version": 1}).importance == "taylor"

    @pytest.mark.parametrize("words", [[], ["--stages", "2"]], ids=["rule", "stages"])
    def test_rounds_and_rules(self, words: list[str], tmp_path: Path) -> None:
        sets = without(SMALL_RUN, "search.", "finish.")
        given = ["prune", "digits", "--rule", "uniform", "--budget", "60%", "--out", str(tmp_path / "out")]
        assert main([*given, *words, *sets]) == 0
        document = json.loads((tmp_path / "out" / "plan.json").read_text())
        assert document["origin"]["importance"] == "obs_fisher" and "auto" not in texts(document)


@cache
def prepared(kind: str, importance: str) -> Evaluator:
    return Evaluator(made(kind), importance=importance)


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from([AUTO, "l1"]),
    kind=st.sampled_from(["regression", "detection"]),
    share=st.floats(0.3, 1.0),
)
def test_no_plan_says_auto(name: str, kind: str, share: float) -> None:
    evaluator = prepared(kind, name)
    widths = np.maximum(1, (evaluator.space.widths * share).astype(int))
    origin = evaluator.plan(widths, {"method": "uniform"}).origin
    assert origin["importance"] in IMPORTANCES and origin["importance"] != AUTO
    assert name in (AUTO, origin["importance"])
    assert (
        evaluator.staged_plan((evaluator.space.widths, widths)).origin["importance"] == origin["importance"]
    )
