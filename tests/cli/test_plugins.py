"""--plugin: what is loaded, what is refused in one line, and the hash that results are kept under."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from helpers.registries import forgotten, install
from rlprune import plugins, rule, rules
from rlprune.agents import AGENTS, agent, make_agent
from rlprune.benchmarks import benchmark
from rlprune.cli import main as cli
from rlprune.config.config import BudgetConfig, Config, ScoreConfig, json_schema
from rlprune.config.training import RecoveryConfig
from rlprune.errors import ConfigError
from rlprune.rules import RULES

HALF = """
import numpy as np
import rlprune

@rlprune.rule("the first half of the groups")
def first_half(context):
    return np.arange(len(context.space.groups)) < len(context.space.groups) / 2
"""

OTHER = "import rlprune\n@rlprune.{}\ndef {}(*given): pass"
ALL = """
import rlprune
from rlprune.language import families

@rlprune.recovery_step("nothing")
def plug_step(context):
    return lambda slim, plan: None

@rlprune.cost_metric("as params")
def plug_cost(space, model):
    return space.costs["params"]

@rlprune.score_kind("zero")
def plug_score(outputs, targets):
    return 0 * targets.double()

families.register("plug_type", families.Family())
"""


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own; registries and modules as before."""
    monkeypatch.chdir(tmp_path)
    with forgotten("plug"):
        yield


def test_a_file_is_loaded_once_however_it_is_named(tmp_path: Path) -> None:
    Path("plug.py").write_text(HALF)
    (first,) = plugins.load(["plug.py"])
    assert plugins.load([str(tmp_path / "plug.py"), "./plug.py"]) == [first, first]
    assert first.methods == ("first_half",)
    assert plugins.loaded() == [str(tmp_path / "plug.py")]
    assert rules.first_half is RULES["first_half"].function
    # A file named like a library does not stand in for it.
    Path("json.py").write_text(HALF.replace("first_half", "json_half"))
    plugins.load(["json.py"])
    assert "json_half" in RULES and hasattr(sys.modules["json"], "dumps")


