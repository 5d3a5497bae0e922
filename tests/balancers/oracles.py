"""The methods again, as plainly as their papers write them: on raw vectors, with loops, sharing no code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pcgrad(rows: Sequence[Tensor], orders: Sequence[Sequence[int]]) -> tuple[Tensor, list[float]]:
    """Algorithm 1 of arXiv:2001.06782, with the order of the others given per task.

    Returns the update ``[N]`` and the weights that make it from the rows, ``T`` numbers.
    """
    update, weights = torch.zeros_like(rows[0]), [0.0] * len(rows)
    for i, order in enumerate(orders):
        cut = rows[i].clone()
        weights[i] += 1.0
        for j in order:
            inner = float(torch.dot(cut, rows[j]))
            if inner < 0:
                part = inner / float(torch.dot(rows[j], rows[j]))
                cut = cut - part * rows[j]
                weights[j] -= part
        update = update + cut
    return update, weights


def gradnorm_objective(weights: Tensor, norms: Sequence[float], rates: Sequence[float], alpha: float) -> Tensor:
    """``L_grad`` of arXiv:1711.02257, equation 2, its target held constant. Differentiable in ``weights [T]``."""
    scaled = [weights[t] * norms[t] for t in range(len(norms))]
    mean_norm = sum(g.item() for g in scaled) / len(scaled)
    mean_rate = sum(rates) / len(rates)
    terms = [abs(g - mean_norm * (rate / mean_rate) ** alpha) for g, rate in zip(scaled, rates, strict=True)]
    return torch.stack(terms).sum()


class GradNormByOptimizer:
    """Algorithm 1 of arXiv:1711.02257 with torch's own Adam and autograd on the published objective."""

    def __init__(self, weights: Sequence[float], alpha: float, lr: float) -> None:
        self.weights = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
        self.alpha, self.adam = alpha, torch.optim.Adam([self.weights], lr=lr)
        self.first: list[float] | None = None

    def step(self, norms: Sequence[float], losses: Sequence[float]) -> list[float]:
        """The weights for this step; afterwards those for the next are ready."""
        used = self.weights.detach().tolist()
        self.first = self.first or list(losses)
        rates = [loss / first for loss, first in zip(losses, self.first, strict=True)]
        self.adam.zero_grad()
        # The mean norm is only a unit for the gradient, so that Adam's epsilon has none (a documented departure).
        unit = sum(norms) / len(norms)
        (gradnorm_objective(self.weights, norms, rates, self.alpha) / unit).backward()
        self.adam.step()
        with torch.no_grad():
            self.weights.clamp_(min=0)
            self.weights.mul_(len(norms) / self.weights.sum())
        return used


def uncertainty(losses: Tensor, log_variance: Tensor, forms: Sequence[str]) -> Tensor:
    """Minus the log-likelihoods of arXiv:1705.07115: equation 7 (regression, without its constant) and 10."""
    total = torch.zeros((), dtype=losses.dtype)
    for loss, s, form in zip(losses, log_variance, forms, strict=True):
        sigma = torch.exp(s / 2)
        total = total + (loss / (2 * sigma**2) if form == "regression" else loss / sigma**2) + torch.log(sigma)
    return total
