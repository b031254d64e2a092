"""The scripts that write the documents: they start, and their verdicts and shares are right."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rlprune import benchmark

DOCS = Path(__file__).parent.parent / "docs"
SCRIPTS = sorted((DOCS / "scripts").glob("*.py"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_starts(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        load(script.stem).main()
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_the_index_names_every_script_and_document() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in SCRIPTS} == set(re.findall(r"docs/scripts/(\w+\.py)", index))
    assert {path.name for path in DOCS.glob("*.md")} - {"README.md"} <= set(re.findall(r"\]\((.*?)\)", index))


def test_a_verdict_needs_every_seed_for_the_rule_and_the_mean_for_random() -> None:
    scores = {"lamp": [-2.0, -2.0], "random": [-1.4, -1.9], "ppo": [-1.5, -1.7]}
    kinds = {"lamp": "rule", "random": "baseline", "ppo": "agent"}
    rows = [
        {"method": name, "kind": kinds[name], "seed": seed, "score": score}
        for name, values in scores.items()
        for seed, score in enumerate(values)
    ]
    results = load("results")
    text = results.verdict(benchmark.summarise(rows))
    assert "is above that of the best rule (lamp) on every seed: 2 of 2" in text
    assert "is above that of random search on average: 1 of 2" in text
    rows[-1]["score"] = -2.0
    text = results.verdict(benchmark.summarise(rows))
    assert "is **not** above that of the best rule (lamp) on every seed: 1 of 2" in text
    assert "is **not** above that of random search on average" in text


def test_the_share_of_a_gain_is_relative_to_the_best_rule() -> None:
    transfer = load("transfer")
    scores = {"uniform": -3.0, "best rule": -2.0, "policy": -1.5, "full search": -1.0}
    assert [transfer.share(scores, way) for way in scores] == [-1.0, 0.0, 0.5, 1.0]
    assert math.isnan(transfer.share(scores | {"full search": -2.0}, "policy"))
    assert "-1.5000 (50%)" in transfer.table({7: scores}) and "model seed 7" in transfer.table({7: scores})