def test_modules_and_packages_are_found_in_the_current_folder() -> None:
    Path("plugged.py").write_text(HALF)
    assert plugins.load(["plugged"])[0].methods == ("first_half",)
    Path("plugpack").mkdir()
    Path("plugpack/__init__.py").write_text("from . import inner")
    Path("plugpack/inner.py").write_text(HALF.replace("first_half", "packed"))
    assert plugins.load(["plugpack"])[0].methods == ("packed",)
    assert str(Path.cwd()) not in sys.path


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("plog.py", None, r"plog\.py: no such file \(did you mean 'plug\.py'\?\)"),
        ("no_such_plug", None, "'no_such_plug': no such module; a file ends in .py"),
        (".", None, "neither a .py file nor a module"),
        ("plug.py", "x = 1 / 0", r"plug\.py: line 1: ZeroDivisionError: division by zero"),
        ("plug", "import sys\nsys.exit('bye')", "plug: line 2: SystemExit: bye"),
        ("plug.py", "def (:", r"plug\.py: line 1: SyntaxError: "),
        ("plug.py", "import nothing_like_that", "line 1: ModuleNotFoundError: .*nothing_like_that"),
        ("plug.py", "x = 1", "registers nothing; it needs @rlprune.rule or @rlprune.agent"),
        ("plug.py", HALF.replace("first_half", "lamp"), "rule: the name 'lamp' is taken"),
        ("plug.py", HALF.replace("first_half", "dense"), "rule: the name 'dense' is taken"),
        ("plug.py", HALF.replace("first_half", "ppo"), "'ppo' is that of a rule and of an agent"),
        ("plug.py", HALF.replace('("the first half of the groups")', ""), "rule: needs a summary"),
        ("plug.py", "import rlprune\n@rlprune.agent('x')\nclass ppo: pass", "'ppo' is taken"),
        ("plug.py", OTHER.format("recovery_step('x')", "bn"), "recovery_step: the name 'bn' is taken"),
        (
            "plug.py",
            OTHER.format("recovery_step", "f"),
            "recovery_step: needs a summary, as in @recovery_step",
        ),
        (
            "plug.py",
            OTHER.format("recovery_step('x', after='bnn')", "f"),
            r"after='bnn' is no place \(did you mean 'bn'\?\); allowed: reconstruct, bn, finetune, None",
        ),
        ("plug.py", OTHER.format("cost_metric('x')", "latency"), "cost_metric: the name 'latency' is taken"),
        ("plug.py", OTHER.format("cost_metric", "f"), "cost_metric: needs a summary"),
        ("plug.py", OTHER.format("score_kind('x')", "kl"), "score_kind: the name 'kl' is taken"),
        ("plug.py", OTHER.format("score_kind", "f"), "score_kind: needs a summary"),
        ("plug.py", OTHER.format("data_set('x')", "digits"), "data_set: the name 'digits' is taken"),
        ("plug.py", OTHER.format("data_set('x')", "help_texts"), "data_set: the name 'help_texts' is taken"),
        ("plug.py", OTHER.format("text_data", "f"), "text_data: needs a summary"),
        ("plug.py", OTHER.format("export_format('x')", "onnx"), "export_format: the name 'onnx' is taken"),
        ("plug.py", OTHER.format("importance.register('x')", "obs"), "importance: the name 'obs' is taken"),
        (
            "plug.py",
            "from rlprune.language import families as f\nf.register('llama', f.Family())",
            "line 2: ValueError: families.register: the model_type 'llama' has an adapter already",
        ),
        ("plug.py", HALF + "\nx = 1 / 0", "line 9: ZeroDivisionError"),
        ("plug.py", "import rlprune\n@rlprune.agent('x')\nclass Mine: pass", "'Mine' has no method search"),
        (
            "plug.py",
            "import rlprune\n@rlprune.agent('x')\nclass Mine:\n"
            "    def search(self, tasks, accounts, *, starts=(), seed=0, **others): pass",
            r"Mine\.search has to take one argument, as in search\(self, request\): a rlprune\.agents\.SearchRequest",
        ),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(
    name: str, text: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("plug.py").write_text(HALF if text is None else text)
    before = dict(RULES), dict(AGENTS), plugins._foreign()
    with pytest.raises(ConfigError, match=message):
        plugins.load([name])
    assert (dict(RULES), dict(AGENTS), plugins._foreign()) == before and not plugins.loaded()
    assert cli.main(["list", "rules", "--plugin", name]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "--plugin: " in printed.err


def test_two_plugins_with_one_name() -> None:
    for name in ("plug_a.py", "plug_b.py"):
        Path(name).write_text(HALF)
    with pytest.raises(ConfigError, match=r"plug_b\.py: rule: the name 'first_half' is taken"):
        plugins.load(["plug_a.py", "plug_b.py"])
    assert [Path(name).name for name in plugins.loaded()] == ["plug_a.py"]


def test_the_fingerprint_is_that_of_the_code(small_digits: Config) -> None:
    """The same file under another path is the same method; another line makes another cell."""

    def cell(config: Config, method: str) -> str:
        return benchmark.cell_key(config, benchmark.Cell(method, 0, 0.5))

    shipped = cell(small_digits, "random")
    digests, keys = [], []
    for folder, text in (("a", HALF), ("b", HALF), ("c", HALF.replace("/ 2", "/ 3"))):
        Path(folder).mkdir()
        file = Path(folder, "plug.py")
        file.write_text(text)
        plugins.load([str(file)])
        file.write_text("# changed after it was loaded")
        digests.append(plugins.fingerprint("first_half"))
        keys.append(cell(small_digits, "first_half"))
        based = small_digits.override(["search.base_rule=first_half"])
        assert cell(based, "ppo") != cell(small_digits, "ppo")
        del RULES["first_half"]
        plugins._LOADED.clear()
    assert digests[0] == digests[1] != digests[2] and keys[0] == keys[1] != keys[2]
    assert [plugins.fingerprint(name) for name in ("lamp", "ppo", "unknown")] == [None] * 3
    assert cell(small_digits, "random") == shipped, "cells of others are reused"


def test_the_fingerprint_of_a_package_is_that_of_all_its_files() -> None:
    Path("plugpack").mkdir()
    Path("plugpack/__init__.py").write_text(HALF)
    Path("plugpack/helper.py").write_text("x = 1")
    plugins.load(["plugpack"])
    before = plugins.fingerprint("first_half")
    plugins._LOADED.clear()  # as if the module had only been imported
    assert plugins.fingerprint("first_half") == before
    Path("plugpack/helper.py").write_text("x = 2")
    assert plugins.fingerprint("first_half") != before


def test_what_is_registered_without_a_plugin_has_a_fingerprint_too() -> None:
    @agent("spends nothing")
    def idle(session: object) -> None:
        """Only the starts."""

    assert plugins.fingerprint("idle") is not None
    assert AGENTS["idle"].summary == "spends nothing"
    assert make_agent("idle").function is idle
    with pytest.raises(ConfigError, match="'idle' is taken"):
        rule_or_agent = agent("again")
        rule_or_agent(idle)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (np.ones(3), r"must return shape \(2,\), one number a group, got \(3,\)"),
        (np.array([1.0, np.nan]), "finite numbers of 0 and more"),
        ([1, -1], "finite numbers of 0 and more"),
        ([0, 0], "not all of them 0"),
        (None, r"rule 'plugwrong': must return"),
        (["a", "b"], "must return 2 numbers, got list"),
    ],
)
def test_a_rule_that_returns_no_distribution_is_named(returned: object, message: str) -> None:
    from types import SimpleNamespace

    @rule("wrong")
    def plugwrong(context: object) -> object:
        return returned

    context = SimpleNamespace(
        space=SimpleNamespace(groups=[1, 2], wing="vision"), active=np.array([True, True])
    )
    with pytest.raises(ConfigError, match=message):
        RULES["plugwrong"].function(context)


