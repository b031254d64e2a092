"""A mixture of experts through the command line, as a person would prune it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rlprune
from helpers.lm_folder import write_config, write_mixture
from rlprune.cli import main as cli

SETS = ["--set", "prune.round_to=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral, its tokenizer, and the settings of a run."""
    path = tmp_path_factory.mktemp("mixture")
    write_config(path / "my.yaml", write_mixture(path / "mixtral"))
    return path


def test_inspect_names_both_groups(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(folder / "my.yaml"), *SETS]) == 0
    lines = {
        line.split()[0]: line.split()[1:]
        for line in capsys.readouterr().out.splitlines()
        if line[:6] == "model."
    }
    assert lines["model.layers.*.mlp.gate"][:5] == ["experts", "0-1", "4", "1", "2"]
    assert lines["model.layers.*.mlp.experts"][:5] == ["ffn", "0-1", "16", "1", "1"]


def test_a_rule_prunes_what_transformers_loads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    out = folder / "uniform"
    config = str(folder / "my.yaml")
    assert (
        cli.main(["prune", config, "--rule", "uniform", "--out", str(out), *SETS, "prune.importance=obs"])
        == 0
    )
    assert "written:" in capsys.readouterr().out
    model = rlprune.load(out)
    other = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)
    assert cli.main(["evaluate", str(out), config]) == 0
    assert "test perplexity" in capsys.readouterr().out


@pytest.mark.slow
def test_a_search_learns_how_much(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "run"
    config = str(folder / "my.yaml")
    assert cli.main(["train", config, "--out", str(out), *SETS, "prune.importance=wanda_sp"]) == 0
    assert rlprune.load(out / "pruned").config.model_type == "mixtral"
