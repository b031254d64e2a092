"""The documents: their scripts start and judge rightly, and what the pages name (commands, settings, files) exists."""

from __future__ import annotations

import json
import math
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml

import rlprune
from helpers.pages import EACH_PAGE, blocks, command_lines
from helpers.scripts import load_script
from helpers.synthetic import FakeEvaluator
from rlprune.cli import main as cli
from rlprune.config.config import RENAMED, Config, settings_reference, shipped_configs
from rlprune.importance.importance import IMPORTANCES
from rlprune.language.describe import COST_NOTES
from rlprune.language.families import FAMILIES
from rlprune.language.files.pretrained import CODE
from rlprune.language.tuning.finetune import METHODS
from rlprune.rules import RULES

DOCS = Path(__file__).parent.parent.parent / "docs"
SCRIPTS = sorted((DOCS / "scripts").glob("*.py"))


@pytest.mark.parametrize(
    "script", [p for p in SCRIPTS if "def main(" in p.read_text()], ids=lambda path: path.stem
)
def test_every_script_starts(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        load_script(script.stem).main()
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_the_index_names_every_script_and_document() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in SCRIPTS} == set(re.findall(r"docs/scripts/(\w+\.py)", index))
    assert {path.name for path in DOCS.glob("*.md")} - {"README.md"} <= set(re.findall(r"\]\((.*?)\)", index))


def test_the_site_has_a_place_for_every_document() -> None:
    nav = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    named = re.findall(r"[\w-]+\.md", nav)
    assert len(named) == len(set(named))
    generated = {"api.md", "commands.md", "settings.md"}
    assert set(named) == {path.name for path in DOCS.glob("*.md")} | generated


def test_the_budget_curve_of_several_seeds_is_that_of_their_means() -> None:
    script = load_script("budget_curve")
    own, policy = "a search of its own", "policy"
    seeds = [
        [
            {"budget": 0.5, "method": "lamp", "kind": "rule", "score": -1.0},
            {"budget": 0.5, "method": policy, "kind": "agent", "score": score},
            {"budget": 0.5, "method": own, "score": -0.4},
            {"budget": 0.6, "method": policy, "kind": "agent", "score": -0.3},
        ]
        for score in (-0.5, -0.9)
    ]
    rows = script.together(seeds).splitlines()[2:]
    assert len(rows) == 1 and "-0.7000" in rows[0] and "| 50% " in rows[0]  # (-0.7 + 1) / (-0.4 + 1)


def test_the_share_of_a_gain_is_relative_to_the_best_rule() -> None:
    transfer = load_script("transfer")
    scores = {"uniform": -3.0, "best rule": -2.0, "policy": -1.5, "full search": -1.0}
    found = {name: transfer.Way((1, 2), score, 2 * score, 0.5) for name, score in scores.items()}
    assert [transfer.share([found], way, "score") for way in found] == [-1.0, 0.0, 0.5, 1.0]
    none = found | {"full search": transfer.Way((1, 2), -2.0, -4.0, 0.5)}
    assert math.isnan(transfer.share([none], "policy", "score"))
    # Gains of 0.5 and 0.25 of 1 and 0: of the mean gain of 0.5, 0.375 is a share of 75%.
    other = none | {"policy": transfer.Way((1, 2), -1.75, -3.5, 0.5)}
    assert transfer.share([found, other], "policy", "score") == 0.75
    table = transfer.table({"model seed 7": found}, "score")
    assert "-1.5000 (50%)" in table and "model seed 7" in table and "test loss" not in table
    tested = transfer.table({"model seed 7": found}, "test")
    assert "-3.0000 (50%)" in tested and "0.5000" in tested


def test_a_view_hides_columns_and_adds_probes() -> None:
    script = load_script("features")
    columns = {name: i for i, name in enumerate(script.FEATURES)}

    def seen(name: str) -> np.ndarray:
        return script.Viewed(FakeEvaluator(4), 0.5, view=script.VIEWS[name]).observe(0.5)

    whole, hidden, probed = seen("as shipped"), seen("depth alone"), seen("probes around the base plan")
    shown = [columns[name] for name in script.SHOWN_ALWAYS]
    assert (hidden[:, shown] == whole[:, shown]).all() and np.count_nonzero(hidden.any(axis=0)) <= len(shown)
    added = [columns[name] for name in script.PROBED]
    assert not whole[:, added].any() and probed[:, added].all()
    others = [i for i in columns.values() if i not in added]
    assert (probed[:, others] == whole[:, others]).all()
    rows = [{"answer": -0.5, "rule": -1.0, "search": 0.0}, {"answer": -1.0, "rule": -1.0, "search": 0.0}]
    assert script.share(rows) == 0.25


