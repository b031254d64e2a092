"""The README's ten lines, docs/own-model.md and docs/python.md run as the texts stand, in empty folders."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from functools import reduce
from pathlib import Path
from types import ModuleType

import pytest

import rlprune
from helpers.pages import DOCS, blocks

ROOT = DOCS.parent
README, FIRST, PAGE = ROOT / "README.md", DOCS / "own-model.md", DOCS / "python.md"
SIGNATURE = re.compile(r"^```text\nrlprune\.([\w.]+)(\(.*?\))\n```$", re.M | re.S)
# Runs the first file, then the blocks of the second one among the names that it left.
GO_ON = """
import json, pathlib, runpy, sys
names = runpy.run_path(sys.argv[1])
print(sorted(map(str, pathlib.Path().rglob("*"))), file=open(sys.argv[3], "w"))
for number, block in enumerate(json.loads(pathlib.Path(sys.argv[2]).read_text())):
    exec(compile(block, f"block {number}", "exec"), names)
"""


def example() -> str:
    """The block between the marks of the page on models of one's own."""
    text = FIRST.read_text(encoding="utf-8")
    (marked,) = re.findall(r"<!-- example:begin -->\n```python\n(.*?)```\n<!-- example:end -->", text, re.S)
    return str(marked)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The folder afterwards, what stood in it after the first page's example, and what was printed."""
    scripts, folder = tmp_path_factory.mktemp("scripts"), tmp_path_factory.mktemp("empty")
    (scripts / "example.py").write_text(example(), encoding="utf-8")
    following = [*blocks(FIRST, "python")[1:], *blocks(PAGE, "python")]
    (scripts / "blocks.json").write_text(json.dumps(following), encoding="utf-8")
    words = ["-c", GO_ON, *(str(scripts / name) for name in ("example.py", "blocks.json", "files.txt"))]
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, (scripts / "files.txt").read_text(encoding="utf-8"), done.stdout


@pytest.mark.slow
def test_the_first_example_leaves_what_it_says(ran: tuple[Path, str, str]) -> None:
    folder, files, printed = ran
    for name in ("report.html", "runs/mine/pruned/model.safetensors", "runs/mine/policy/policy.json"):
        assert name in files
    table = printed.splitlines()
    assert "accuracy" in table[0] and "fine-tuned" in table[1]
    assert {"dense", "uniform", "random", "ppo"} <= {line.split(" ")[0] for line in table}
    rows = rlprune.PruningResult.read(folder / "runs" / "mine").table
    (dense,), (ours,) = ([row for row in rows if row["method"] == name] for name in ("dense", "ppo"))
    assert 0.48 < ours["macs"] / dense["macs"] <= 0.5 and ours["test"] > 0.9


@pytest.mark.slow
def test_the_readmes_ten_lines_learn_a_distribution(tmp_path: Path) -> None:
    (code,) = blocks(README, "python")
    assert sum(bool(line.strip()) and not line.startswith("#") for line in code.splitlines()) <= 10
    done = subprocess.run(
        [sys.executable, "-c", code + "\nassert smaller is not workload.model"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = rlprune.PruningResult.read(tmp_path / "runs" / "ten-lines").table
    (dense,), (ours,) = ([row for row in rows if row["method"] == name] for name in ("dense", "ppo"))
    assert 0.48 < ours["macs"] / dense["macs"] <= 0.5 and ours["test_finetuned"] > 0.9


@pytest.mark.slow
def test_the_examples_of_the_page_go_on_from_it(ran: tuple[Path, str, str]) -> None:
    folder = ran[0]
    for name in ("runs/small", "runs/applied", "runs/compared", "runs/lamp", "runs/mine-40"):
        assert (folder / name).is_dir(), name


def test_the_page_names_all_that_is_public() -> None:
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"rlprune\.(\w+)", text))
    assert not set(rlprune.__all__) - named
    headings = set(re.findall(r"^### `rlprune\.(\w+)[\w.]*`$", text, re.M))
    explained = {
        name
        for name in rlprune.__all__
        if not name.endswith("Error") and not isinstance(getattr(rlprune, name), ModuleType)
    }
    in_the_table = set(re.findall(r"`rlprune\.(\w+)`", text.partition("## Decorators for your own parts")[2]))
    assert not explained - headings - in_the_table - {"Group", "__version__"}


def test_the_signatures_of_the_page_are_those_of_the_code() -> None:
    found = SIGNATURE.findall(PAGE.read_text(encoding="utf-8"))
    assert len(found) > 20
    for path, given in found:
        signature = inspect.signature(reduce(getattr, path.split("."), rlprune))
        bare = [p.replace(annotation=p.empty) for name, p in signature.parameters.items() if name != "self"]
        assert re.sub(r"\s+", "", given) == re.sub(r"\s+", "", str(inspect.Signature(bare))), path
