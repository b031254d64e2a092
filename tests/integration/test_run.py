"""The whole path: train, resume after any kill, apply, prune, evaluate; in process and through the command line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import rlprune
from helpers.small import without
from rlprune.artifacts.documents import read_plan
from rlprune.cli import main as cli
from rlprune.errors import ArtifactError, ConfigError
from rlprune.evaluation.ledger import EvaluationLog
from rlprune.experiments import apply as deploy
from rlprune.experiments import inspect as inspection
from rlprune.experiments import train as run
from rlprune.report.results import read_results
from rlprune.rules import RULES

VISION_RULES = [name for name, rule in RULES.items() if rule.wing is None]

TINY = [
    "model.arguments={width: 4}", "model.train.epochs=2", "data.train=256", "data.calibration=64",
    "data.validation=128", "data.test=100", "search.evaluations=60", "search.batch=10",
    "search.ppo.surrogate_steps=256", "finish.epochs=1", "finish.candidates=3", "threads=1",
]  # fmt: skip


def tiny(*overrides):
    return rlprune.load_config("digits", [*TINY, *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run.train(tiny(), tmp_path_factory.mktemp("runs") / "tiny").folder


def ledger_of(folder):
    rows = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def outcome_of(folder):
    """Everything of a finished run that does not depend on the clock."""
    rows = read_results(folder)["rows"]
    dropped = ("seconds", "finish_seconds", "latency_ms")
    plan = read_plan(folder / "pruned")
    tensors = rlprune.load(folder / "pruned").state_dict()
    return (
        [{k: v for k, v in row.items() if k not in dropped} for row in rows],
        plan["groups"],
        plan["widths"],
        tensors,
    )


def assert_same_outcome(a, b):
    first, second = outcome_of(a), outcome_of(b)
    assert first[:3] == second[:3]
    assert all(torch.equal(first[3][k], second[3][k]) for k in first[3])
    assert ledger_of(a) == ledger_of(b)


class TestTrain:
    def test_leaves_what_the_surface_promises(self, finished):
        for name in (
            "config.yaml",
            "ledger.jsonl",
            "policy",
            "pruned",
            "results.json",
            "report.html",
            "run.log",
            "state",
        ):
            assert (finished / name).exists(), name
        assert rlprune.load_config(finished / "config.yaml") == tiny()
        results = read_results(finished)
        methods = [row["method"] for row in results["rows"]]
        assert methods == ["dense", *VISION_RULES, "random", "ppo"]
        for row in results["rows"]:
            fields = (
                "evaluations",
                "cost",
                "score",
                "validation",
                "test",
                "test_loss",
                "test_finetuned",
                "seconds",
            )
            assert all(isinstance(row[f], (int, float)) for f in fields)
            assert row["method"] == "dense" or row["cost"] <= results["budget"]["target"]
            assert set(row["latency_ms"]) == {"1", "64"}

    def test_every_method_is_charged_for_what_it_asked(self, finished):
        rows = EvaluationLog(finished / "ledger.jsonl").rows
        spent = {row["method"]: row["evaluations"] for row in read_results(finished)["rows"]}
        for method in ("random", "ppo"):
            own = [tuple(r["widths"]) for r in rows if r["method"] == method]
            assert len(own) == len(set(own)) == spent[method] == 60
        groups = len(read_results(finished)["groups"])
        assert spent["uniform"] == 1 and groups < spent["sensitivity"] <= 2 * groups + 2

    def test_both_searches_start_from_the_same_plans(self, finished):
        rows = EvaluationLog(finished / "ledger.jsonl").rows
        starts = {m: [r["widths"] for r in rows if r["method"] == m][:6] for m in ("random", "ppo")}
        assert starts["random"] == starts["ppo"]

    def test_the_learned_plan_is_not_worse_than_any_rule_on_validation(self, finished):
        rows = {row["method"]: row for row in read_results(finished)["rows"]}
        assert rows["ppo"]["score"] >= max(rows[name]["score"] for name in VISION_RULES)

    def test_pruned_model_is_the_one_of_the_table(self, finished):
        row = next(r for r in read_results(finished)["rows"] if r["method"] == "ppo")
        slim = rlprune.load(finished / "pruned")
        assert sum(p.numel() for p in slim.parameters()) == row["params"]
        workload = rlprune.build_workload(tiny())
        with workload.test_opened():
            quality = workload.evaluate(slim, "test")
        assert quality.metric == pytest.approx(row["test_finetuned"])
        assert quality.loss == pytest.approx(row["test_loss_finetuned"], rel=1e-4)

    def test_a_second_run_into_the_folder_is_refused(self, finished):
        with pytest.raises(ConfigError, match="holds a run already"):
            run.train(tiny(), finished)

    def test_resuming_with_other_settings_names_the_setting(self, finished):
        with pytest.raises(ConfigError, match="search.evaluations=60, not 61"):
            run.train(tiny("search.evaluations=61"), finished, resume=True)

    def test_a_complete_run_has_nothing_to_resume(self, finished):
        before = (finished / "ledger.jsonl").read_bytes()
        assert run.train(tiny(), finished, resume=True).folder == finished
        assert (finished / "ledger.jsonl").read_bytes() == before

    def test_foreign_folders_are_not_written_into(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("x")
        with pytest.raises(ArtifactError, match="thesis.tex"):
            run.train(tiny(), tmp_path)
        assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["thesis.tex"]


class Stop(BaseException):
    pass


@pytest.mark.parametrize(
    "stop_after", [95, *(pytest.param(n, marks=pytest.mark.slow) for n in (7, 131, 150))]
)
def test_interrupted_and_resumed_is_uninterrupted(finished, tmp_path, monkeypatch, stop_after):
    """Stopped right after a candidate is written; the resumed run must give the same ledger and plan."""
    append, written = EvaluationLog.append, []

    def stopping(self, row):
        append(self, row)
        written.append(row)
        if len(written) == stop_after:
            raise Stop

    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(EvaluationLog, "append", stopping)
        run.train(tiny(), out)
    assert len((out / "ledger.jsonl").read_text().splitlines()) == stop_after
    run.train(tiny(), out, resume=True)
    assert_same_outcome(out, finished)


def progress_of(out):
    """How far a run has come: rows of its ledger and finished fine-tunes."""
    ledger = out / "ledger.jsonl"
    rows = ledger.read_bytes().count(b"\n") if ledger.exists() else 0
    return rows + len(list(out.glob("state/finish-*.json")))


def kill_at(process, out, target, while_saving):
    """SIGKILL once ``target`` is passed, if wanted at the next moment when a state file is being written."""
    state = str(out / "state")
    while process.poll() is None:
        now, saving = progress_of(out), False
        for _ in range(200 if while_saving and now >= target and os.path.isdir(state) else 0):
            saving = any(n.startswith(".") or n.endswith(".tmp") for n in os.listdir(state))
            if saving:
                break
        # In this run nothing new may be saved for a while: at the latest 10 steps later it is killed anyway.
        if saving or (now > target and not while_saving) or now > target + 10:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return f"{'while saving' if saving else 'not while saving'}, progress {now}"
    pytest.fail(f"finished before progress {target}: {process.stdout.read()}")


@pytest.mark.slow
def test_kill_9_at_ten_moments(finished, tmp_path):
    """kill -9 at ten random moments, half of them while a state file is being written, each resumed."""
    out, draw = tmp_path / "run", random.Random(int(os.environ.get("KILL_SEED", "0")))
    sets = [part for text in TINY for part in ("--set", text)]
    command = [sys.executable, "-m", "rlprune", "train", "digits", *sets, "--out", str(out)]
    total = len(ledger_of(finished)) + len(read_results(finished)["rows"])
    for number in range(10):
        # A little further each time, so that ten kills fit in and every part of the run is hit.
        here = progress_of(out)
        target = here + draw.randrange(max(1, (total - 20 - here) // (10 - number)))
        resume = ["--resume"] if (out / "config.yaml").exists() else []
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command + resume, **pipes) as process:
            print(f"kill {number + 1}:", kill_at(process, out, target, while_saving=number % 2 == 1))
    assert subprocess.run([*command, "--resume"], capture_output=True, check=False).returncode == 0
    assert_same_outcome(out, finished)


class TestOtherCommands:
    def test_apply_prunes_another_checkpoint_without_a_search(self, finished, tmp_path):
        config = tiny("model.seed=1")
        applied = deploy.apply(finished, config, 0.4)
        applied.save(tmp_path / "other")
        table = str(applied)
        assert "policy" in table
        plan = read_plan(tmp_path / "other")
        assert plan["cost"]["macs"] <= 0.4 * plan["dense_cost"]["macs"]
        assert rlprune.load(tmp_path / "other")(torch.zeros(1, 1, 8, 8)).shape == (1, 10)

    def test_apply_refines_with_exactly_as_many_evaluations(self, finished, tmp_path):
        config = tiny("model.seed=1")
        applied = deploy.apply(finished, config, 0.5, refine=12)
        applied.save(tmp_path / "other")
        table = str(applied)
        lines = {line[:28].strip(): float(line.split()[-3]) for line in table.splitlines()[2:]}
        assert lines["policy + 12 evaluations"] >= lines["policy"]

    def test_apply_refuses_builds_for_a_policy_of_one_checkpoint(self, finished, tmp_path):
        config, out = tiny("model.seed=1"), tmp_path / "other"
        with pytest.raises(
            ConfigError, match=r"--builds 20: only for .* several checkpoints.*allowed here: 0"
        ):
            deploy.apply(finished, config, 0.4, builds=20).save(out)
        assert not out.exists()

    def test_policy_of_another_depth_is_applied_with_a_warning(self, finished, tmp_path):
        config = tiny("model.name=cifar_resnet32")
        with pytest.warns(UserWarning, match="another architecture"):
            deploy.apply(finished, config, 0.5).save(tmp_path / "deeper")

    def test_prune_by_rule(self, tmp_path):
        assert "lamp" in deploy.prune_rule(tiny(), "lamp", "30%", tmp_path / "lamp")
        assert read_plan(tmp_path / "lamp")["origin"]["method"] == "lamp"

    def test_inspect_needs_no_training(self, monkeypatch):
        monkeypatch.setattr("rlprune.experiments.build.train_dense", None)
        text = inspection.inspect(tiny()).text
        assert "layer1.0.conv1" in text and "feasible budgets" in text and "protected: linear" in text

    def test_evaluate_with_and_without_a_config(self, finished):
        assert "test accuracy" in inspection.evaluate(finished / "pruned", tiny()).text
        assert "give CONFIG" in inspection.evaluate(finished / "pruned", None).text

    @pytest.mark.slow
    def test_several_checkpoints_train_one_policy(self, tmp_path, monkeypatch):
        monkeypatch.setattr("rlprune.agents.ppo.transfer.PROBES", 1)
        config = tiny(
            "search.model_seeds=[1]",
            "search.budget_range=[0.4, 0.6]",
            "finish.rules=false",
            "finish.epochs=0",
        )
        out = run.train(config, tmp_path / "two").folder
        tasks = {row["task"] for row in ledger_of(out) if row["method"] == "ppo"}
        assert tasks == {"", "seed1"}
        row = next(r for r in read_results(out)["rows"] if r["method"] == "ppo")
        assert row["cost"] <= read_results(out)["budget"]["target"]

    # The model is trained for a moment: on some processors uniform pruning costs it no more than noise.
    @pytest.mark.filterwarnings("default:uniform pruning scores")
    def test_direct_mode_and_stages(self, tmp_path):
        own = ["search.mode=direct", "search.stages=2", "search.evaluations=44", "search.ppo.n_steps=8",
               "search.baselines=[]", "finish.rules=false"]  # fmt: skip
        kept = [text for text in TINY if not text.startswith(("search.", "finish."))]
        config = rlprune.load_config("digits", [*kept, *own, "finish.epochs=0"])
        out = run.train(config, tmp_path / "staged").folder
        assert any(isinstance(row["widths"][0], list) for row in ledger_of(out))
        assert (out / "report.html").exists()

    def test_command_line_end_to_end(self, tmp_path, capsys):
        sets = [part for text in [*TINY, "finish.rules=false"] for part in ("--set", text)]
        pruned = without(TINY, "search.", "finish.")
        out = tmp_path / "run"
        assert cli.main(["train", "digits", *sets, "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        assert "\nppo" in printed and f"report: {out / 'report.html'}" in printed
        assert (
            cli.main(
                ["apply", str(out), "digits", *pruned, "--set", "model.seed=1", "--out", str(tmp_path / "b")]
            )
            == 0
        )
        assert cli.main(["evaluate", str(tmp_path / "b"), "digits", *pruned]) == 0
        assert cli.main(["report", str(out)]) == 0
        assert cli.main(["prune", "digits", *pruned, "--rule", "erk", "--out", str(tmp_path / "c")]) == 0
        widths = read_plan(tmp_path / "c")["widths"]
        assert np.array(widths).min() >= 1