def test_a_way_that_is_on_record_is_not_measured_again(tmp_path: Path) -> None:
    transfer = load_script("transfer")
    record, asked = tmp_path / "ways-7.json", []

    def way(name: str, score: float) -> transfer.Way:
        asked.append(name)
        return transfer.Way((1, 2), score, score, 0.5)

    first = {"uniform": lambda: way("uniform", -1.0)}
    assert transfer.recorded(record, first)["uniform"].score == -1.0
    more = {"policy": lambda: way("policy", -0.5), "uniform": lambda: way("uniform", -9.0)}
    found = transfer.recorded(record, more)
    assert asked == ["uniform", "policy"]
    assert list(found) == ["policy", "uniform"] and found["uniform"] == transfer.Way((1, 2), -1.0, -1.0, 0.5)


def test_the_summary_of_places_leaves_out_what_a_place_has_not() -> None:
    script = load_script("transfer_elsewhere")

    def result(**scores: float) -> dict[str, dict[str, object]]:
        names = {
            "rule": "best rule",
            "full": "full search",
            "policy": "policy, 8 checkpoints ({}), and 20 evaluations",
        }
        builds = 96 if "copied" in scores else 144
        return {
            "model seed 7": {
                names.get(n, "widths copied").format(builds): script.Way((1,), score, 2 * score, 0.5)
                for n, score in scores.items()
            }
        }

    near, far = result(rule=-2, copied=-1.5, policy=-1, full=-1), result(rule=-2, policy=-1.25, full=-1)
    rows = script.summary({"recipe": near, "depth": far}).splitlines()[2:]
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in rows}
    assert cells["widths copied"] == ["50%", "50%", "–", "–"]
    assert cells["policy, 8 checkpoints, and 20 evaluations"] == ["100%", "100%", "75%", "75%"]


def test_the_fidelity_page_says_what_is_open_and_what_is_below_the_best() -> None:
    script = load_script("fidelity")
    row = {"recovery": "bn", "used": True, "spearman": 0.3, "low": 0.1, "high": 0.5, "difference": -0.5}
    row |= {
        "difference_low": -0.8,
        "difference_high": -0.2,
        "seconds": 0.01,
        "reads": 300,
        "halves": 0.9,
        "by_samples": {"50": 0.3},
    }
    best = row | {
        "recovery": "reconstruct",
        "used": False,
        "spearman": 0.8,
        "difference": 0.0,
        "seconds": 0.02,
    }
    content = {
        "rows": [best, row],
        "best": "reconstruct",
        "recommended": "reconstruct",
        "used": "bn",
        "samples": 50,
    }
    content |= {
        "unit": "images",
        "tokens": 1,
        "score": "kl",
        "name": "digits",
        "budget": 0.5,
        "metric": "macs",
    }
    content |= {
        "ceiling": 0.4,
        "candidates": 40,
        "length": "6 epochs",
        "points": [{"final_seconds": 90.0}] * 2,
    }
    content |= {"hardware": {"processor": "CPU", "threads": 1, "libraries": {"torch": "2"}}}
    text = script.page({"digits-50": content})
    assert "below the best (`reconstruct`): **yes**" in text
    assert "took 3 min" in text
    assert "in use: `bn`, which is significantly below it" in text
    assert "| bn (in use)" in text and "-0.80 to -0.20" in text
    opened = text[text.index("## Open") :]
    assert all(study.command in opened for name, study in script.STUDIES.items() if name != "digits-50")
    assert "rlprune fidelity digits --candidates" not in opened
    shipped = {study.config for study in script.STUDIES.values()}
    own = {name for name in shipped_configs() if not name.startswith("published/")}
    assert shipped == own, "every shipped config of ours has a study"


# What the pages promise exists.

GUIDE = DOCS / "language-models.md"


