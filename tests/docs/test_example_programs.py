"""The programs and the notebook of examples/: all of them run, in an empty folder, and end with what they promise."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.pages import DOCS
from helpers.scripts import load_script

FOLDER = DOCS.parent / "examples"
PROGRAMS = sorted(FOLDER.glob("*.py"))
NOTEBOOK = FOLDER / "first_search.ipynb"
# What the last line of each has to match.
LAST = {
    "hf_vit": r"ViT: (5\d|60)\.\d% of the MACs, test accuracy 0\.[89]",
    "latency_budget": r"(7\d|80)% of the time by the table with \d+% of the MACs, test accuracy 0\.9",
    "one_policy_three_checkpoints": r"the policy is ahead of uniform pruning on [23] of 3 networks",
    "own_cnn": r"(3\d|40)\.\d% of the MACs, test accuracy 0\.9",
    "own_rule": r"best after the fine-tune: \w+; report: runs/own-rule/report.html",
    "segmentation": r"U-Net: (2\d|30)\.\d% of the MACs, test mIoU 0\.\d+ before and 0\.[6-9]\d+ after",
    "timm_image_folder": r"timm:test_resnet: (4\d|50)\.\d% of the MACs, test accuracy 0\.[89]",
    "tiny_llama_gguf": r"model\.gguf: \d+ tensors, [\d,]+ parameters, \d+ kB",
}
NEEDS = {"timm_image_folder": ("timm",), "tiny_llama_gguf": ("gguf",)}
QUICK: tuple[str, ...] = ()
MOST_SECONDS = 120


def test_every_program_is_on_the_page_and_has_a_test() -> None:
    named = set(re.findall(r"^\| `([\w.]+)`", (DOCS / "examples.md").read_text(encoding="utf-8"), re.M))
    assert named == {path.name for path in [*PROGRAMS, NOTEBOOK]}
    assert {path.stem for path in PROGRAMS} == set(LAST)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_says_how_it_is_run_and_uses_public_names(program: Path) -> None:
    tree = ast.parse(program.read_text(encoding="utf-8"))
    assert f"python examples/{program.name}" in (ast.get_docstring(tree) or "")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlprune"):
            assert node.module is not None and node.module.count(".") <= 1, node.module
            assert all(not alias.name.startswith("_") for alias in node.names)


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(path, marks=() if path.stem in QUICK else pytest.mark.slow, id=path.stem)
        for path in PROGRAMS
    ],
)
def test_a_program_runs(program: Path, tmp_path: Path) -> None:
    for package in NEEDS.get(program.stem, ()):
        pytest.importorskip(package)
    env = os.environ | {"PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.splitlines()[-1]
    print(f"{program.name}: {time.monotonic() - began:.0f} s: {last}")
    assert re.search(LAST[program.stem], last), last


def test_the_notebook_holds_its_outputs_and_nothing_of_a_machine() -> None:
    script = load_script("notebook")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in cells] == [*script.CELLS]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert all(cell["outputs"] for cell in code) and not any(o["output_type"] == "error" for o in outputs)
    text = json.dumps([output.get("text", "") for output in outputs])
    assert not re.search(r"/(home|root|tmp|work|usr)/", text)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert NOTEBOOK.stat().st_size < 200_000


@pytest.mark.slow
def test_the_notebook_runs() -> None:
    for package in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(package)
    script = load_script("notebook")
    book = script.run(script.notebook())
    assert all(cell.outputs for cell in book.cells if cell.cell_type == "code")
