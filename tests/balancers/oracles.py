"""The methods again, as plainly as their papers write them: on raw vectors, with loops, sharing no code."""

from __future__ import annotations

import math
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


def dwa(epochs: Sequence[Sequence[float]], temperature: float) -> list[float]:
    """Equation 7 of arXiv:1803.10704 after epochs with these mean losses ``[epoch][task]``."""
    num_tasks = len(epochs[0])
    if len(epochs) < 2:
        return [1.0] * num_tasks
    rates = [epochs[-1][t] / epochs[-2][t] for t in range(num_tasks)]
    total = sum(math.exp(rate / temperature) for rate in rates)
    return [num_tasks * math.exp(rate / temperature) / total for rate in rates]


def geometric_mean(losses: Tensor) -> Tensor:
    """The ``T``-th root of the product, not in the log domain."""
    product = losses[0]
    for loss in losses[1:]:
        product = product * loss
    return product ** (1 / len(losses))


def imtl_l(losses: Tensor, scales: Tensor) -> Tensor:
    """The learned loss of IMTL-L, one task at a time."""
    return torch.stack([torch.exp(s) * loss - s for loss, s in zip(losses, scales, strict=True)]).sum()


def stch(losses: Tensor, preference: Sequence[float], reference: Sequence[float], mu: float) -> Tensor:
    """The smooth Tchebycheff function of arXiv:2402.19078."""
    terms = [torch.exp(w * (loss - z) / mu) for loss, w, z in zip(losses, preference, reference, strict=True)]
    return mu * torch.log(torch.stack(terms).sum())


def stch_of_ratios(losses: Tensor, nadir: Sequence[float], mu: float) -> Tensor:
    """What the experiments of arXiv:2402.19078 minimise after their warm-up."""
    terms = [(loss / n) ** (1 / mu) for loss, n in zip(losses, nadir, strict=True)]
    return len(terms) * mu * torch.log(torch.stack(terms).sum())


def cosmos(losses: Tensor, preference: Sequence[float], strength: float) -> Tensor:
    """Weighted sum minus cosine, arXiv:2103.12868."""
    inner = sum(r * loss for r, loss in zip(preference, losses, strict=True))
    lengths = math.sqrt(sum(r * r for r in preference)) * torch.sqrt(sum(loss * loss for loss in losses))
    return inner - strength * inner / lengths


def pbi(losses: Tensor, weights: Sequence[float], reference: Sequence[float], theta: float) -> Tensor:
    """The two distances of MOEA/D, for losses above the reference."""
    length = math.sqrt(sum(w * w for w in weights))
    above = [loss - z for loss, z in zip(losses, reference, strict=True)]
    along = abs(sum(a * w for a, w in zip(above, weights, strict=True))) / length
    beside = [loss - (z + along * w / length) for loss, z, w in zip(losses, reference, weights, strict=True)]
    return along + theta * torch.sqrt(sum(b * b for b in beside))


class FAMOByOptimizer:
    """Algorithm 1 of arXiv:2306.03792 with torch's own Adam and autograd; the drop is seen one step later."""

    def __init__(self, num_tasks: int, gamma: float, lr: float, bounds: Sequence[float]) -> None:
        self.logits = torch.zeros(num_tasks, dtype=torch.float64, requires_grad=True)
        self.adam = torch.optim.Adam([self.logits], lr=lr, weight_decay=gamma)
        self.bounds, self.last = bounds, None

    def step(self, losses: Sequence[float]) -> list[float]:
        """The weights of this step."""
        gaps = [loss - bound for loss, bound in zip(losses, self.bounds, strict=True)]
        if self.last is not None:
            drop = torch.tensor([math.log(a / b) for a, b in zip(self.last, gaps, strict=True)], dtype=torch.float64)
            self.adam.zero_grad()
            (gradient,) = torch.autograd.grad(torch.softmax(self.logits, 0), self.logits, grad_outputs=drop)
            self.logits.grad = gradient
            self.adam.step()
        self.last = gaps
        shares = [z / gap for z, gap in zip(torch.softmax(self.logits, 0).tolist(), gaps, strict=True)]
        return [share / sum(shares) for share in shares]