def inline(page: Path) -> list[str]:
    """The text of every inline code span outside of fenced blocks."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", text)


def is_setting(path: str) -> bool:
    known = {s.path: s.type for s in settings_reference()}
    # The keys of a table (data.files, model.arguments) are free.
    tables = ("data.files.", "model.arguments.")
    # A recorded command may hold a name that still works.
    return (
        path in known
        or path in RENAMED
        or path.startswith(tables)
        or any(name.startswith(f"{path}.") for name in known)
    )


@EACH_PAGE
def test_every_command_of_a_page_is_understood(page: Path) -> None:
    for words in command_lines(page):
        if words[0] == "rlprune":
            args = cli.build_parser().parse_args(cli._separate_sets(words[1:]))
            assert args.command
        elif words[-1:] == ["--help"] or "rlprune.experiments.tune" not in words:
            continue
        for word in words[words.index("--set") + 1 :] if "--set" in words else []:
            if "=" in word and not word.startswith("-"):
                assert is_setting(word.partition("=")[0]), word


@EACH_PAGE
def test_every_name_in_a_page_exists(page: Path) -> None:
    commands = {word for action in cli.build_parser()._actions for word in action.choices or ()}
    options = set(cli._all_options(cli.build_parser()))
    sections = {s.path.partition(".")[0] for s in settings_reference() if "." in s.path}
    for text in inline(page):
        command = re.match(r"rlprune (\w+)", text)
        assert command is None or command[1] in commands, text
        # Scripts have options of their own; that they start is tested above.
        for option in [] if "python" in text else re.findall(r"(?<!\S)--[a-z-]+", text):
            assert option in options, text
        path = re.match(r"(\w+(?:\.\w+)+)(?:=|: |$)", text)
        # Files and modules of a model look like settings.
        other = text.startswith("model.layers.") or text.endswith((".py", ".json", ".md", ".safetensors"))
        if path and path[1].partition(".")[0] in sections and not other:
            assert is_setting(path[1]), text


@EACH_PAGE
def test_a_page_uses_the_plain_word(page: Path) -> None:
    """Words that readers stumbled over: next to, compared with, apart from; the one who; rlprune's; most expensive."""
    found = re.search(r"\b(beside|whoever|of ours|dearest)\b", page.read_text(encoding="utf-8"), re.I)
    assert found is None, found


@EACH_PAGE
def test_every_settings_block_of_a_page_is_valid(page: Path) -> None:
    for block in blocks(page, "yaml"):
        Config.from_dict(yaml.safe_load(block))


@EACH_PAGE
def test_every_python_block_of_a_page_names_what_there_is(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")
        for path in re.findall(r"\brlprune((?:\.\w+)+)", block):
            found: object = rlprune
            for name in path[1:].split("."):
                found = getattr(found, name)


@EACH_PAGE
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_guide_to_language_models_is_complete() -> None:
    code = inline(GUIDE)
    assert {name for name, rule in RULES.items() if rule.wing == "language"} <= set(code)
    assert set(IMPORTANCES) - {"bn_scale"} <= set(code)
    assert {*METHODS, *CODE} <= set(code)
    assert set(COST_NOTES) <= set(code)


def test_the_page_of_installation_names_every_extra() -> None:
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", (DOCS / "install.md").read_text(encoding="utf-8"), re.M)
    named = {name for row in rows for name in re.findall(r"\w+", row)}
    assert named == set(project["optional-dependencies"]) - {"dev"}


def test_the_readme_is_short_and_its_table_is_what_the_script_writes(tmp_path: Path) -> None:
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    script = load_script("results")
    every = {path.stem: json.loads(path.read_text()) for path in sorted((DOCS / "results").glob("*.json"))}
    emptied = re.sub(f"({script.BEGIN}).*({script.END})", r"\1\2", text, flags=re.S)
    assert emptied != text
    (tmp_path / "README.md").write_text(emptied, encoding="utf-8")
    script.write_readme(tmp_path / "README.md", every)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text
    header, rows = script.after_finetune(every)
    assert rows and all(len(row) == len(header) for row in rows)
    assert len({(row[0], row[2]) for row in rows}) == len(rows)
    # The best rule stands there by what is shown, not by the score.
    rules = [e for e in every["cifar10_resnet20"]["summary"] if e["kind"] == "rule"]
    best = max(rules, key=lambda entry: entry["test_finetuned"]["mean"])
    assert re.fullmatch(rf"{100 * best['test_finetuned']['mean']:.1f} \[.*\] {best['method']}", rows[0][4])


def test_the_drawing_is_what_its_script_draws() -> None:
    assert load_script("drawing").drawing() == (DOCS / "loop.svg").read_text(encoding="utf-8")


def test_the_changelog_counts_what_there_is() -> None:
    text = (DOCS.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"{len(FAMILIES)} model types" in text
    assert "ten rules for language models" in text
    assert sum(rule.wing == "language" and not rule.on_request for rule in RULES.values()) == 10


def test_the_page_of_families_says_what_was_found_of_every_type() -> None:
    script = load_script("families")
    types = json.loads((DOCS / "family-types.json").read_text(encoding="utf-8"))["types"]
    page = (DOCS / "families.md").read_text(encoding="utf-8")
    parts = script.by_result(types)
    assert len(parts["works"]) >= 48 and sum(len(found) for found in parts.values()) == len(types)
    assert (
        f"**{len(parts['works'])} work**" in page
        and f"{len(parts['refused'])} are refused" in page
        and f"{len(parts['WRONG'])} came out wrong" in page
    )
    assert all(f"| {kind} " in page for kind in types)
    assert all("\n" not in found["why"] for found in parts["refused"].values())
