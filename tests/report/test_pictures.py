"""The charts of the report: nothing overlaps, nothing leaves the picture, and what is drawn is what was recorded."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlprune.report import benchmark, comparison, pictures, plots
from rlprune.report import html as report
from rlprune.report.results import read_results
from rlprune.report.svg import Axis, Drawing, Picture

RESULTS = Path(__file__).parents[2] / "docs" / "results"
COMMITTED = sorted(path.name for path in RESULTS.glob("*.json"))


def overlapping(drawing: Drawing) -> list[tuple[str, str]]:
    """Pairs of words whose boxes meet."""
    found = []
    for i, a in enumerate(drawing.words):
        for b in drawing.words[:i]:
            (l1, t1, r1, b1), (l2, t2, r2, b2) = a.box, b.box
            if l1 < r2 and l2 < r1 and t1 < b2 and t2 < b1:
                found.append((a.text, b.text))
    return found


def outside(drawing: Drawing) -> list[str]:
    """Words and marks that leave the picture."""
    words = [
        w.text
        for w in drawing.words
        if w.box[0] < -2 or w.box[2] > drawing.width + 2 or w.box[1] < -2 or w.box[3] > drawing.height + 2
    ]
    marks = [d.title for d in drawing.dots if not (0 <= d.x <= drawing.width and 0 <= d.y <= drawing.height)]
    spots = [p for line in drawing.lines for p in line.points]
    marks += [
        str(p) for p in spots if not (-1 <= p[0] <= drawing.width + 1 and -1 <= p[1] <= drawing.height + 1)
    ]
    return words + marks


def check(picture: Picture) -> None:
    for drawing in (picture.wide, picture.narrow):
        assert overlapping(drawing) == []
        assert outside(drawing) == []


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_benchmarks_are_drawn_without_overlap(name: str, tmp_path: Path) -> None:
    """The results of earlier versions, as they lie in docs/results."""
    shutil.copy(RESULTS / name, tmp_path / "results.json")
    results = read_results(tmp_path)
    for view in comparison.per_budget(results):
        drawn = benchmark.charts(view)
        assert {p.title for p in drawn} >= {"Learning curve", "test loss, fine-tuned"}
        for picture in [*drawn, *(p for group in benchmark.tradeoffs(view) for p in group)]:
            check(picture)
        ranked = [p for p in drawn if p.title.startswith("test loss")]
        # The dense model is there, the better direction is said, and one seed has no interval.
        for picture in ranked:
            texts = [word.text for word in picture.wide.words]
            assert "dense" in texts and any("← lower is better" in text for text in texts)
            several = max(len(e["test_loss"]["values"]) for e in view["summary"]) > 1
            assert any("bar" in line.css for line in picture.wide.lines) == several
            assert ("no interval" in picture.note) != several
        curve = next(p for p in drawn if p.title == "Learning curve")
        assert sum("band" in line.css for line in curve.wide.lines) <= 2
    page = report.build(tmp_path)
    assert page.stat().st_size < 3_000_000


number = st.floats(-1e6, 1e6, allow_nan=False).map(lambda v: round(v, 6))


@settings(max_examples=80, deadline=None)
@given(st.lists(number, min_size=1, max_size=20), st.booleans(), st.integers(1, 9))
def test_ticks_lie_on_the_axis_and_are_few(values: list[float], log: bool, most: int) -> None:
    values = [abs(v) + 1e-3 for v in values] if log else values
    axis = Axis.over(values, "x", log)
    ticks = axis.ticks(most)
    assert len(ticks) <= most + 1 and ticks == sorted(ticks)
    assert all(0 <= axis.place(v) <= 1 for v in [*ticks, *values])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(1, 1e9), st.floats(0, 1), st.sampled_from(["rule", "search"]), st.booleans()),
        min_size=1, max_size=25,
    )
)  # fmt: skip
def test_names_of_the_tradeoff_never_cover_each_other(points: list[tuple[float, float, str, bool]]) -> None:
    places = [
        pictures.Place(f"method_{i}", cost, quality, role, f"{i}", f"row{i}", named)
        for i, (cost, quality, role, named) in enumerate(points)
    ]
    check(pictures.tradeoff(places, "MACs", " (M)", "accuracy", True, True))


def test_a_collapsed_candidate_does_not_squeeze_the_curve() -> None:
    curves = {"ppo": [[-50.0, -0.5, -0.3, *[-0.2] * 40]]}
    picture = pictures.learning(curves, {"best rule: lamp": -0.4, "uniform": -40.0}, "score", ["ppo"])
    check(picture)
    ticks = [word.text for word in picture.wide.words]
    assert not any(text.startswith(("−40", "−50")) for text in ticks)


def test_png_pictures_have_the_dense_model_the_direction_and_no_interval_of_one_seed() -> None:
    row: dict[str, Any] = {"method": "lamp", "values": [0.5], "mean": 0.5, "low": 0.5, "high": 0.5}
    other = row | {"method": "erk", "mean": 9.0, "values": [9.0]}
    figure = plots.comparison({"test loss": [row, other]}, {"test loss": 0.4})
    axes = figure.axes[0]
    assert "lower is better" in axes.get_xlabel()
    assert [text.get_text() for text in axes.texts] == ["dense"]
    assert "no interval" in figure.get_supxlabel()
    assert all(len(line.get_xdata()) == 1 or line.get_linestyle() == "--" for line in axes.lines)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


@pytest.mark.parametrize("methods", [3, 11])
def test_the_png_learning_curve_has_two_bands_at_most_where_methods_are_many(methods: int) -> None:
    curves = {f"m{i}": [[-1.0, -0.5 + i / 50], [-1.0, -0.4]] for i in range(methods)}
    axes = plots.learning(curves, {}).axes[0]
    assert len(axes.collections) == (methods if methods <= 4 else 2)
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == methods


def test_json_of_a_view_needs_no_summary_of_a_single_seed(tmp_path: Path) -> None:
    results = json.loads((RESULTS / "smollm2_135m_gguf.json").read_text())
    assert all(entry["seeds"] == 1 for entry in results["summary"])
    lines = benchmark.sentences(comparison.per_budget(results)[0])
    assert "one seed, so no interval" in lines[0] and "[" not in lines[0].split("interval)")[1]
