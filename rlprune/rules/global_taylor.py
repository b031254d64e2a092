"""One global threshold over first-order Taylor scores."""

from __future__ import annotations

from ..importance import importance
from ..utils.arrays import Floats
from .context import Context, rule
from .global_magnitude import normalised
from .threshold import threshold_distribution


@rule(
    "one global threshold over the groups' normalised Taylor scores",
    needs_workload=True,
    costly=True,
)
def global_taylor(context: Context) -> Floats:
    """Global pruning by first-order Taylor scores (Molchanov et al. 2019, arXiv 1906.10771).

    The scores come from the calibration split; each group's are divided by their mean, as Torch-Pruning's
    ``global_pruning`` does, and the pooled scores get one threshold.
    """
    workload = context.data("global_taylor")

    def scores() -> importance.Scores:
        batches = workload.batches("calibration")
        return normalised(
            importance.taylor(
                context.model, context.space, batches, workload.loss_of, workload.outputs_for_loss
            )
        )

    return threshold_distribution(context, context.cached("global_taylor", scores))
