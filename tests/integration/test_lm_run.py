"""A tiny Llama through the whole path: train, resume, apply, prune, evaluate, export, by the same commands."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import rlprune
from helpers.small import without
from rlprune.artifacts.documents import read_plan
from rlprune.benchmarks import benchmark
from rlprune.cli import main as cli
from rlprune.config.config import Config
from rlprune.errors import ConfigError
from rlprune.evaluation.ledger import EvaluationLog
from rlprune.experiments import apply as deploy
from rlprune.experiments import fidelity
from rlprune.experiments import train as run
from rlprune.experiments.build import build_workload
from rlprune.report.results import read_results
from rlprune.rules import RULES

OWN_RULES = [name for name, rule in RULES.items() if not rule.external and not rule.on_request]

# Big enough to learn which tokens are frequent in a second; enough blocks for a distribution to matter.
TINY = (
    "model.arguments={layers: 3, hidden: 16, heads: 4, kv_heads: 2, intermediate: 24, vocab: 300, context: 64}",
    "model.train.epochs=2", "model.train.lr=0.02", "model.train.batch_size=16",
    "data.sequence_length=16", "data.train=256", "data.calibration=16", "data.validation=16", "data.test=12",
    "score.top_k=32", "score.samples=8", "score.dtype=float32", "search.evaluations=24", "search.batch=6",
    "search.ppo.surrogate_steps=64", "search.ppo.surrogate_envs=8", "finish.candidates=2", "device=cpu",
)  # fmt: skip
SETS = without(TINY)
PRUNED = without(TINY, "search.", "finish.")
MEASURED = without(TINY, "search.", "finish.", "score.")
LOOKED_AT = without(TINY, "search.", "finish.", "score.", "model.train.")


def tiny(*overrides: str) -> Config:
    return rlprune.load_config("tiny_llama", [*TINY, *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run.train(tiny(), tmp_path_factory.mktemp("runs") / "llama").folder


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in read_results(folder)["rows"]}


def ledger_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "ledger.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def assert_same_outcome(one: Path, other: Path) -> None:
    """Everything of two runs that does not depend on the clock."""
    dropped = ("seconds", "finish_seconds", "latency_ms")
    tables = [
        {name: {k: v for k, v in row.items() if k not in dropped} for name, row in rows_of(folder).items()}
        for folder in (one, other)
    ]
    assert tables[0] == tables[1]
    assert ledger_of(one) == ledger_of(other)
    plans = [read_plan(folder / "pruned")["groups"] for folder in (one, other)]
    assert plans[0] == plans[1]
    a, b = (rlprune.load(folder / "pruned").state_dict() for folder in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def done(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    code = cli.main(list(words))
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def test_the_shipped_config_is_a_demo() -> None:
    config = rlprune.load_config("tiny_llama")
    assert config.model.arguments["layers"] == 6
    assert config.finish.steps == 0  # adapters would need an extra


class TestTrain:
    def test_leaves_what_the_surface_promises(self, finished: Path) -> None:
        names = ("config.yaml", "ledger.jsonl", "policy", "pruned", "results.json", "report.html", "run.log")
        assert all((finished / name).exists() for name in names)
        assert rlprune.load_config(finished / "config.yaml") == tiny()
        results = read_results(finished)
        assert [row["method"] for row in results["rows"]] == ["dense", *OWN_RULES, "random", "ppo"]
        assert results["workload"]["metric"] == "perplexity"
        assert results["workload"]["protocol"]["splits"]["test"]["tokens"] == 12 * 15
        for row in results["rows"]:
            assert row["method"] == "dense" or row["cost"] <= results["budget"]["target"]
            assert math.isclose(row["test"], math.exp(row["test_loss"]))
            assert row["test_finetuned"] == row["test"]  # no fine-tune was asked for

    def test_report_names_every_method(self, finished: Path) -> None:
        text = (finished / "report.html").read_text()
        assert "perplexity" in text
        assert all(method in text for method in rows_of(finished))

    def test_ledger_and_table_agree(self, finished: Path) -> None:
        rows, ledger = rows_of(finished), EvaluationLog(finished / "ledger.jsonl").rows
        for method in ("random", "ppo"):
            own = [tuple(r["widths"]) for r in ledger if r["method"] == method]
            assert len(own) == len(set(own)) == rows[method]["evaluations"] == 24
        for name in OWN_RULES:
            assert rows[name]["evaluations"] == len([r for r in ledger if r["method"] == name])
            assert tuple(rows[name]["widths"]) in {tuple(r["widths"]) for r in ledger if r["method"] == name}
        assert rows["ppo"]["score"] >= max(rows[name]["score"] for name in OWN_RULES)

    def test_pruned_model_is_that_of_the_table_by_both_loaders(self, finished: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        row, folder = rows_of(finished)["ppo"], finished / "pruned"
        slim = rlprune.load(folder)
        assert sum(p.numel() for p in slim.parameters()) == row["params"]
        assert [group["width"] for group in read_plan(folder)["groups"]] != row["widths"]
        stock = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        ids = torch.arange(20)[None]
        with torch.no_grad():
            assert torch.equal(slim(ids).logits, stock(ids).logits)
        workload = build_workload(tiny())
        with workload.test_opened():
            quality = workload.evaluate(slim, "test")
        assert quality.metric == pytest.approx(row["test"], rel=1e-5)
        text = "The for statement"
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert tokenizer(text)["input_ids"] == workload.tokenizer(text)["input_ids"]

    def test_resuming_with_other_settings_names_the_setting(self, finished: Path) -> None:
        with pytest.raises(ConfigError, match="search.evaluations=24, not 25"):
            run.train(tiny("search.evaluations=25"), finished, resume=True)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("left_out", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_interrupted_and_resumed_is_uninterrupted(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_out: int
) -> None:
    """Stopped right after a candidate is written; the resumed run must give the same ledger and model."""
    append, written, last = EvaluationLog.append, [], len(ledger_of(finished)) - left_out

    def stopping(self: EvaluationLog, row: dict[str, Any]) -> None:
        append(self, row)
        written.append(row)
        if len(written) == last:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(EvaluationLog, "append", stopping)
        run.train(tiny(), tmp_path / "run")
    assert len(ledger_of(tmp_path / "run")) == last
    run.train(tiny(), tmp_path / "run", resume=True)
    assert_same_outcome(tmp_path / "run", finished)


@pytest.mark.slow
def test_kill_9_and_resume_by_the_command_line(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "rlprune", "train", "tiny_llama", *SETS, "--out", str(out)]
    ledger = out / "ledger.jsonl"
    with subprocess.Popen(command, env=dict(os.environ), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (ledger.exists() and ledger.read_bytes().count(b"\n") > 40):
            time.sleep(0.02)
        assert process.poll() is None, "finished before it could be killed"
        process.send_signal(signal.SIGKILL)
    assert not (out / "results.json").exists()
    assert subprocess.run([*command, "--resume"], capture_output=True, check=False).returncode == 0
    assert_same_outcome(out, finished)


class TestOtherCommands:
    def test_policy_goes_to_another_depth(self, finished: Path, tmp_path: Path) -> None:
        config = tiny("model.seed=1", "model.arguments.layers=5")
        with pytest.warns(UserWarning, match="another architecture"):
            applied = deploy.apply(finished, config, 0.6)
        applied.save(tmp_path / "deep")
        table = str(applied)
        assert "policy" in table and "ffn_uniform" in table
        plan = read_plan(tmp_path / "deep")
        assert len(plan["groups"]) == 10
        assert plan["cost"]["block_params"] <= 0.6 * plan["dense_cost"]["block_params"]

    def test_by_the_command_line(
        self, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert "budget: 0.5 of block_params" in done(capsys, "inspect", "tiny_llama", *LOOKED_AT)
        text = done(capsys, "apply", str(finished), "tiny_llama", *PRUNED, "--set", "model.seed=1",
                    "--out", str(tmp_path / "applied"))  # fmt: skip
        assert "policy" in text
        done(capsys, "prune", "tiny_llama", *PRUNED, "--rule", "flap", "--out", str(tmp_path / "flap"))
        assert read_plan(tmp_path / "flap")["origin"]["method"] == "flap"
        assert "perplexity" in done(capsys, "evaluate", str(tmp_path / "flap"), "tiny_llama", *MEASURED)
        done(capsys, "export", str(tmp_path / "flap"), "--to", "hf", "--out", str(tmp_path / "hf"))
        assert (tmp_path / "hf" / "config.json").is_file()
        (finished / "report.html").unlink()
        done(capsys, "report", str(finished))
        assert (finished / "report.html").is_file()

    def test_several_budgets_and_checkpoints_train_one_policy(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("rlprune.agents.ppo.transfer.PROBES", 1)
        other = build_workload(tiny("model.seed=3"))
        path = tmp_path / "other.pt"
        torch.save(other.model.state_dict(), path)
        config = tiny(
            f"search.checkpoints=[{path}]", "search.budget_range=[0.4, 0.7]", "search.baselines=[]",
            "search.evaluations=22", "finish.rules=false",
        )  # fmt: skip
        out = run.train(config, tmp_path / "two").folder
        rows = [row for row in ledger_of(out) if row["method"] == "ppo"]
        assert {row["task"] for row in rows} == {"", "other"}
        found = rows_of(out)["ppo"]
        assert found["cost"] <= read_results(out)["budget"]["target"] < max(row["cost"] for row in rows)
        meta = json.loads((out / "policy" / "policy.json").read_text())["meta"]
        assert meta["budgets"] == [[0.4, 0.7]] * 2

    @pytest.mark.slow
    def test_benchmark(self, tmp_path: Path) -> None:
        results = benchmark.run(tiny(), ["uniform", "flap", "ppo"], 2, 20, tmp_path / "bench")
        assert {row["method"] for row in results["rows"]} == {"dense", "uniform", "flap", "ppo"}
        assert (tmp_path / "bench" / "benchmark.md").is_file()

    @pytest.mark.slow
    def test_fidelity_needs_steps_and_takes_them(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="finish.steps: fidelity compares"):
            fidelity.run(tiny(), 4, tmp_path / "none")
        text = fidelity.run(tiny("finish.method=full", "finish.steps=2"), 4, tmp_path / "some")
        assert "after 2 steps of the final fine-tune" in text and "bn" not in text
