"""The drawing of what rlprune does, docs/loop.svg.

    python docs/scripts/drawing.py

Plain SVG: no font is embedded, and the ground is white, so that it is readable on dark pages too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

OUT = Path(__file__).resolve().parents[1] / "loop.svg"
WIDTH, HEIGHT = 900, 372
BOX = (148, 138)
BLUE, GREY, RED, GREEN, INK = "#2563eb", "#9ca3af", "#dc2626", "#15803d", "#111827"
DENSE = (34, 52, 52, 66, 66)
"""Heights of the groups' bars, in pixels; those of a made-up model of five groups."""
KEPT = (30, 30, 44, 22, 38)
# Left edge and top of each box; the second row runs from right to left.
PLACES = {
    "model": (20, 30),
    "groups": (198, 30),
    "distribution": (376, 30),
    "budget": (554, 30),
    "cut": (732, 30),
    "recovery": (732, 214),
    "score": (554, 214),
    "agent": (376, 214),
}
SAYS = {
    "model": "trained, yours",
    "groups": "cut together",
    "distribution": "how it is spread",
    "budget": "met exactly",
    "cut": "a smaller model",
    "recovery": "closed form, norms",
    "score": "close to dense?",
    "agent": "learns from scores",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE")
    parser.parse_args(argv).out.write_text(drawing(), encoding="utf-8")
    return 0


def drawing() -> str:
    """The whole picture as SVG."""
    title = "model, groups, distribution, budget, cut, recovery, score, agent, and back to the distribution"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}" '
        'font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>',
        '<rect x="364" y="10" width="528" height="352" rx="14" fill="#eff6ff"/>',
    ]
    for name, (x, y) in PLACES.items():
        parts += box(name, x, y)
    parts += arrows()
    parts += [
        text(109, 250, "once for a model", "#6b7280", 15),
        text(109, 292, "the blue part some", BLUE, 15),
        text(109, 312, "hundred times", BLUE, 15),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def box(name: str, x: int, y: int) -> list[str]:
    """A box with its name, its pictogram and what it is."""
    width, height = BOX
    middle, ground = x + width // 2, y + height - 32
    found = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="#ffffff" stroke="{GREY}"/>',
        text(middle, y + 24, name, INK, 16, bold=True),
        text(middle, y + height - 11, SAYS[name], "#4b5563", 13),
    ]
    return found + PICTOGRAMS[name](x, ground)


def text(x: int, y: int, words: str, colour: str, size: int, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" text-anchor="middle" fill="{colour}" font-size="{size}"{weight}>{words}</text>'


def bars(x: int, ground: int, heights: Sequence[int], colour: str, opacity: float = 1.0) -> list[str]:
    """A bar for each group, from the ground up."""
    return [
        f'<rect x="{x + 17 + 24 * i}" y="{ground - h}" width="17" height="{h}" rx="2" fill="{colour}" '
        f'fill-opacity="{opacity:g}"/>'
        for i, h in enumerate(heights)
    ]


def _model(x: int, ground: int) -> list[str]:
    dots, lines = [], []
    columns = [[(x + 30 + 44 * c, ground - 10 - 20 * r) for r in range(n)] for c, n in enumerate((3, 3, 2))]
    for left, right in pairwise(columns):
        lines += [f'<path d="M{a} {b} L{c} {d}" stroke="{GREY}"/>' for a, b in left for c, d in right]
    for column in columns:
        dots += [f'<circle cx="{a}" cy="{b}" r="6" fill="{INK}"/>' for a, b in column]
    return lines + dots


def _distribution(x: int, ground: int) -> list[str]:
    shares = tuple(dense - kept for dense, kept in zip(DENSE, KEPT, strict=True))
    return bars(x, ground, shares, RED)


def _budget(x: int, ground: int) -> list[str]:
    line = f'<path d="M{x + 10} {ground - 46} H{x + 138}" stroke="{RED}" stroke-width="2" stroke-dasharray="5 4"/>'
    return [
        f'<rect x="{x + 34}" y="{ground - 66}" width="80" height="66" fill="{GREY}" fill-opacity="0.3"/>',
        f'<rect x="{x + 34}" y="{ground - 46}" width="80" height="46" fill="{BLUE}"/>',
        line,
    ]


def _cut(x: int, ground: int) -> list[str]:
    return [*bars(x, ground, DENSE, GREY, 0.3), *bars(x, ground, KEPT, BLUE)]


def _recovery(x: int, ground: int) -> list[str]:
    return [*bars(x, ground, KEPT, GREEN)]


def _score(x: int, ground: int) -> list[str]:
    curves = {
        GREY: f"M{x + 16} {ground} C{x + 50} {ground} {x + 52} {ground - 60} {x + 70} {ground - 60} "
        f"S{x + 92} {ground} {x + 132} {ground}",
        BLUE: f"M{x + 16} {ground} C{x + 60} {ground} {x + 62} {ground - 50} {x + 82} {ground - 50} "
        f"S{x + 104} {ground} {x + 132} {ground}",
    }
    return [f'<path d="{d}" fill="none" stroke="{c}" stroke-width="2.5"/>' for c, d in curves.items()]


def _agent(x: int, ground: int) -> list[str]:
    points = [(16, 4), (40, 22), (62, 18), (84, 40), (108, 46), (132, 54)]
    path = " L".join(f"{x + a} {ground - b}" for a, b in points)
    return [
        f'<path d="M{path}" fill="none" stroke="{BLUE}" stroke-width="2.5"/>',
        *(f'<circle cx="{x + a}" cy="{ground - b}" r="4" fill="{BLUE}"/>' for a, b in points),
    ]


PICTOGRAMS = {
    "model": _model,
    "groups": lambda x, ground: bars(x, ground, DENSE, GREY),
    "distribution": _distribution,
    "budget": _budget,
    "cut": _cut,
    "recovery": _recovery,
    "score": _score,
    "agent": _agent,
}


def arrows() -> list[str]:
    """From each box to the next, and from the agent back to the distribution."""
    width, height = BOX
    names, found = list(PLACES), []
    for here, there in zip(names, [*names[1:], "distribution"], strict=True):
        (x, y), (to_x, to_y) = PLACES[here], PLACES[there]
        if y == to_y:
            start = (x + width, to_x) if to_x > x else (x, to_x + width)
            found.append(f"M{start[0]} {y + height // 2} H{start[1]}")
        else:
            start = (y + height, to_y) if to_y > y else (y, to_y + height)
            found.append(f"M{x + width // 2} {start[0]} V{start[1]}")
    return [f'<path d="{d}" stroke="{INK}" stroke-width="2" marker-end="url(#tip)"/>' for d in found]


if __name__ == "__main__":
    raise SystemExit(main())
