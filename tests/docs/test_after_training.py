"""docs/scripts/finish_start.py: what its page says of given measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.pages import DOCS
from helpers.scripts import load_script


def start_cell(recovered: float, statistics: float, chosen: str) -> dict[str, Any]:
    """A plan fine-tuned from both starts; validation is on the other side of test."""
    return {
        "recovered": {"before": [1.0, 0.5], "after": [recovered, 0.9], "validation": [statistics]},
        "statistics": {"before": [2.0, 0.4], "after": [statistics, 0.95], "validation": [recovered]},
        "chosen": chosen,
        "trial": 10,
    }


def test_the_table_of_starts_pairs_by_seed_and_counts_what_auto_chose() -> None:
    script = load_script("finish_start")
    cells = {
        f"digits-50 {seed} 6 {plan}": start_cell(
            0.3 + seed, 0.2 + seed, "statistics" if seed else "recovered"
        )
        for seed in (0, 1)
        for plan in (*script.RULES, script.AGENT)
    }
    cells["digits-50 2 6 uniform"] = start_cell(
        9.0, 9.0, "recovered"
    )  # a seed that is not whole does not count
    text, line = script.table(cells, "digits-50", 6)
    assert "2 seed(s); a trial has 10 steps" in text
    row = next(row for row in text.splitlines() if row.startswith("| lamp"))
    cell = [part.strip() for part in row.split("|")[2:-1]]
    assert cell[:3] == ["0.8000 / 0.9000", "0.7000 / 0.9500", "0.7500 / 0.9250"]
    assert all(
        part.startswith(mean) for part, mean in zip(cell[3:], ("-0.1000", "-0.0500", "+0.0500"), strict=True)
    )
    assert all(part.endswith(wins) for part, wins in zip(cell[3:], ("(2/2)", "(1/2)", "(2/2)"), strict=True))
    assert "lowest mean test loss `statistics`" in line and "by validation loss +0.1000" in line
    assert (
        "of 8 `auto` took statistics 4 times and the better start 4 times on validation, 4 times on test"
        in line
    )
    assert script.table(cells, "digits-30", 6) == ("", "")
    page = script.page(cells)
    assert "--workloads digits-50 --epochs 6   # 2 of 5 seeds done" in page
    assert "--workloads digits-50 --epochs 30   # 0 of 5 seeds done" in page


def test_what_has_been_measured_is_not_measured_again(tmp_path: Path) -> None:
    script, path = load_script("finish_start"), tmp_path / "kept.json"
    assert script.Kept(path).ask("a", lambda: {"loss": 1.0}) == {"loss": 1.0}
    assert script.Kept(path).ask("a", lambda: pytest.fail("measured twice")) == {"loss": 1.0}


@pytest.mark.parametrize("name", ["finish_start"])
def test_the_committed_page_is_that_of_the_committed_measurements(name: str) -> None:
    page = DOCS / f"{name.replace('_', '-')}.md"
    cells = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))

    def figures(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith(("|", "-"))]

    assert figures(load_script(name).page(cells)) == figures(page.read_text(encoding="utf-8"))
