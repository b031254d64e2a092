"""What there is, by name: the registries as `rlprune list` prints them, and the names a config may use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.config import AUTO, Config, settings_reference, shipped_configs
from ..config.names import COST_METRICS, RECOVERY_STEPS, RUNTIMES, SCORE_KINDS, recovery_order
from ..config.search import SB3Config
from ..errors import ConfigError, near_miss
from ..utils.registry import Registry

if TYPE_CHECKING:
    from ..importance.importance import Importance

KINDS = (
    "models", "families", "rules", "agents", "importances", "recoveries", "costs", "scores", "tasks", "formats",
    "runtimes", "data", "configs", "settings",
)  # fmt: skip


def rows(kind: str) -> list[tuple[str, str]]:
    """(name, one line) of everything of a kind, from the registries themselves."""
    if kind == "configs":
        return [(name, _first_comment(path)) for name, path in shipped_configs().items()]
    if kind == "settings":
        return [(s.path, f"{s.doc} ({s.type}; default: {s.default!r})") for s in settings_reference()]
    if kind == "models":
        from ..experiments.build import list_models

        return list_models()
    if kind == "families":
        from ..experiments.build import list_families

        return list_families()
    if kind == "data":
        from ..experiments.build import list_data

        return list_data()
    return [(name, entry.summary) for name, entry in _registry(kind).items()]


def _registry(kind: str) -> Registry[Any]:
    """The complete registry of a kind."""
    from ..agents import AGENTS
    from ..experiments.formats import FORMATS
    from ..rules import RULES
    from ..workloads.tasks import TASK_TYPES

    every: dict[str, Registry[Any]] = {
        "rules": RULES,
        "agents": AGENTS,
        "importances": _importances(),
        "recoveries": RECOVERY_STEPS,
        "costs": COST_METRICS,
        "scores": SCORE_KINDS,
        "tasks": TASK_TYPES,
        "formats": FORMATS,
        "runtimes": RUNTIMES,
    }
    found = every[kind]
    found.complete()
    return found


def check_names(config: Config) -> None:
    """Refuse unknown names at once, not after minutes of training; raises ConfigError with the near miss."""
    from ..agents import AGENTS, make_agent
    from ..rules import RULES

    wanted = [
        ("prune.importance", config.prune.importance, [AUTO, *_importances()]),
        ("search.agent", config.search.agent, list(AGENTS)),
        ("search.base_rule", config.search.base_rule, [AUTO, *RULES]),
        *((f"search.baselines[{i}]", name, list(AGENTS)) for i, name in enumerate(config.search.baselines)),
    ]
    if config.workload is None and not config.data.name.startswith("hub:"):
        wanted.append(("data.name", config.data.name, [name for name, _ in rows("data")]))
    for field, name, allowed in wanted:
        if name not in allowed:
            hint = near_miss(name, allowed)
            raise ConfigError(f"{field}: unknown name {name!r}{hint}; allowed: {', '.join(allowed)}")
    if config.search.sb3 != SB3Config():
        make_agent("sb3", config.search)  # which knows the algorithm's arguments


def check_wing(config: Config, rules: Sequence[str] = ()) -> None:
    """Refuse, before anything is trained, what the models of the config's wing do not have; raises ConfigError."""
    from ..agents import AGENTS
    from ..experiments.build import expected_adapter
    from ..rules import RULES
    from ..workloads.adapter import adapter_named, adapters

    adapter = expected_adapter(config)
    if adapter is None:
        return
    importances, wing = _importances(), adapter.wing
    settings = [("prune.importance", config.prune.importance, {n: i.wing for n, i in importances.items()})]
    known = {name: rule.wing for name, rule in RULES.items()}
    settings += [("rule", rule, known) for rule in (config.search.base_rule, *rules) if rule in RULES]
    searching = {name: entry.wing for name, entry in AGENTS.items()}
    settings += [("search.agent", config.search.agent, searching)]
    settings += [
        (f"search.baselines[{i}]", name, searching) for i, name in enumerate(config.search.baselines)
    ]
    settings += [("--methods", name, searching) for name in rules if name in AGENTS]
    steps = {s: None if s in adapter.recovery_steps else a.wing for a in adapters() for s in a.recovery_steps}
    steps |= {name: RECOVERY_STEPS[name].wing for name in recovery_order() if RECOVERY_STEPS.source(name)}
    settings += [("recovery.steps", step, steps) for step in config.recovery.steps]
    for field, name, entries in (
        ("budget.metric", config.budget.metric, COST_METRICS),
        ("score.kind", config.score.kind, SCORE_KINDS),
    ):
        if entries.source(name) is not None:
            settings.append((field, name, {n: entry.wing for n, entry in entries.items()}))
    for field, name, wings in settings:
        owner = wings.get(name)
        if owner not in (None, wing):
            allowed = ", ".join(n for n, w in wings.items() if w in (None, wing))
            raise ConfigError(
                f"{field}: {name!r} is for {adapter_named(owner).models} only; allowed here: {allowed}"
            )


def _importances() -> Registry[Importance]:
    """Every registered importance; the wings register theirs when they are imported."""
    from ..importance.importance import IMPORTANCES
    from ..workloads.adapter import adapters

    adapters()
    return IMPORTANCES


def _first_comment(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
