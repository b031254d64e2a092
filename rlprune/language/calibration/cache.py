"""The measurements that importances, rules and the recovery of language models share."""

from __future__ import annotations

from ...errors import ConfigError
from ...importance.calibration_cache import CalibrationCache
from .grams import Grams
from .grams import collect as collect_grams
from .statistics import Statistics
from .statistics import collect as collect_statistics

STATISTICS = "statistics"


class LanguageCalibration(CalibrationCache):
    """Input moments, Gram matrices and expected divergences of a causal language model."""

    _grams: Grams | None = None

    def statistics(self) -> Statistics:
        """Input moments and cosines of the blocks, over all that importances read."""
        return self.cached(
            STATISTICS, lambda: collect_statistics(self.model, self.space, self.batches(self.limit))
        )

    def grams(self) -> Grams:
        """Gram matrices of what the units' consumers read, over what the recovery reads; kept until taken."""
        if self._grams is None:
            limit = self.recovery_limit if self.limit is None else self.limit
            self._grams = collect_grams(self.model, self.space, self.batches(limit))
        return self._grams

    def give_grams(self, grams: Grams) -> None:
        """Take Gram matrices that were collected elsewhere."""
        self._grams = grams

    def take_grams(self) -> Grams:
        """Hand over the Gram matrices to whoever frees them one by one; nothing of them stays here."""
        taken = self.grams()
        self._grams = None
        return taken

    def forget_grams(self) -> None:
        """Free the Gram matrices: they are the peak of a search's memory."""
        self._grams = None


def language_calibration(cache: CalibrationCache, who: str) -> LanguageCalibration:
    """The cache of a language model; ConfigError naming who asked where it is another model's."""
    if not isinstance(cache, LanguageCalibration):
        raise ConfigError(f"{who}: works on attention and feed-forward groups of language models")
    return cache
