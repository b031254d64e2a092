"""What a policy's file says of the policy, apart from its weights: checked field by field before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ...config.names import COST_METRICS
from ...envs.observation import FEATURE_VERSIONS
from ...envs.task import ACTION_SCALE
from ...errors import ArtifactError
from ...rules import RULES
from ...utils.values import are_texts, is_finite, is_whole, show_value

FORMAT = "rlprune-policy"
FORMAT_VERSION = 1


def check_facts(meta: Mapping[str, object]) -> tuple[str, ...]:
    """Names of the columns that a saved policy saw; ArtifactError names the first field that cannot be used."""
    if meta.get("format") != FORMAT:
        raise ArtifactError(f"policy: format {show_value(meta.get('format'))} is not {FORMAT!r}")
    if meta.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"policy: format_version {show_value(meta.get('format_version'))}; this program reads {FORMAT_VERSION}"
        )
    features = _features_of(meta)
    if meta.get("action_scale") != ACTION_SCALE:
        raise ArtifactError(
            f"policy: action_scale {show_value(meta.get('action_scale'))} must be {ACTION_SCALE}"
        )
    for field, (fits, allowed) in _FACTS.items():
        # Files of the first versions say less; only these two were always there.
        if (field in meta or field in ("hidden", "base_rule")) and not fits(meta.get(field)):
            given = f"got {show_value(meta[field])}" if field in meta else "but it is missing"
            raise ArtifactError(f"policy: {field}: must be {allowed}, {given}")
    return features


def _is_metric(value: object) -> bool:
    return isinstance(value, str) and COST_METRICS.knows(value)


def _are_ratios(value: object) -> bool:
    """Nothing, or the two ratios that a task is probed at."""
    return isinstance(value, list) and len(value) in (0, 2) and all(is_finite(v) and 0 < v < 1 for v in value)


def _are_budgets(value: object) -> bool:
    pairs = value if isinstance(value, list) else [None]
    return all(isinstance(p, list) and len(p) == 2 and all(map(is_finite, p)) for p in pairs)


_FACTS: dict[str, tuple[Callable[[object], bool], str]] = {
    "hidden": (lambda v: is_whole(v, 65536) and v > 0, "a whole number from 1 to 65536"),
    "reach": (lambda v: is_finite(v) and 0 < v <= 10, "a number above 0 and up to 10"),
    "base_rule": (
        lambda v: isinstance(v, str) and RULES.knows(v),
        "the name of a rule (`rlprune list rules`)",
    ),
    "importance": (lambda v: isinstance(v, str), "a text"),
    "metric": (_is_metric, "a cost metric (`rlprune list metrics`)"),
    "stages": (lambda v: is_whole(v, 1000) and v > 0, "a whole number from 1 to 1000"),
    "sensitivity": (_are_ratios, "a list of two ratios, or an empty one"),
    "fingerprints": (are_texts, "a list of texts"),
    "kinds": (are_texts, "a list of texts"),
    "budgets": (_are_budgets, "a list of pairs of ratios"),
    "checkpoints": (is_whole, "a whole number"),
}
"""What a policy's file says of it, apart from its format, features and plans: which values are taken, in words."""


def _features_of(meta: Mapping[str, object]) -> tuple[str, ...]:
    """Names of the columns that a saved policy saw; ArtifactError where this program cannot show them."""
    version = meta.get("feature_version")
    if not is_whole(version) or version not in FEATURE_VERSIONS:
        known = ", ".join(map(str, FEATURE_VERSIONS))
        raise ArtifactError(
            f"policy: saw features of version {show_value(version)}; this program shows {known}"
        )
    if meta.get("features") != list(FEATURE_VERSIONS[version]):
        raise ArtifactError(f"policy: its features are not those of version {version}; train it again")
    return FEATURE_VERSIONS[version]
