"""Everything that rlprune takes from the inside of NVIDIA ModelOpt; nothing else in the package does.

Relied on, in 0.47:

- ``modelopt.torch.prune.fastnas``: ``FastNASConfig``, whose rules hold ``channels_ratio``, ``channel_divisor`` and
  their like for features, and ``BinarySearcher``, the search that the mode ``fastnas`` runs.
- ``modelopt.torch.nas.algorithms.MODULE_TYPE_TO_CONSTRAINTS_FUNC``: by the type of a model, what counts its costs;
  made for plugins. A ``ConstraintsFunc`` asks ``constraint_eval_funcs``, functions of what is known already.
- ``modelopt.torch.opt.utils.named_hparams`` and of a hyperparameter ``choices``, ``active``, ``min``, ``max``,
  ``_is_configurable``; ``DynamicModule.get_hparam(name)`` of a converted layer.
- ``modelopt.torch.nas.utils.sample``: puts every hyperparameter to its smallest or largest choice.

FastNAS runs no forward pass by itself: it asks for scores, and for costs, of the choices that are active.
``tests/test_internals.py`` fails where one of them is gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from torch import nn

from ..errors import GraphError, first_line
from ..utils.torch_internals import copied

CHANNELS = ("out_channels", "out_features")
"""What ModelOpt calls the outputs of a layer."""


def installed() -> bool:
    """Whether ModelOpt is there; it is not imported, which takes seconds."""
    return find_spec("modelopt") is not None


def divisible(number: float, divisor: int) -> int:
    """What ModelOpt rounds a number of channels to."""
    from modelopt.torch.utils import make_divisible

    return int(make_divisible(number, divisor))


class ChannelSearchSpace:
    """A copy of a model, converted into ModelOpt's search space of the mode ``fastnas``.

    Args:
        ratios: how many widths of a layer are choices: 1 / ratios, 2 / ratios, ... of its channels.
        divisor: what the choices are multiples of.

    Raises:
        GraphError: ModelOpt cannot convert the model, or finds nothing in it that could be narrower.
    """

    def __init__(self, model: nn.Module, ratios: int, divisor: int) -> None:
        name = type(model).__name__
        with _quiet():
            import modelopt.torch.nas as nas
            import modelopt.torch.prune as prune
            from modelopt.torch.opt.utils import named_hparams

            rules = _rules(prune.fastnas.FastNASConfig().model_dump(), ratios, divisor)
            try:
                self.model: Any = nas.convert(
                    copied(model).cpu(), [("fastnas", rules)], registry=prune.pruning.PruneModeRegistry
                )
            except Exception as error:  # whatever its tracing meets
                hint = "; allowed: a smaller search.fastnas.channel_divisor" if divisor > 1 else ""
                raise GraphError(
                    f"search.agent: 'fastnas': ModelOpt cannot convert {name} "
                    f"({type(error).__name__}: {first_line(error)}){hint}"
                ) from error
            self._own: dict[str, Any] = dict(named_hparams(self.model, configurable=True))

    def channels(self) -> dict[str, tuple[int, int]]:
        """Of every converted layer the output channels that are active, and all that it has."""
        from modelopt.torch.opt.dynamic import DynamicModule

        found = {}
        for name, module in self.model.named_modules():
            if isinstance(module, DynamicModule):
                for outputs in CHANNELS:
                    if hasattr(module, outputs):
                        with contextlib.suppress(AttributeError, KeyError):
                            hparam = module.get_hparam(outputs)
                            found[name] = int(hparam.active), int(hparam.max)
        return found

    def choices(self) -> dict[str, list[int]]:
        """Of every hyperparameter that FastNAS may choose: its choices, numbers of channels."""
        return {name: sorted(map(int, hparam.choices)) for name, hparam in self._own.items()}

    @property
    def scores(self) -> int:
        """The most scores that `search` asks for."""
        return 1 + sum(len(choices) - 1 for choices in self.choices().values())

    def narrow(self, name: str | None = None) -> None:
        """Put one hyperparameter to its smallest choice and all others to their largest; None: all to the smallest."""
        from modelopt.torch.nas.utils import sample

        sample(self.model, min if name is None else max)
        if name is not None:
            self._own[name].active = self._own[name].min

    def fix(self, name: str) -> None:
        """Leave a hyperparameter at its largest choice for good."""
        self._own[name].active = self._own[name].max
        self._own.pop(name)._is_configurable = False

    def search(self, score: Callable[[], float], cost: Callable[[], float], limit: float) -> None:
        """Let FastNAS search, which leaves its choices active.

        Args:
            score: of the channels that are active; higher is better. Asked for the whole model, then for every choice
                of every hyperparameter alone, the smallest first, until one costs nothing.
            cost: of the channels that are active.
            limit: the highest cost allowed; the cost of the narrowest model must not be above it.
        """
        shown = sys.stdout, sys.stderr

        def loud(_model: nn.Module) -> float:
            with contextlib.redirect_stdout(shown[0]), contextlib.redirect_stderr(shown[1]):
                return score()

        with _quiet(), _counted_by(type(self.model), cost):
            from modelopt.torch.prune.fastnas import BinarySearcher

            config = {"score_func": loud, "verbose": False}
            BinarySearcher().search(self.model, {"flops": limit}, None, config)


def _rules(rules: Mapping[str, Any], ratios: int, divisor: int) -> dict[str, Any]:
    """ModelOpt's rules with other choices of channels and features."""
    shares = tuple(i / ratios for i in range(1, ratios + 1))
    own = {"channels_ratio": shares, "features_ratio": shares}
    own |= {"channel_divisor": divisor, "feature_divisor": divisor}  # type: ignore[dict-item]

    def changed(rule: Mapping[str, Any]) -> dict[str, Any]:
        return {key: own.get(key, value) for key, value in rule.items()}

    return {
        kind: None if layers is None else {pattern: changed(rule) for pattern, rule in layers.items()}
        for kind, layers in rules.items()
    }


@contextlib.contextmanager
def _counted_by(kind: type, cost: Callable[[], float]) -> Iterator[None]:
    """Let the cost of models of a type be what a function says; ModelOpt's own count needs a further library."""
    from modelopt.torch.nas.algorithms import MODULE_TYPE_TO_CONSTRAINTS_FUNC, ConstraintsFunc

    class Counted(ConstraintsFunc):  # type: ignore[misc]
        @property
        def constraint_eval_funcs(self) -> dict[str, Callable[..., float]]:
            return {"flops": lambda known=None: cost()}

    kept = dict(MODULE_TYPE_TO_CONSTRAINTS_FUNC)
    MODULE_TYPE_TO_CONSTRAINTS_FUNC.clear()
    MODULE_TYPE_TO_CONSTRAINTS_FUNC[kind] = Counted
    try:
        yield
    finally:
        MODULE_TYPE_TO_CONSTRAINTS_FUNC.clear()
        MODULE_TYPE_TO_CONSTRAINTS_FUNC.update(kept)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither ModelOpt's prints and bars nor what its imports say; what it raises is told."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
