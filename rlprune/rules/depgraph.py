"""Torch-Pruning's global pruners as rules: outside peers."""

from __future__ import annotations

from ..utils.arrays import Floats
from .context import Context, rule


@rule(
    "Torch-Pruning's own global pruning by group norms (DepGraph), at the ratio that meets the budget",
    wing="vision",
    external=True,
)
def depgraph(context: Context) -> Floats:
    """DepGraph (Fang et al., arXiv 2301.12900) as Torch-Pruning 1.6 runs it: ``global_pruning=True`` with
    ``GroupMagnitudeImportance(p=2)`` (its defaults: mean over the group's layers, divided by the group's mean).

    The lowest global ratio whose result meets the budget is found by steps and then by bisection; Torch-Pruning
    picks the channels of its own groups, and the shares that our groups lose are returned. What is protected
    here is ignored there. Torch-Pruning leaves a group whole that it would empty, so its cost does not fall
    steadily with the ratio. A shortcut that pads channels ends its groups, because it maps them wrongly
    (DESIGN: contract 2). The group-lasso training of the paper is left out: nobody else trains first.

    Raises:
        GraphError: Torch-Pruning cannot follow the model.
        DataError: no example input is known.
    """
    return _pruned(context, "depgraph", "GroupMagnitudeImportance")


@rule(
    "Torch-Pruning's own global pruning by first-order Taylor scores, at the ratio that meets the budget",
    wing="vision",
    external=True,
    needs_workload=True,
)
def tp_taylor(context: Context) -> Floats:
    """Molchanov et al. 2019 (CVPR) as Torch-Pruning 1.6 runs it: ``global_pruning=True`` with
    ``GroupTaylorImportance()``, |w * dL/dw| of the calibration split's loss; otherwise as `depgraph`."""
    return _pruned(context, "tp_taylor", "GroupTaylorImportance", gradients=True)


@rule(
    "Torch-Pruning's own global pruning by batch-norm scales, at the ratio that meets the budget",
    wing="vision",
    external=True,
)
def tp_bn_scale(context: Context) -> Floats:
    """Network Slimming (Liu et al., arXiv 1708.06519) as Torch-Pruning 1.6 runs it: ``global_pruning=True`` with
    ``BNScaleImportance()``, without the sparse training of the paper, because nobody else trains first; otherwise as
    `depgraph`. It leaves groups whole that no batch norm follows."""
    return _pruned(context, "tp_bn_scale", "BNScaleImportance")


def _pruned(context: Context, name: str, importance: str, *, gradients: bool = False) -> Floats:
    """The shares (G,) of `peer_shares`, whose file waits for Torch-Pruning, which takes seconds to import."""
    from .global_pruners import peer_shares

    return peer_shares(context, name, importance, gradients=gradients)
