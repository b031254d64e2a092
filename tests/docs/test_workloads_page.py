"""docs/workloads.md as the text stands: its workloads are trained, its table is that of the tasks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.registries import forgotten
from rlprune.cli.main import main
from rlprune.workloads.tasks import TASK_TYPES, find_task

PAGE = Path(__file__).parent.parent.parent / "docs" / "workloads.md"
TEXT = PAGE.read_text(encoding="utf-8")
QUICK = (
    "search.evaluations=3",
    "search.agent=random",
    "search.baselines=[]",
    "finish.rules=false",
    "device=cpu",
)


@pytest.fixture(autouse=True)
def mywork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    Path("mywork.py").write_text("\n\n".join(blocks), encoding="utf-8")
    (config,) = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.M | re.S)
    Path("mywork.yaml").write_text(config, encoding="utf-8")
    with forgotten("mywork"):
        yield


@pytest.mark.parametrize(
    ("name", "task", "metric"),
    [
        ("Sizes", "regression", "R2"),
        ("pair", "classification", "accuracy"),
        ("Ranked", "regression", "SpearmanCorrCoef"),
        ("Directions", "angles", "share within a tenth"),
    ],
)
def test_every_workload_of_the_page_is_trained(name: str, task: str, metric: str) -> None:
    settings = [f"workload=mywork:{name}", "budget.target=70%", *QUICK]
    assert main(["train", "mywork.yaml", "--out", "run", "--set", *settings]) == 0
    results = json.loads(Path("run/results.json").read_text())
    assert (results["workload"]["task"], results["workload"]["metric"]) == (task, metric)
    assert results["score"] == ("score_fn" if name == "Ranked" else "kl")
    rows = {row["kind"]: row for row in results["rows"]}
    assert rows["agent"]["cost"] <= 0.7 * rows["dense"]["cost"]


def test_the_table_is_that_of_the_tasks() -> None:
    table = TEXT.partition("| task |")[2].partition("\n\n")[0]
    named = dict(re.findall(r"^\| `(\w+)` .* \| ([^|]+) \|$", table, re.M))
    TASK_TYPES.complete()
    assert set(named) == set(TASK_TYPES)
    assert {name: find_task(name).metric_name for name in named if name != "own"} == {
        name: metric.strip() for name, metric in named.items() if name != "own"
    }
