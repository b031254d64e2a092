"""A picture of what an environment is doing: the widths that are kept, and the distribution behind them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..utils.arrays import Floats


def draw(names: list[str], kept: Floats, distribution: Floats | None, title: str) -> NDArray[np.uint8]:
    """An RGB image (480, 800, 3) of the share kept of each group and of the distribution that asked for it.

    Args:
        names: of the G groups.
        kept: (G,) widths over dense widths.
        distribution: (G,) how the pruning was spread; None before the first step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only a picture needs it
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.8), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = np.arange(len(names))
    axes.bar(places, np.ones(len(names)), color="#e6e6e6", label="dense")
    axes.bar(places, kept, color="#2a6f97", label="kept")
    if distribution is not None:
        peak = max(float(np.max(distribution)), 1e-12)
        axes.plot(
            places,
            distribution / peak,
            "o-",
            color="#d1495b",
            markersize=4,
            label="distribution (of its peak)",
        )
    axes.set_ylim(0.0, 1.05)
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.set_ylabel("share of the group's units")
    axes.set_title(title, fontsize=10)
    step = max(1, len(names) // 24)
    axes.set_xticks(places[::step], names[::step], rotation=60, ha="right", fontsize=7)
    axes.legend(loc="lower left", fontsize=7, ncols=3)
    figure.tight_layout()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba(), dtype=np.uint8)[..., :3].copy()
