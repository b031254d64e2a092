"""docs/write-your-own.md as the text stands: its blocks register, keep the contracts and run in a benchmark."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import rlprune
from helpers.language_workload import workload_of
from helpers.lm import tiny_lm, tokens
from helpers.registries import forgotten, install
from helpers.small import SMALL_DIGITS, SMALL_LLAMA, SMALL_RUN, SMALL_SEARCH, without
from helpers.synthetic import FakeAccount, make_synthetic_task
from helpers.workloads import Noise
from rlprune import plugins
from rlprune.agents import SearchRequest, make_agent
from rlprune.api import trace
from rlprune.cli import main as cli
from rlprune.experiments.prepare import find_rule
from rlprune.importance import importance
from rlprune.language import families
from rlprune.rules import RULES, Context, rules_for
from rlprune.vision.zoo import build_model

PAGE = Path(__file__).parent.parent.parent / "docs" / "write-your-own.md"
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S))
BLOCKS = {name: re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) for name, text in SECTIONS.items()}
COMMANDS = {name: re.findall(r"^(rlprune .*)$", text, re.M) for name, text in SECTIONS.items()}
(SCRIPT,) = BLOCKS.pop("Run them")
MINE = "\n\n".join(block for found in BLOCKS.values() for block in found)
RULE, AGENT = BLOCKS["A rule"][0], BLOCKS["An agent"][0]
ARE_METHODS = ("skewed", "hill_climb")


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """mine.py as the page says, in the current folder; what it registers is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE, encoding="utf-8")
    with forgotten("mine"):
        yield tmp_path / "mine.py"


def test_neither_is_longer_than_twenty_lines() -> None:
    assert all(len(text.strip().splitlines()) <= 20 for text in (RULE, AGENT))


def test_nothing_is_longer_than_twenty_five_lines() -> None:
    assert all(len(text.strip().splitlines()) <= 25 for found in BLOCKS.values() for text in found)


@pytest.mark.parametrize(("budget", "metric"), [(0.8, "macs"), ("30%", "params")])
def test_the_rule_keeps_the_contract_of_rules(mine: Path, budget: object, metric: str) -> None:
    plugins.load(["mine.py"])
    model = build_model("cifar_resnet20", channels=1, arguments={"width": 6})
    workload = Noise(model)
    space = trace(model, workload.example_inputs)
    scores = importance.taylor(model, space, workload.batches("calibration"), workload.loss)
    context = Context(space, model, scores, budget, metric, workload)
    found, weights = RULES["skewed"], {n: t.clone() for n, t in model.state_dict().items()}
    distribution = found.function(context)
    assert distribution.shape == (len(space.groups),) and distribution.dtype == np.float64
    assert (distribution >= 0).all() and len(set(distribution)) > 1
    widths = space.project(distribution, budget, metric)
    assert space.cost(widths, metric) <= space.target(budget, metric)
    assert np.array_equal(distribution, found.function(context))
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())
    assert found.summary and found.function.__doc__ and not found.shipped
    whole = replace(context, importance=[np.ones(w) for w in space.widths])
    assert found.function(whole).any(), "groups whose units are alike still give a distribution"


def _searched(seed: int, spend: int = 40, budget: object = 0.4, agent: str = "hill_climb") -> FakeAccount:
    task = make_synthetic_task(6, budget=budget)
    account = FakeAccount(task.evaluator, spend)
    result = make_agent(agent).search(SearchRequest([task], [account], seed=seed))
    limit = task.space.target(budget if isinstance(budget, float) else 0.6)
    fits = [c.score for w, c in account.seen.items() if task.space.cost(np.array(w)) <= limit]
    assert task.space.cost(result.widths()) <= limit
    assert account.seen[result.best[0][0]].score == max(fits)
    return account


def test_the_agent_keeps_the_contract_of_agents(mine: Path) -> None:
    plugins.load(["mine.py"])
    account = _searched(1)
    assert account.spent == 40
    assert list(account.seen) == list(_searched(1).seen)
    assert list(account.seen) != list(_searched(2).seen)
    assert list(account.seen)[:15] == list(_searched(1, 15).seen), "a resumed search goes the same way"
    first = next(iter(account.seen.values()))
    assert max(c.score for c in account.history) > first.score, "it climbs above uniform"
    assert _searched(1, budget=(0.3, 0.6)).spent == 40


def test_the_class_keeps_the_contract_of_agents(mine: Path) -> None:
    plugins.load(["mine.py"])
    account = _searched(1, agent="Shuffle")
    assert account.spent == 40
    assert list(account.seen) == list(_searched(1, agent="Shuffle").seen)
    assert list(account.seen) != list(_searched(2, agent="Shuffle").seen)


