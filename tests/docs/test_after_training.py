"""docs/scripts/finish_start.py, reward_after_training.py and peers.py: what their pages say of given measurements."""

from __future__ import annotations

import json
import re
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


def squeezed(text: str) -> str:
    """A table without the spaces that align it."""
    return re.sub(" +", " ", text)


def reward_cells(script: Any, losses: dict[str, float]) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for seed in range(3):
        for reward, loss in losses.items():
            cells[f"digits-50 {seed} search {reward}"] = {
                "spent": 300 if reward == script.CLOSED else 60,
                "seconds": 50.0,
            }
            cells[f"digits-50 {seed} tuned 6 {reward}"] = {
                "before": 1.0, "before_accuracy": 0.5, "loss": loss + seed * (loss - 0.1), "accuracy": 1 - loss
            }  # fmt: skip
        cells[f"digits-50 {seed} fidelity 6"] = {
            script.TIERS[script.CLOSED]: 0.25, script.TIERS[script.STEPS]: 0.5, "none": 0.1, "ceiling": 0.7
        }  # fmt: skip
    return cells


@pytest.mark.parametrize(("steps", "better"), [(0.1, "20 steps"), (0.9, "closed form")])
def test_the_page_of_rewards_names_the_one_with_the_lower_loss(steps: float, better: str) -> None:
    script = load_script("reward_after_training")
    cells = reward_cells(script, {script.CLOSED: 0.4, script.STEPS: steps})
    verdict = script.verdict(cells)
    assert f"50% of the MACs, 6 epochs: the plans of the reward after **{better}**" in verdict
    assert "is clear of zero" in verdict and "closed form 0.25, 20 steps 0.50 (3 dense models)" in verdict
    assert "| 20 steps | 60 | 50 |" in squeezed(script.searches(cells, "digits-50"))
    assert "| reconstruct + bn + 20 steps | 0.50 |" in squeezed(script.correlations(cells, "digits-50"))
    page = script.page(cells)
    assert "## digits, 50% of the MACs" in page and "## digits, 30%" not in page
    assert (
        "--only searches 6 30 fidelity-6 fidelity-30   # done of 5 seeds: 3 of searches, 3 of 6, 0 of 30, 3 of"
        in page
    )


def test_what_has_been_measured_is_not_measured_again(tmp_path: Path) -> None:
    for name in ("finish_start", "reward_after_training"):
        script, path = load_script(name), tmp_path / f"{name}.json"
        assert script.Kept(path).ask("a", lambda: {"loss": 1.0}) == {"loss": 1.0}
        assert script.Kept(path).ask("a", lambda: pytest.fail("measured twice")) == {"loss": 1.0}


@pytest.mark.parametrize("name", ["finish_start", "reward_after_training"])
def test_the_committed_page_is_that_of_the_committed_measurements(name: str) -> None:
    page = DOCS / f"{name.replace('_', '-')}.md"
    cells = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))

    def figures(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith(("|", "-"))]

    assert figures(load_script(name).page(cells)) == figures(page.read_text(encoding="utf-8"))


def test_the_page_of_peers_says_where_fastnas_kept_its_start() -> None:
    script = load_script("peers")

    def row(method: str, seed: int, widths: list[int]) -> dict[str, Any]:
        return {"method": method, "seed": seed, "widths": widths}

    rows = [
        row("uniform", 0, [4, 4]),
        row("uniform", 1, [4, 4]),
        row("fastnas", 0, [4, 4]),
        row("fastnas", 1, [3, 5]),
    ]
    assert script.start_kept({"rows": rows}).startswith(
        "**On 1 of 2 seeds the row of `fastnas` is the plan of `uniform`"
    )
    assert script.start_kept({"rows": [rows[0], row("fastnas", 0, [3, 5])]}) == ""
