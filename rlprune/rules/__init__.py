"""Closed-form distributions, one small file each: the yardstick of every search.

``rules.NAME(context)`` calls one; ``RULES`` holds all of them, ``rules_for(space)`` those that apply. A new rule
is one new file here with a function under ``@rule("what it does")``; it is found by itself.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from ..errors import near_miss
from .context import RULES, Context, Rule, rule, rules_for

_HELPERS = ("context", "threshold", "blocks", "global_pruners")

for _module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
    if _module not in _HELPERS:
        importlib.import_module(f".{_module}", __name__)

# A rule's file and its function share their name; the function is what people want.
globals().update({name: found.function for name, found in RULES.items()})

__all__ = ["RULES", "Context", "Rule", "rule", "rules_for"]


def __getattr__(name: str) -> Any:
    if name in RULES:  # one that was registered from outside
        return RULES[name].function
    raise AttributeError(f"no rule {name!r}{near_miss(name, RULES)}; there are {', '.join(RULES)}")