def test_the_commands_of_the_page_run(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The benchmark in the size of seconds; what the page's commands say is otherwise untouched."""
    listing, comparison, pruning, _ = COMMANDS["Run them"]
    assert cli.main(listing.split()[1:]) == 0
    assert re.search(r"^hill_climb +keeps the best plan so far", capsys.readouterr().out, re.M)
    small = without(SMALL_SEARCH)
    words = comparison.replace("--seeds 3 --evaluations 100", "--seeds 1 --evaluations 14").split()[1:]
    assert cli.main([*words, *small, "--out", "compared"]) == 0
    rows = json.loads(Path("compared/results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["dense", "skewed", "hill_climb", "uniform", "random"]
    spent = {row["method"]: row["evaluations"] for row in rows}
    assert spent == {"dense": 0, "skewed": 1, "hill_climb": 14, "uniform": 1, "random": 14}
    score = {row["method"]: row["score"] for row in rows}
    assert score["hill_climb"] >= score["uniform"]
    pruned = [*pruning.split()[1:], *without(SMALL_DIGITS), "--out", "pruned"]
    assert cli.main(pruned) == 0
    assert Path("pruned/plan.json").is_file()


def test_the_script_of_the_page_runs(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = SCRIPT.replace('load_config("digits")', f'load_config("digits", {SMALL_RUN!r})')
    assert text != SCRIPT and "evaluations=100" in text
    exec(compile(text.replace("evaluations=100", "evaluations=14"), str(PAGE), "exec"), {})
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if " -" in line]
    assert {*ARE_METHODS, "uniform", "random"} <= set(printed)


def run(command: str, *more: str) -> None:
    """A command of the page on tiny settings."""
    assert cli.main([*command.split()[1:], *more]) == 0


def small(command: str, out: str) -> list[str]:
    """The settings that make a command of the page one of seconds, where it does not say its own."""
    settings = SMALL_LLAMA if "tiny_llama" in command else SMALL_RUN if " train " in command else SMALL_DIGITS
    return [*without(settings), "--out", out]


def rows_of(folder: str) -> dict[str, dict[str, object]]:
    rows = json.loads(Path(folder, "results.json").read_text())["rows"]
    return {row["method"]: row for row in rows}


def plan_of(folder: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(Path(folder, "plan.json").read_text())
    return found


def test_the_importance_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = COMMANDS["An importance"]
    run(command, *small(command, "ranked"))
    run(command.replace("taylor_l2", "taylor"), *small(command, "other"))
    assert plan_of("ranked")["widths"] == plan_of("other")["widths"]
    ours, theirs = (rlprune.load(folder).state_dict() for folder in ("ranked", "other"))
    assert any(not torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), "other units stay"


def test_the_recovery_step_repairs(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = COMMANDS["A recovery step"]
    run(command, *small(command, "repaired"))
    run(command.replace("[bn,match_spread]", "[bn]"), *small(command, "plain"))
    capsys.readouterr()
    ours, theirs = (rlprune.load(folder) for folder in ("repaired", "plain"))
    changed = [n for n, t in ours.state_dict().items() if not torch.equal(t, theirs.state_dict()[n])]
    assert changed == ["linear.weight", "linear.bias"], "the last layer, and nothing else"


def test_the_cost_metric_is_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    looking, pruning = COMMANDS["A cost metric"]
    run(looking, *without(SMALL_DIGITS, "model.train", "data", "device"))
    assert re.search(r"^int4_bytes: dense [\d,]+; feasible budgets", capsys.readouterr().out, re.M)
    run(pruning, *small(pruning, "light"))
    plan, slim = plan_of("light"), rlprune.load("light")
    sizes = [t.numel() * (0.5 if t.ndim > 1 else 2) for t in slim.parameters()]
    assert plan["cost"]["int4_bytes"] == sum(sizes) <= 0.4 * plan["dense_cost"]["int4_bytes"]


def test_the_score_judges_a_search() -> None:
    (command,) = COMMANDS["A score"]
    run(command, *small(command, "judged"))
    scores = [row["score"] for row in rows_of("judged").values()]
    assert rows_of("judged")["dense"]["score"] == 1.0
    assert all(0 <= score <= 1 and abs(100 * score - round(100 * score)) < 1e-6 for score in scores), (
        "of 100 images"
    )
    assert "agreement" in Path("judged/config.yaml").read_text()


def test_the_score_judges_text_too(mine: Path) -> None:
    plugins.load(["mine.py"])
    workload = workload_of(tiny_lm("llama"))
    judge = workload.judge("agreement")
    assert judge(workload.model).scores.tolist() == [1.0] * workload.size("validation")
    other = judge(tiny_lm("llama", seed=1))
    assert (other.scores < 0.5).all() and other.loss == pytest.approx(
        workload.judge("loss")(tiny_lm("llama", seed=1)).loss
    )


def test_the_data_sets_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    images, text = COMMANDS["A data set"]
    run(images, *small(images, "squares"))
    assert re.search(r"^dense .* (0\.9\d*|1\.0*)$", capsys.readouterr().out, re.M), "easy to tell apart"
    run(text, *small(text, "sums"))
    assert plan_of("sums")["widths"]


def test_the_export_format_writes() -> None:
    (command,) = COMMANDS["An export format"]
    pruning = COMMANDS["Run them"][2]
    run(pruning, *small(pruning, "pruned"))
    run(command)
    weights = rlprune.load("pruned").state_dict()
    assert {n: a.shape for n, a in np.load("model.npz").items()} == {
        n: tuple(t.shape) for n, t in weights.items()
    }


def test_the_family_is_cut_saved_and_loaded_again(mine: Path) -> None:
    rlprune.trace(arcee(), tokens(8))  # what is found by shape makes way for what is written by hand
    assert "arcee" in families.FOUND
    plugins.load(["mine.py"])
    model = arcee()
    space = rlprune.trace(model, tokens(8))
    assert families.FAMILIES["arcee"] == families.Family(up=("up_proj",)) and "arcee" not in families.FOUND
    plan = rlprune.make_plan(
        space, importance=rlprune.importance.magnitude(model, space), widths=space.widths // 2
    )
    slim = rlprune.prune(model, plan)
    rlprune.save(slim, plan, "arcee")
    with torch.no_grad():
        wanted, found = (m(tokens(8)).logits for m in (slim, rlprune.load("arcee")))
    assert torch.equal(wanted, found)
    script = "import transformers as t; print(t.AutoModelForCausalLM.from_pretrained('arcee', trust_remote_code=True))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "PrunedArceeForCausalLM" in done.stdout, done.stderr


def arcee() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ArceeConfig(
        **sizes, num_key_value_heads=2, head_dim=8, vocab_size=96, bos_token_id=1, eos_token_id=2
    )
    model: torch.nn.Module = transformers.ArceeForCausalLM(config).eval()
    return model


def test_the_plugin_works_as_an_entry_point(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (toml,) = re.findall(r"^```toml\n(.*?)^```", SECTIONS["Without --plugin: entry points"], re.M | re.S)
    points = tomllib.loads(toml)["project"]["entry-points"]["rlprune.plugins"]
    install(mine, points, monkeypatch)
    for kind, name in (("rules", "skewed"), ("costs", "int4_bytes"), ("data", "squares")):
        assert cli.main(["list", kind]) == 0
        assert re.search(rf"^{name} ", capsys.readouterr().out, re.M)
    command = COMMANDS["A recovery step"][0].replace("--plugin mine.py ", "")
    run(command, *small(command, "repaired"))


@pytest.mark.parametrize(
    "ask",
    [
        lambda: make_agent("hill_climb"),
        lambda: find_rule("skewed"),
        lambda: importance.find_importance("taylor_l2"),
        lambda: rules_for(make_synthetic_task().space)["skewed"],
    ],
    ids=["agent", "rule", "importance", "all rules"],
)
def test_an_entry_point_is_found_from_python(
    ask: Callable[[], object], mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((rlprune.ConfigError, KeyError)):
        ask()
    install(mine, {"mine": "mine"}, monkeypatch)
    assert ask() is not None


def test_the_table_counts_what_is_there() -> None:
    """Every place exists, and whatever HOUSE names has a line."""
    rows = re.findall(r"^\| ([a-z ]+) \| (\d) \| (.*?) \|", SECTIONS["Adding a thing"], re.M)
    assert {name: int(files) for name, files, _ in rows} == {
        "rule": 1, "agent": 1, "importance": 1, "recovery step": 1, "cost metric": 1, "score": 1, "task": 1,
        "model and data": 0,
        "data set": 1, "image architecture": 0, "language family": 1, "export format": 1, "runtime": 1,
    }  # fmt: skip
    for _, files, places in rows:
        found = re.findall(r"`(rlprune/[\w/.]+)`", places)
        assert bool(found) == (files == "1") and all((PAGE.parent.parent / place).exists() for place in found)
