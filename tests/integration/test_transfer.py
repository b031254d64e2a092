"""A policy of several checkpoints on another one, by the commands as a person types them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlprune.agents.ppo.policy import load_policy
from rlprune.cli import main as cli

MODEL = [
    "--set",
    "model.arguments={width: 4}",
    "model.train.epochs=1",
    "data.train=64",
    "data.calibration=32",
    "data.validation=48",
    "data.test=32",
    "threads=1",
    "budget.target=0.4",
]
REFINED = [*MODEL, "search.batch=10", "search.ppo.surrogate_steps=64", "search.ppo.surrogate_envs=8"]
SETS = [
    *REFINED, "search.evaluations=10", "finish.epochs=0", "finish.candidates=1", "finish.rules=false",
]  # fmt: skip


def done(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    code = cli.main(list(words))
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


@pytest.mark.slow
@pytest.mark.filterwarnings("default:the policy was trained on another architecture")
def test_apply_refines_the_plan_of_several_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlprune.agents.ppo.behaviour_cloning._COMMON_STEPS", 50)
    # Twelve groups, and few builds for them: what matters here is that all parts fit together.
    monkeypatch.setattr("rlprune.agents.ppo.transfer.PROBES", 1)
    done(capsys, "train", "digits", *SETS, "search.model_seeds=[1, 2]", "--out", "run")
    policy = load_policy("run/policy")
    assert policy.meta["base_rule"] == "uniform", "what several checkpoints have in common is no rule's plan"
    known = policy.plan_memory
    assert known is not None and known.tasks.unique().tolist() == [0, 1, 2]
    files = {path.suffix for path in Path("run/policy").iterdir()}
    assert files == {".json", ".safetensors"}, "no pickle crosses a file"

    command = ["apply", "run", "digits", *REFINED, "model.seed=7", "--budget", "0.4", "--refine", "20"]
    text = done(capsys, *command, "--out", "refined")
    note = re.search(r"plans of (\d+) other checkpoints; here it built (\d+) models .* on (\d+) cal", text)
    assert note is not None and (note[1], note[3]) == ("3", "96")
    assert 12 < int(note[2]) < 12 + 20, "the first one evaluated has been built before"
    assert "policy + 20 evaluations" in text
    plan = json.loads(Path("refined/plan.json").read_text())
    assert plan["origin"]["refine"] == 20 and plan["cost"]["macs"] <= 0.4 * plan["dense_cost"]["macs"]

    command = ["apply", "run", "digits", *MODEL, "model.seed=7", "--budget", "0.4"]
    text = done(capsys, *command, "--builds", "20", "--out", "built")
    assert "here it built 20 models" in text
    assert json.loads(Path("built/plan.json").read_text())["origin"]["builds"] == 20
    assert "here it built" not in done(capsys, *command, "--builds", "0", "--out", "network")

    # Another depth: the policy's network and the rules are what its builds start from.
    deeper = ["apply", "run", "digits", *MODEL, "model.name=cifar_resnet32", "--budget", "0.4"]
    text = done(capsys, *deeper, "--out", "deeper")
    note = "plans of 3 other checkpoints, which do not fit here; from the rules' plans it built 18 models"
    assert note in text
    plan = json.loads(Path("deeper/plan.json").read_text())
    assert len(plan["groups"]) == 18 and plan["cost"]["macs"] <= 0.4 * plan["dense_cost"]["macs"]
