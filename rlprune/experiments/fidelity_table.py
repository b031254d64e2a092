"""From the measurements of `fidelity` to its table: rank correlations, their intervals, and the choice of a tier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..report.html import markdown_table
from ..utils.arrays import Floats
from ..utils.rank import spearman

RESAMPLES = 2000
Point = Mapping[str, Any]


def fidelity(scores: Floats, losses: Floats) -> float:
    """Mean of the two rank correlations between scores on one half and negated final losses on the other.

    Args:
        scores, losses: (plans, 2), a column for each half of the validation split.
    """
    return (spearman(scores[:, 0], -losses[:, 1]) + spearman(scores[:, 1], -losses[:, 0])) / 2


def summarise(points: Sequence[Point], own: str, samples: int) -> dict[str, Any]:
    """Rows of all tiers, best first, and which of them is the best and which the recommended one.

    The interval is the percentile bootstrap over plans; the difference to the tier with the highest rho is
    taken within each resample. Recommended is the fastest tier whose difference to the best is not below 0
    with its whole interval. ``halves`` is the rank correlation of a tier's scores on the two halves, ``ceiling``
    that of the final losses: what one would reach who knew the loss on one half.

    Args:
        points: see `_Study.points`.
        own: name of the tier in use.
        samples: validation samples that a score reads.
    """
    losses = np.array([point["loss"] for point in points])
    names = list(points[0]["scores"])
    scores = {n: np.array([point["scores"][n]["values"][str(samples)] for point in points]) for n in names}
    rho = {name: fidelity(scores[name], losses) for name in names}
    best = max(names, key=rho.__getitem__)
    drawn = _resampled(scores, losses)
    rows = []
    for name in names:
        low, high = np.percentile(drawn[name], [2.5, 97.5])
        below, above = np.percentile(drawn[name] - drawn[best], [2.5, 97.5])
        cost = [point["scores"][name] for point in points]
        # Whatever else the machine does only adds to the seconds: the fastest plan's are nearest to the truth.
        seconds = min(c["seconds"] + c["per_sample"] * samples for c in cost)
        rows.append(
            {
                "recovery": name,
                "used": name == own,
                "spearman": rho[name],
                "low": float(low),
                "high": float(high),
                "difference": rho[name] - rho[best],
                "difference_low": float(below),
                "difference_high": float(above),
                "halves": spearman(scores[name][:, 0], scores[name][:, 1]),
                "seconds": seconds,
                "reads": int(samples + cost[0]["reads"]),
                "by_samples": {n: _fidelity_at(points, name, n, losses) for n in cost[0]["values"]},
            }
        )
    rows.sort(key=lambda row: -row["spearman"])
    enough = [row for row in rows if row["difference_high"] >= 0]
    recommended = min(enough, key=lambda row: row["seconds"])["recovery"]
    found = {"rows": rows, "best": best, "recommended": recommended, "used": own, "samples": samples}
    return found | {"ceiling": spearman(losses[:, 0], losses[:, 1])}


def markdown(content: Mapping[str, Any]) -> str:
    """The table of fidelity.json in words."""
    unit, scale = content["unit"], content["tokens"]
    header = ["recovery before scoring", "Spearman", "95% interval", "− best", "95% interval of it"]
    header += ["half to half", "ms a candidate", f"{unit} read"]
    lines, curves = [], []
    for row in content["rows"]:
        line = [f"{row['recovery']}{' (in use)' if row['used'] else ''}", f"{row['spearman']:.2f}"]
        line.append(f"{row['low']:.2f} to {row['high']:.2f}")
        if row["recovery"] == content["best"]:
            line += ["best", ""]
        else:
            line.append(f"{row['difference']:+.2f}")
            line.append(f"{row['difference_low']:+.2f} to {row['difference_high']:+.2f}")
        line.append(f"{row['halves']:.2f}")
        lines.append([*line, f"{1e3 * row['seconds']:.1f}", f"{scale * row['reads']:,}"])
        curves.append([row["recovery"], *(f"{rho:.2f}" for rho in row["by_samples"].values())])
    sizes = [f"{scale * int(n):,} {unit}" for n in content["rows"][0]["by_samples"]]
    own = next(row for row in content["rows"] if row["used"])
    verdict = "" if own["difference_high"] >= 0 else ", which is significantly below it"
    return (
        f"Fidelity of the {content['score']} score on {content['name']}: {content['candidates']} random plans at "
        f"{content['budget']} of the {content['metric']}, scored on {scale * content['samples']:,} {unit} of one half "
        f"of the validation split, against the loss on the other half after {content['length']} of the final "
        f"fine-tune.\n\n{markdown_table(header, lines)}\n\n"
        f"Recommended: `{content['recommended']}`, the fastest that is not significantly below the best "
        f"(`{content['best']}`); in use: `{content['used']}`{verdict}. The final losses on the two halves agree with "
        f"Spearman {content['ceiling']:.2f}: their noise limits every row.\n\n"
        f"Spearman by what a score reads:\n\n{markdown_table(['recovery before scoring', *sizes], curves)}"
    )


def _fidelity_at(points: Sequence[Point], name: str, samples: str, losses: Floats) -> float:
    return fidelity(np.array([point["scores"][name]["values"][samples] for point in points]), losses)


def _resampled(scores: Mapping[str, Floats], losses: Floats, seed: int = 0) -> dict[str, Floats]:
    """Fidelity of every tier in each of `RESAMPLES` draws of the plans, the same draws for all."""
    rng = np.random.default_rng(seed)
    draws = [rng.integers(len(losses), size=len(losses)) for _ in range(RESAMPLES)]
    return {n: np.array([fidelity(s[index], losses[index]) for index in draws]) for n, s in scores.items()}
