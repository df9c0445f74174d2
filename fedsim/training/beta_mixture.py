"""The probability that each label is wrong, from the losses: a mixture of two Beta distributions.

Arazo et al., Unsupervised Label Noise Modeling and Loss Correction, ICML 2019, arXiv 1904.11238, section 3.1.
Early in training, examples with a wrong label have the larger losses.
Differs: the posterior is made monotone in the loss: beyond its exact turning point, for large or for small losses,
it is constant. (The authors' code does this on a grid, and for large losses only.) As in that code, the losses are
scaled so that their 5th and 95th percentiles become 0 and 1, and the mixture is fitted to the losses between them.
"""

from dataclasses import dataclass, replace
from math import lgamma
from typing import Self

import numpy as np

from fedsim.data.dataset import Floats

EPSILON = 1e-4  # scaled losses are clipped to [EPSILON, 1 - EPSILON], as in the paper
MIN_LOSSES = 10  # with fewer losses no mixture is fitted
MIN_SPREAD = 1e-6  # relative; a smaller difference of losses may be rounding
FLOOR = 1e-12  # lower bound of responsibilities and variances, by which others are divided

Pair = tuple[float, float]  # (clean component, noisy component)


@dataclass(frozen=True)
class BetaMixture:
    """p(l) = sum_k weights_k Beta(l; alphas_k, betas_k), over losses scaled so that `low` is 0 and `high` is 1.

    Component 1 has the larger mean and models the wrong labels. The defaults are the start of EM.
    """

    low: float = 0.0
    high: float = 1.0
    alphas: Pair = (1.0, 2.0)
    betas: Pair = (2.0, 1.0)
    weights: Pair = (0.5, 0.5)

    @classmethod
    def fit(cls, losses: Floats, iterations: int = 10) -> Self:
        """Fit by EM from a fixed start, with the paper's ten `iterations`; `losses` (n,), one per example.

        The order of the losses does not matter. With fewer than ten finite losses, or with equal losses, all
        labels count as clean.
        """
        losses = np.sort(losses[np.isfinite(losses)].astype(np.float64))
        low, high = np.percentile(losses, (5, 95)).tolist() if len(losses) >= MIN_LOSSES else (0.0, 0.0)
        if high - low <= MIN_SPREAD * (1 + abs(high)):
            return cls(weights=(1.0, 0.0))
        mixture = cls(low, high)
        scaled = mixture._rescaled(losses[(losses >= low) & (losses <= high)])
        for _ in range(iterations):
            mixture = mixture._em_step(scaled)
        return mixture._wrong_last()

    def posterior(self, losses: Floats) -> Floats:
        """(n,) the probability that each label is wrong; it never falls as the loss grows.

        The derivative of the log-odds, a / l - b / (1 - l), can be 0 only at l = a / (a + b). If the odds fall on
        one side of this point, losses on that side get the odds of the point itself.
        """
        scaled = self._rescaled(losses)
        (a0, a1), (b0, b1) = self.alphas, self.betas
        a, b = a1 - a0, b1 - b0
        if a > 0 and b > 0:
            scaled = np.minimum(scaled, a / (a + b))
        elif a < 0 and b < 0:
            scaled = np.maximum(scaled, a / (a + b))
        wrong: Floats = self._responsibilities(scaled)[1]
        return wrong

    def _rescaled(self, losses: Floats) -> Floats:
        return np.clip((losses - self.low) / (self.high - self.low), EPSILON, 1 - EPSILON)

    def _responsibilities(self, scaled: Floats) -> Floats:
        """The E-step: (2, n) the probability of each component, given each loss."""
        parts = zip(self.alphas, self.betas, self.weights, strict=True)
        with np.errstate(divide="ignore"):  # a component of weight 0 has log-density -inf
            log_p = np.stack([np.log(weight) + _log_density(scaled, a, b) for a, b, weight in parts])
        p: Floats = np.exp(log_p - np.logaddexp(*log_p))
        return p

    def _em_step(self, scaled: Floats) -> Self:
        """One iteration of EM; in the M-step each component gets the weighted mean and variance of its losses."""
        responsibilities = np.maximum(self._responsibilities(scaled), FLOOR)
        mass = responsibilities.sum(1)
        mean = responsibilities @ scaled / mass
        variance = np.maximum((responsibilities * (scaled - mean[:, None]) ** 2).sum(1) / mass, FLOOR)
        alphas = mean * (mean * (1 - mean) / variance - 1)
        betas = alphas * (1 - mean) / mean
        weights = mass / mass.sum()
        return replace(
            self,
            alphas=(float(alphas[0]), float(alphas[1])),
            betas=(float(betas[0]), float(betas[1])),
            weights=(float(weights[0]), float(weights[1])),
        )

    def _wrong_last(self) -> Self:
        """The same mixture, with the component of the larger mean a / (a + b) second."""
        (a0, a1), (b0, b1) = self.alphas, self.betas
        if a0 * b1 <= a1 * b0:
            return self
        return replace(self, alphas=(a1, a0), betas=(b1, b0), weights=self.weights[::-1])


def _log_density(x: Floats, alpha: float, beta: float) -> Floats:
    log_normaliser = lgamma(alpha + beta) - lgamma(alpha) - lgamma(beta)
    return log_normaliser + (alpha - 1) * np.log(x) + (beta - 1) * np.log1p(-x)