def test_what_the_settings_name_is_part_of_the_fingerprint(small_digits: Config) -> None:
    keys = []
    cell = benchmark.Cell("random", 0, 0.5)
    for text in (ALL, ALL, ALL.replace("0 * targets", "1 * targets")):
        Path("plug.py").write_text(text)
        with forgotten("plug"):
            (loaded,) = plugins.load(["plug.py"])
            assert loaded.others == (
                "cost metric plug_cost", "kind of score plug_score", "language family plug_type",
                "recovery step plug_step",
            )  # fmt: skip
            named = [
                ["recovery.steps=[plug_step]"],
                ["budget.metric=plug_cost"],
                ["score.kind=plug_score"],
            ]
            keys.append([benchmark.cell_key(small_digits.override(words), cell) for words in named])
            about = plugins.fingerprint_of_settings(small_digits)
            assert list(about) == ["language family plug_type"], "which any model may be of"
    assert keys[0] == keys[1] and not set(keys[0]) & set(keys[2])
    assert plugins.fingerprint_of_settings(small_digits) == {}


def test_names_are_known_to_the_settings_while_their_plugin_is_loaded() -> None:
    Path("plug.py").write_text(ALL)
    with pytest.raises(ConfigError, match=r"score\.kind: 'plug_score' is not one of kl, loss, accuracy"):
        ScoreConfig(kind="plug_score")
    plugins.load(["plug.py"])
    assert ScoreConfig(kind="plug_score").kind == "plug_score"
    with pytest.raises(ConfigError, match=r"is not one of .*\bplug_step\b.*\(did you mean 'plug_step'\?\)"):
        RecoveryConfig(steps=("plugstep",))
    assert "plug_cost" in json_schema()["$defs"]["BudgetConfig"]["properties"]["metric"]["enum"]


def test_an_installed_plugin_needs_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("plug_here.py").write_text(HALF + ALL)
    install(tmp_path / "plug_here.py", {"mine": "plug_here"}, monkeypatch)
    Path("plug_here.py").write_text("1 / 0")  # the current folder does not stand in for what is installed
    assert BudgetConfig(metric="plug_cost").metric == "plug_cost", "settings look there by themselves"
    assert "first_half" in RULES and plugins.loaded() == ["plug_here"]
    assert plugins.load(["plug_here"])[0].methods == ("first_half",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "line 1: ZeroDivisionError: division by zero"),
        ("x = 1", "registers nothing"),
        (HALF.replace("first_half", "lamp"), "rule: the name 'lamp' is taken; choose another"),
        (None, "no such module"),
    ],
)
def test_a_broken_installed_plugin_is_one_line_that_names_the_distribution(
    text: str | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("plug_broken.py").write_text(text or "")
    site = install(tmp_path / "plug_broken.py", {"mine": "plug_broken"}, monkeypatch)
    if text is None:
        (site / "plug_broken.py").unlink()
    for _ in range(2):
        assert cli.main(["list", "rules"]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1
        assert (
            printed.err.startswith("rlprune: error: the plugin 'mine' of mine-dist: ")
            and message in printed.err
        )


def test_the_processes_of_a_benchmark_know_installed_plugins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_digits: Config
) -> None:
    Path("plug_here.py").write_text(HALF + ALL)
    site = install(tmp_path / "plug_here.py", {"mine": "plug_here"}, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    workers = ["execution.engine=processes", "execution.workers=2"]
    config = small_digits.override(["score.kind=plug_score", "recovery.steps=[plug_step]", *workers])
    found = benchmark.run(config, ["first_half", "uniform"], 1, 4, out=tmp_path / "compared")
    assert {row["method"]: row["score"] for row in found["rows"]} == {
        "dense": 0,
        "first_half": 0,
        "uniform": 0,
    }
