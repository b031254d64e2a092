"""Numbers and names as the report and the terminal write them."""

from __future__ import annotations

from collections.abc import Mapping

from ..utils.values import is_finite

NONE = "–"
_NAMES = {
    "macs": "MACs",
    "params": "parameters",
    "block_params": "block parameters",
    "kv_cache": "KV cache",
    "latency": "latency",
    "bytes": "weights file",
}
_BYTES = ("bytes", "kv_cache")


def cost_name(metric: str) -> str:
    """A cost as people call it; that of a plugin by its own name."""
    return _NAMES.get(metric, metric)


def amount(value: object, metric: str) -> str:
    """A cost with its unit: "20.3 M", "1.25 ms", "4.1 MB"; a dash where it is not known."""
    if not is_finite(value):
        return NONE
    if metric.startswith("latency"):
        return f"{value:.3g} ms"
    unit = "B" if metric in _BYTES else ""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.4g} {unit}".rstrip()


def unit_of(largest: float, metric: str) -> tuple[str, float]:
    """The unit for an axis whose largest value is given, as in " (M)", and how many it counts at once."""
    if metric.startswith("latency"):
        return " (ms)", 1.0
    unit = "B" if metric in _BYTES else ""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= size:
            return f" ({prefix}{unit})", size
    return f" ({unit})" if unit else "", 1.0


def number(value: object, digits: int = 4) -> str:
    """A figure in so many digits; a dash where it is missing or no number."""
    if not is_finite(value):
        return NONE if value is None or isinstance(value, float) else str(value)
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"


def signed(value: float, form: str) -> str:
    """A number with its sign; one that rounds to 0 has none."""
    text = format(abs(value), form)
    if not text.strip("0."):
        return text
    return f"{'+' if value > 0 else '−'}{text}"


def is_share(metric: str) -> bool:
    """Whether a metric is a share of right answers, which people read in percent."""
    return "accuracy" in metric


def quality(value: object, metric: str) -> str:
    """The value of a metric: accuracies in percent."""
    if is_finite(value) and is_share(metric):
        return f"{100 * value:.1f}%"
    return number(value)


def ratio(part: object, whole: object) -> float | None:
    """The quotient, where there is one."""
    return float(part) / float(whole) if is_finite(part) and is_finite(whole) and whole else None


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def share(part: object, whole: object) -> str:
    """Part of a whole in percent."""
    found = ratio(part, whole)
    return NONE if found is None else percent(found)


def count(value: object) -> str:
    return NONE if value is None else str(value)


def scaled(value: object, scale: float) -> str:
    return f"{value / scale:.2f}" if is_finite(value) else NONE


def budget_words(budget: Mapping[str, object]) -> str:
    """What was asked: "50.0% of the dense MACs"; empty where it is not recorded."""
    part = ratio(budget.get("target"), budget.get("dense"))
    if part is None:
        return ""
    return f"{percent(part)} of the dense {cost_name(str(budget.get('metric', 'macs')))}"
