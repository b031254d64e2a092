"""What there is, by name: the registries as `rlprune list` prints them, and the names a config may use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .config import Config, settings_reference, shipped_configs
from .errors import ConfigError, near_miss
from .search_settings import SB3Config

KINDS = ("models", "rules", "agents", "importances", "recoveries", "data", "configs", "settings")


def rows(kind: str) -> list[tuple[str, str]]:
    """(name, one line) of everything of a kind, from the registries themselves."""
    if kind == "configs":
        return [(name, _first_comment(path)) for name, path in shipped_configs().items()]
    if kind == "settings":
        return [(s.path, f"{s.doc} ({s.type}; default: {s.default!r})") for s in settings_reference()]
    if kind == "models":
        from .workloads import list_models

        return list_models()
    if kind == "data":
        from .workloads import list_data

        return list_data()
    if kind == "rules":
        from .rules import RULES

        return [(name, rule.summary) for name, rule in RULES.items()]
    if kind == "agents":
        from .agents import AGENTS

        return [(name, agent.summary) for name, agent in AGENTS.items()]
    if kind == "importances":
        from .pruning.importance import IMPORTANCES, LANGUAGE_IMPORTANCES

        found = {**IMPORTANCES, **LANGUAGE_IMPORTANCES}
        return [(name, _first_line(function)) for name, function in found.items()]
    from .pruning.recovery import RECOVERIES

    return list(RECOVERIES.items())


def check_names(config: Config) -> None:
    """Refuse unknown names at once, not after minutes of training; raises ConfigError with the near miss."""
    from .agents import AGENTS, make_agent
    from .pruning.importance import IMPORTANCES, LANGUAGE_IMPORTANCES
    from .rules import RULES

    wanted = [
        ("prune.importance", config.prune.importance, [*IMPORTANCES, *LANGUAGE_IMPORTANCES]),
        ("search.agent", config.search.agent, list(AGENTS)),
        ("search.base_rule", config.search.base_rule, ["auto", *RULES]),
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


def check_side(config: Config, rules: Sequence[str] = ()) -> None:
    """Refuse, before a classifier is trained, what only language models have; raises ConfigError."""
    from .pruning.importance import IMPORTANCES
    from .rules import RULES
    from .workloads.causal import is_causal

    if config.workload is not None or is_causal(config.model.name):
        return
    common = [name for name, rule in RULES.items() if not rule.language]
    steps = ["none", "reconstruct", "bn", "finetune"]
    wanted = [("prune.importance", config.prune.importance, list(IMPORTANCES))]
    wanted += [("recovery.steps", step, steps) for step in config.recovery.steps]
    wanted += [("rule", rule, common) for rule in (config.search.base_rule, *rules) if rule in RULES]
    for field, name, allowed in wanted:
        if name not in allowed:
            raise ConfigError(
                f"{field}: {name!r} is for language models only; allowed here: {', '.join(allowed)}"
            )


def _first_line(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").strip().partition("\n")[0]


def _first_comment(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
