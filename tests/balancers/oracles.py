"""The methods again, as plainly as their papers write them: on raw vectors, with loops, sharing no code."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from scipy.optimize import brentq
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
    """Minus the log-likelihoods of arXiv:1705.07115: equation 7 (regression, without its constant) and 10.

    For "laplace" that of Laplace's distribution with the scale e^s, as torch has it, without its constant.
    """
    total = torch.zeros((), dtype=losses.dtype)
    for loss, s, form in zip(losses, log_variance, forms, strict=True):
        if form == "laplace":
            likelihood = torch.distributions.Laplace(torch.zeros_like(loss), torch.exp(s)).log_prob(loss)
            total = total - likelihood - math.log(2)
            continue
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
    """Weighted sum minus cosine, arXiv:2103.13392."""
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


def nearest_on_simplex(point: Sequence[float]) -> list[float]:
    """The point minus the one number that leaves positive parts of sum 1, found by bisection."""

    def surplus(shift: float) -> float:
        return math.fsum(max(x - shift, 0.0) for x in point) - 1

    shift = brentq(surplus, min(point) - 2, max(point), xtol=1e-15, rtol=1e-15)
    return [max(x - shift, 0.0) for x in point]


def softmax(point: Sequence[float]) -> list[float]:
    total = sum(math.exp(x) for x in point)
    return [math.exp(x) / total for x in point]


def weighted_sum(weights: Sequence[float], rows: Sequence[Tensor]) -> Tensor:
    """``sum_t w_t g_t``, task by task."""
    total = torch.zeros_like(rows[0])
    for weight, row in zip(weights, rows, strict=True):
        total = total + weight * row
    return total


def graddrop(rows: Sequence[Tensor], draws: Sequence[float], leak: Sequence[float]) -> Tensor:
    """Algorithm 1 of arXiv:2010.06808, coordinate by coordinate, for given draws."""
    update = []
    for column, draw in zip(torch.stack(list(rows)).T.tolist(), draws, strict=True):
        total, size = sum(column), sum(abs(x) for x in column)
        purity = 0.5 if size == 0 else 0.5 * (1 + total / size)
        kept = [x > 0 if purity > draw else x < 0 for x in column]
        update.append(sum(part * x + (1 - part) * x * keep for part, x, keep in zip(leak, column, kept, strict=True)))
    return torch.tensor(update, dtype=rows[0].dtype)


def excess_mtl(steps: Sequence[Sequence[Tensor]], eta: float, warmup_steps: int) -> list[list[float]]:
    """Algorithm 1 of arXiv:2402.02009: the weights of each step."""
    num_tasks, num = len(steps[0]), len(steps[0][0])
    squares = [[0.0] * num for _ in range(num_tasks)]
    weights, first, found = [1 / num_tasks] * num_tasks, [], []
    for k, rows in enumerate(steps):
        excess = []
        for t, row in enumerate(rows):
            for i, x in enumerate(row.tolist()):
                squares[t][i] += x * x
            excess.append(sum(x * x / math.sqrt(past) for x, past in zip(row.tolist(), squares[t], strict=True)))
        if k == warmup_steps:
            first = excess
        elif k > warmup_steps:
            grown = [w * math.exp(eta * e / e_0) for w, e, e_0 in zip(weights, excess, first, strict=True)]
            weights = [w / sum(grown) for w in grown]
        found.append(weights)
    return found


def moco(
    steps: Sequence[Sequence[Tensor]],
    beta: float,
    beta_decay: float,
    gamma: float,
    gamma_decay: float,
    rho: float,
    projection: Callable[[Sequence[float]], list[float]],
) -> list[Tensor]:
    """Algorithm 1 of MoCo: the update of each step."""
    tracked = [torch.zeros_like(row) for row in steps[0]]
    weights, found = [1 / len(tracked)] * len(tracked), []
    for k, rows in enumerate(steps, start=1):
        tracked = [y - beta / k**beta_decay * (y - g) for y, g in zip(tracked, rows, strict=True)]
        point = weighted_sum(weights, tracked)
        slope = [float(torch.dot(y, point)) + rho * w for y, w in zip(tracked, weights, strict=True)]
        weights = projection([w - gamma / k**gamma_decay * s for w, s in zip(weights, slope, strict=True)])
        found.append(weighted_sum(weights, tracked))
    return found


def db_mtl(steps: Sequence[tuple[Sequence[Tensor], Sequence[float]]], beta: float, beta_decay: float) -> list[Tensor]:
    """Algorithm 1 of arXiv:2308.12029, each first average being the first gradient: the update of each step."""
    averages: list[Tensor] = []
    found = []
    for k, (rows, losses) in enumerate(steps, start=1):
        logs = [row / (loss + 1e-8) for row, loss in zip(rows, losses, strict=True)]
        b = beta / k**beta_decay
        averages = [b * a + (1 - b) * g for a, g in zip(averages, logs, strict=True)] if averages else logs
        lengths = [math.sqrt(float(torch.dot(a, a))) for a in averages]
        found.append(weighted_sum([max(lengths) / length for length in lengths], averages))
    return found


def modo(
    steps: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
    gamma: float,
    rho: float,
    projection: Callable[[Sequence[float]], list[float]],
) -> list[list[float]]:
    """Algorithm 1 of arXiv:2305.20057 for the gradients on two samples: the weights of each step."""
    weights, found = [1 / len(steps[0][0])] * len(steps[0][0]), []
    for one, other in steps:
        point = weighted_sum(weights, other)
        slope = [float(torch.dot(row, point)) + rho * w for row, w in zip(one, weights, strict=True)]
        weights = projection([w - gamma * s for w, s in zip(weights, slope, strict=True)])
        found.append(weights)
    return found


def sdmgrad(
    steps: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
    pull: float,
    preference: Sequence[float],
    lr: float,
    momentum: float,
    iterations: int,
) -> list[list[float]]:
    """Algorithm 1 of arXiv:2305.18409 with torch's own SGD: per step the weights of the combination."""
    weights = torch.full((len(preference),), 1 / len(preference), dtype=torch.float64, requires_grad=True)
    found = []
    for one, other in steps:
        size = sum(float(row.norm()) for row in (*one, *other)) / (2 * len(one))
        sgd = torch.optim.SGD([weights], lr=lr, momentum=momentum)
        for _ in range(iterations):
            mixed = [w + pull * p for w, p in zip(weights.tolist(), preference, strict=True)]
            point = weighted_sum(mixed, other)
            weights.grad = torch.stack([torch.dot(row, point) for row in one]) / size**2
            sgd.step()
            with torch.no_grad():
                weights.copy_(torch.tensor(nearest_on_simplex(weights.tolist()), dtype=torch.float64))
        found.append([(w + pull * p) / (1 + pull) for w, p in zip(weights.tolist(), preference, strict=True)])
    return found
