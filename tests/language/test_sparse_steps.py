"""Wanda's masks: the formula, the pattern, and that SPP's fine-tune keeps every zero through its merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.language_workload import Sentences
from helpers.lm import tiny_lm
from helpers.lm_folder import CONFIG, write_folder
from rlprune.api import trace
from rlprune.config.training import RecoveryConfig
from rlprune.errors import ConfigError
from rlprune.evaluation.recovery import Recovery
from rlprune.language.tuning.peft import target_layers
from rlprune.pruning.plan import make_plan
from rlprune.pruning.surgery import prune


def masked(model: nn.Module, *steps: str) -> nn.Module:
    workload = Sentences(model)
    space = trace(model, workload.example_inputs)
    plan = make_plan(space, importance=[range(g.units) for g in space.groups], widths=space.widths)
    slim = prune(model, plan)
    Recovery(workload, space, RecoveryConfig(steps=steps))(slim, plan)
    return slim


def linears(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: model.get_parameter(f"{name}.weight").detach() for name in target_layers(model)}


@pytest.mark.parametrize("step", ["wanda_2_4", "wanda_half"])
def test_half_of_the_weights_go_in_the_pattern(step: str) -> None:
    model = tiny_lm("llama", seed=2)
    slim = masked(model, step)
    dense = linears(model)
    for name, weight in linears(slim).items():
        rows = weight if step == "wanda_half" else weight.unflatten(1, (-1, 4)).flatten(0, 1)
        assert (rows == 0).sum(dim=1).unique().tolist() == [rows.shape[1] // 2], name
        kept = weight != 0
        assert torch.equal(weight[kept], dense[name][kept])


def test_the_first_layers_follow_wandas_formula() -> None:
    """q_proj of the first block reads the same inputs in the dense and in the masked model."""
    model = tiny_lm("llama", seed=2)
    name = next(n for n in target_layers(model) if n.endswith("q_proj"))
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for ids, _ in Sentences(model).batches("calibration"):
            model(ids)
    handle.remove()
    norms = torch.cat([x.flatten(0, 1) for x in seen]).norm(dim=0)
    weight = model.get_parameter(f"{name}.weight").detach()
    scores = (weight.abs() * norms).unflatten(1, (-1, 4))
    expected = scores.argsort(dim=2).argsort(dim=2) >= 2
    found = linears(masked(model, "wanda_2_4"))[name] != 0
    assert torch.equal(found, expected.flatten(1))


def test_odd_layers_are_refused() -> None:
    model = tiny_lm("llama", seed=2, intermediate_size=18)
    with pytest.raises(ConfigError, match=r"the inputs of .*down_proj are no multiple of 4"):
        masked(model, "wanda_2_4")


def test_zeros_survive_spp_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    from rlprune.cli.main import main

    model = write_folder(tmp_path / "model")
    (tmp_path / "config.yaml").write_text(CONFIG.format(model=model).replace(", batch: 2", ""))
    words = [
        "budget.target=1.0", "recovery.steps=[wanda_2_4]", "search.agent=rule", "search.base_rule=uniform",
        "search.starts=none", "search.baselines=[]", "search.evaluations=1", "finish.method=spp", "finish.rank=16",
        "finish.alpha=32", "finish.steps=3", "finish.batch_size=4", "finish.lr=0.05",
    ]  # fmt: skip
    given = [w for word in words for w in ("--set", word)]
    out = tmp_path / "run"
    assert main(["train", str(tmp_path / "config.yaml"), *given, "--out", str(out)]) == 0
    before = linears(AutoModelForCausalLM.from_pretrained(model))
    after = linears(AutoModelForCausalLM.from_pretrained(out / "pruned"))
    changed = 0
    for name, weight in after.items():
        runs = weight.unflatten(1, (-1, 4))
        assert ((runs == 0).sum(dim=2) >= 2).all(), name
        kept = weight != 0
        changed += int((weight[kept] != before[name][kept]).sum())
    assert changed > 0, "the fine-tune learned"
