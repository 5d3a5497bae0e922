"""What many seeds say together: paired tests, effect sizes, mean and spread."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import binomtest, rankdata
from torch import Tensor

from lightning_mtl.checks import bad_argument


@dataclass(frozen=True)
class Paired:
    """One arm against another on the same seeds.

    ``gain`` is the mean difference, positive if the first arm is better, ``d_z`` that mean in units of the
    differences' standard deviation, ``wins`` of ``seeds`` how often the first is better, ``p`` the two-sided Wilcoxon
    signed-rank test, exact also where differences are equal or zero.
    """

    gain: float
    d_z: float
    wins: int
    seeds: int
    p: float

    def better(self, level: float = 0.05) -> bool:
        """Whether the first arm is better, beyond chance at this level."""
        return self.gain > 0 and self.p < level

    def worse(self, level: float = 0.05) -> bool:
        """Whether the first arm is worse, beyond chance at this level."""
        return self.gain < 0 and self.p < level

    @property
    def smallest(self) -> float:
        """The smallest p that so many seeds can give: all differences on one side."""
        return smallest_p(self.seeds)

    def verdict(self, better: str, worse: str, neither: str, level: float = 0.05) -> str:
        """The one of these that is borne out at this level, or that so few seeds cannot bear any out."""
        if self.smallest >= level:
            return f"{self.seeds} seeds cannot tell: p is at least {self.smallest:.1g}"
        return better if self.better(level) else worse if self.worse(level) else neither


def smallest_p(seeds: int) -> float:
    """The smallest p that a two-sided signed-rank test of so many seeds can give."""
    return 2 / 2**seeds


def paired(first: Tensor, second: Tensor, best: Literal["low", "high"] = "low") -> Paired:
    """Compare two arms seed by seed: ``[S]`` and ``[S]``, of which low or high values are good.

    Raises:
        ValueError: with fewer than two seeds, or a score that is not finite.
    """
    _check_seeds(first)
    # Accuracies of single precision are equal, or their differences, only up to rounding.
    gains = (first.double() - second.double()).round(decimals=6) * (1 if best == "high" else -1)
    if not gains.isfinite().all():
        lost = f"{int((~gains.isfinite()).sum())} of {len(gains)} differences that are not"
        raise bad_argument("paired", "scores", "be finite", lost, "Look at what these seeds trained before testing it")
    if not gains.any():
        return Paired(0.0, 0.0, 0, len(gains), 1.0)
    spread = float(gains.std()) if (gains != gains[0]).any() else 0.0
    mean = float(gains.mean())
    return Paired(
        gain=mean,
        d_z=mean / spread if spread else math.copysign(math.inf, mean),
        wins=int((gains > 0).sum()),
        seeds=len(gains),
        p=signed_rank_p(gains),
    )


def signed_rank_p(gains: Tensor) -> float:
    """Exact two-sided p of Wilcoxon's signed-rank test of ``[S]`` differences; zeros are left out, ties share a rank.

    It counts over all patterns of signs of the differences that are there, as a permutation test does.
    """
    there = gains[gains != 0].double().numpy()
    if not len(there):
        return 1.0
    # Twice the ranks are integers: a rank shared by two is at a half.
    ranks = (2 * rankdata(abs(there))).astype(int)
    chance = np.zeros(ranks.sum() + 1)  # of each sum of the ranks that are positive
    chance[0] = 1.0
    for rank in ranks:
        chance = (chance + np.roll(chance, rank)) / 2  # what comes round from the end is still zero
    up = ranks[there > 0].sum()
    return float(min(1.0, 2 * min(chance[: up + 1].sum(), chance[up:].sum())))


def binomial(first: int, second: int) -> float:
    """How likely a split as uneven as this one is (two-sided) if both sides are equally likely."""
    return float(binomtest(first, first + second).pvalue) if first + second else 1.0


def mean_sd(values: Tensor) -> str:
    """Mean and standard deviation over seeds, ``[S]``, at least two, for a table."""
    _check_seeds(values)
    return f"{values.mean():.3f} ±{values.std():.3f}"


def auroc(scores: Tensor, positive: Tensor) -> Tensor:
    """The share of pairs, one positive and one not, that are ranked rightly: ``[S, N]`` and ``[N]`` -> ``[S]``."""
    good, bad = scores[:, positive].unsqueeze(2), scores[:, ~positive].unsqueeze(1)
    return ((good > bad).float() + 0.5 * (good == bad).float()).mean((1, 2))


def shares(values: Tensor) -> tuple[int, int, int]:
    """How many of ``[S]`` values are above 0.8, below 0.2, and between."""
    high, low = int((values > 0.8).sum()), int((values < 0.2).sum())
    return high, low, len(values) - high - low


def _check_seeds(values: Tensor) -> None:
    if len(values) < 2:
        cure = "Pass --seeds 2 or more: one seed has no spread and allows no test"
        raise bad_argument("stats", "seeds", "be at least 2", len(values), cure)
