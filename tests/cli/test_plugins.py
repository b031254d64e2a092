"""--plugin: what is loaded, what is refused in one line, and the hash that results are kept under."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rlprune import plugins, rule, rules
from rlprune.agents import AGENTS, agent, make_agent
from rlprune.benchmarks import benchmark
from rlprune.cli import main as cli
from rlprune.config.config import Config
from rlprune.errors import ConfigError
from rlprune.rules import RULES

HALF = """
import numpy as np
import rlprune

@rlprune.rule("the first half of the groups")
def first_half(context):
    return np.arange(len(context.space.groups)) < len(context.space.groups) / 2
"""


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own; registries and modules as before."""
    before, modules = (dict(RULES), dict(AGENTS), dict(plugins._LOADED)), set(sys.modules)
    monkeypatch.chdir(tmp_path)
    yield
    for registry, content in zip((RULES, AGENTS, plugins._LOADED), before, strict=True):
        registry.clear()
        registry.update(content)
    for name in set(sys.modules) - modules:
        if "plug" in name:
            del sys.modules[name]


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
    before = dict(RULES), dict(AGENTS)
    with pytest.raises(ConfigError, match=message):
        plugins.load([name])
    assert (dict(RULES), dict(AGENTS)) == before and not plugins.loaded()
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
