"""Which labels are wrong, told from the losses: a mixture of two Beta distributions.

Arazo et al., Unsupervised Label Noise Modeling and Loss Correction, ICML 2019, arXiv 1904.11238, section 3.1.
Early in training, examples with a wrong label have the larger losses.
Differs: the posterior is held level where it would turn at its exact turning point, on either side (the authors'
code: on a grid, for large losses). As in that code, 0 and 1 are the 5th and the 95th percentile of the losses,
and the mixture is fitted to what lies between them.
"""

from dataclasses import dataclass, replace
from math import lgamma
from typing import Self

import numpy as np

from fedsim.data.dataset import Floats

EDGE = 1e-4  # how near 0 and 1 a scaled loss may come: the paper's epsilon
FEWEST = 10  # losses that can tell two distributions apart
SPREAD = 1e-6  # what rounding makes of equal losses of about 1
TINY = 1e-12

Pair = tuple[float, float]  # of the clean component and of the noisy one


@dataclass(frozen=True)
class BetaMixture:
    """p(l) = sum_k weights_k Beta(l; alphas_k, betas_k), over losses scaled so that `low` is 0 and `high` is 1.

    Component 1, the one with the larger mean, is that of the wrong labels. As made here, it is the start of EM.
    """

    low: float = 0.0
    high: float = 1.0
    alphas: Pair = (1.0, 2.0)
    betas: Pair = (2.0, 1.0)
    weights: Pair = (0.5, 0.5)

    @classmethod
    def fit(cls, losses: Floats, iterations: int = 10) -> Self:
        """By EM from a fixed start, the paper's ten `iterations`; `losses` (n,), one per example, in any order.

        Fewer than ten finite losses, or losses that are all the same, tell nothing: then all labels are clean.
        """
        losses = np.sort(losses[np.isfinite(losses)].astype(np.float64))
        low, high = np.percentile(losses, (5, 95)).tolist() if len(losses) >= FEWEST else (0.0, 0.0)
        if high - low <= SPREAD * (1 + abs(high)):
            return cls(weights=(1.0, 0.0))
        mixture = cls(low, high)
        scaled = mixture._scaled(losses[(losses >= low) & (losses <= high)])
        for _ in range(iterations):
            mixture = mixture._improved(scaled)
        return mixture._ordered()

    def posterior(self, losses: Floats) -> Floats:
        """(n,) the probability that each label is wrong; never lower for a larger loss.

        The log-odds' derivative, a / l - b / (1 - l), is 0 at l = a / (a + b) at most. Where the odds rise only
        up to there, or only from there on, they stay what they are there.
        """
        scaled = self._scaled(losses)
        (a0, a1), (b0, b1) = self.alphas, self.betas
        a, b = a1 - a0, b1 - b0
        if a > 0 and b > 0:
            scaled = np.minimum(scaled, a / (a + b))
        elif a < 0 and b < 0:
            scaled = np.maximum(scaled, a / (a + b))
        wrong: Floats = self._responsibilities(scaled)[1]
        return wrong

    def _scaled(self, losses: Floats) -> Floats:
        return np.clip((losses - self.low) / (self.high - self.low), EDGE, 1 - EDGE)

    def _responsibilities(self, scaled: Floats) -> Floats:
        """(2, n) the probability of each component, given each loss; the E-step."""
        parts = zip(self.alphas, self.betas, self.weights, strict=True)
        with np.errstate(divide="ignore"):  # a component of weight 0 has log-density -inf
            log_p = np.stack([np.log(weight) + _log_density(scaled, a, b) for a, b, weight in parts])
        p: Floats = np.exp(log_p - np.logaddexp(*log_p))
        return p

    def _improved(self, scaled: Floats) -> Self:
        """The M-step: each component gets the weighted mean and variance of its losses."""
        shares = np.maximum(self._responsibilities(scaled), TINY)
        mass = shares.sum(1)
        mean = shares @ scaled / mass
        variance = np.maximum((shares * (scaled - mean[:, None]) ** 2).sum(1) / mass, TINY)
        alphas = mean * (mean * (1 - mean) / variance - 1)
        betas = alphas * (1 - mean) / mean
        weights = mass / mass.sum()
        return replace(
            self,
            alphas=(float(alphas[0]), float(alphas[1])),
            betas=(float(betas[0]), float(betas[1])),
            weights=(float(weights[0]), float(weights[1])),
        )

    def _ordered(self) -> Self:
        """With the larger mean a / (a + b) second."""
        (a0, a1), (b0, b1) = self.alphas, self.betas
        if a0 * b1 <= a1 * b0:
            return self
        return replace(self, alphas=(a1, a0), betas=(b1, b0), weights=self.weights[::-1])


def _log_density(x: Floats, alpha: float, beta: float) -> Floats:
    log_normaliser = lgamma(alpha + beta) - lgamma(alpha) - lgamma(beta)
    return log_normaliser + (alpha - 1) * np.log(x) + (beta - 1) * np.log1p(-x)
