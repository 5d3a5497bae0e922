"""What many seeds say together: paired tests, effect sizes, mean and spread."""

from dataclasses import dataclass
from typing import Literal

from scipy.stats import binomtest, wilcoxon
from torch import Tensor


@dataclass(frozen=True)
class Paired:
    """One arm against another on the same seeds.

    ``gain`` is the mean difference, positive if the first arm is better, ``d_z`` that mean in units of the
    differences' standard deviation, ``wins`` of ``seeds`` how often the first is better, ``p`` the two-sided Wilcoxon
    signed-rank test.
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


def paired(first: Tensor, second: Tensor, best: Literal["low", "high"] = "low") -> Paired:
    """Compare two arms seed by seed: ``[S]`` and ``[S]``, of which low or high values are good."""
    gains = (first - second).double() * (1 if best == "high" else -1)
    if not gains.any():
        return Paired(0.0, 0.0, 0, len(gains), 1.0)
    spread = float(gains.std())
    mean = float(gains.mean())
    return Paired(
        gain=mean,
        d_z=mean / spread if spread else float("inf"),
        wins=int((gains > 0).sum()),
        seeds=len(gains),
        p=float(wilcoxon(gains.numpy()).pvalue),
    )


def binomial(first: int, second: int) -> float:
    """How likely a split as uneven as this one is (two-sided) if both sides are equally likely."""
    return float(binomtest(first, first + second).pvalue) if first + second else 1.0


def mean_sd(values: Tensor) -> str:
    """Mean and standard deviation over seeds, ``[S]``, for a table."""
    return f"{values.mean():.3f} ±{values.std():.3f}"


def auroc(scores: Tensor, positive: Tensor) -> Tensor:
    """The share of pairs, one positive and one not, that are ranked rightly: ``[S, N]`` and ``[N]`` -> ``[S]``."""
    good, bad = scores[:, positive].unsqueeze(2), scores[:, ~positive].unsqueeze(1)
    return ((good > bad).float() + 0.5 * (good == bad).float()).mean((1, 2))


def shares(values: Tensor) -> tuple[int, int, int]:
    """How many of ``[S]`` values are above 0.8, below 0.2, and between."""
    high, low = int((values > 0.8).sum()), int((values < 0.2).sum())
    return high, low, len(values) - high - low
