"""Divergences of plans whose logits are a known mean and an unknown rest.

Shape legend: P plans, K known plans, N images or tokens, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What the uncertainty of the logits adds to a divergence is averaged over draws, on so many images or tokens at most.
_DRAWS, _NOISY_IMAGES = 16, 128
# Exponents of float32 that are safe from becoming zero or infinite.
_SAFE = 80.0


class Divergences:
    """Mean KL(reference || plan) in nats over N images, from logits.

    A softmax knows no common shift, so logits are kept less their mean under the reference's probabilities p: then
    KL = sum_c p log p + logsumexp, without a product of p with every plan's logits, and without the rounding of the two
    large numbers whose difference it is where the reference is certain. Classes come before images: sums over a few
    classes are fast where they run over whole rows.

    Args:
        reference: logits (N, C), in whose precision everything is.
    """

    def __init__(self, reference: Tensor) -> None:
        log_p = reference.log_softmax(dim=-1).T.contiguous()
        self._p = log_p.exp()
        self._negentropy = float((self._p * log_p).sum(dim=0).double().mean())
        self._classes, self._images = log_p.shape
        half = torch.randn(_DRAWS // 2, self._classes, generator=torch.Generator().manual_seed(0))
        self._draws = torch.cat([half, -half]).to(log_p.dtype)

    def centred(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, C) -> (C N,) less their mean under the reference, and those means (N,)."""
        columns = logits.T
        shift = (self._p * columns).sum(dim=0) / self._p.sum(dim=0)
        return (columns - shift).flatten(), shift

    def of(self, centred: Tensor) -> Tensor:
        """Centred logits (P, C N) -> divergences (P,)."""
        top, powers = self._powers(centred)
        return self._mean(top, powers)

    def expected(self, centred: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Divergences (P,) of centred logits (P, C N), and what noise of a variance (P,) on them adds.

        The logits are overwritten.

        E[KL] - KL of the means is E[logsumexp] - logsumexp of the means, here over fixed draws, which come in pairs of
        opposite sign. The second-order expansion (half the variance times 1 - sum q^2) is far too small where the means
        are certain of a class and the variance is large: what is unknown would be as good as the dense model.
        """
        step = max(1, -(-self._images // _NOISY_IMAGES))
        deviation = variance.sqrt().to(centred.dtype)
        widest = float((self._draws.amax(dim=1) - self._draws.amin(dim=1)).max())
        wild = (deviation * widest > _SAFE).nonzero()[:, 0].tolist()
        slow = {i: self._added(self._image_rows(centred[i])[:, ::step], deviation[i]) for i in wild}
        top, powers = self._powers(centred, in_place=True)
        # The draws are the same for all images: exp(mean + noise), summed over the classes, is a product of matrices.
        some = powers[:, :, ::step]
        drawn = deviation[:, None, None] * self._draws
        peak = drawn.amax(dim=2, keepdim=True)
        noisy = ((drawn - peak).exp() @ some).log().mean(dim=2) + peak[:, :, 0]
        added = noisy.mean(dim=1) - some.sum(dim=1).log().mean(dim=1)
        for i, value in slow.items():
            added[i] = value
        return self._mean(top, powers), added.clamp_min(0.0)

    def _powers(self, centred: Tensor, in_place: bool = False) -> tuple[Tensor, Tensor]:
        """The largest logits (P, N), and exp of all less those (P, C, N)."""
        rows = self._image_rows(centred)
        top = rows.amax(dim=1)
        return top, (rows.sub_(top[:, None]) if in_place else rows - top[:, None]).exp_()

    def _mean(self, top: Tensor, powers: Tensor) -> Tensor:
        return (top + powers.sum(dim=1).log()).mean(dim=1) + self._negentropy

    def _image_rows(self, centred: Tensor) -> Tensor:
        return centred.unflatten(-1, (self._classes, self._images))

    def _added(self, logits: Tensor, deviation: Tensor) -> Tensor:
        """What noise adds to one plan's divergence, logits (C, n), where its exponents leave float32."""
        noisy = (logits + (deviation * self._draws)[:, :, None]).logsumexp(dim=1).mean()
        return noisy - logits.logsumexp(dim=0).mean()
