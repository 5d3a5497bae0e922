"""Balanced gradients by brute force: one backward per task over everything, combined by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mtl.balancers import Balancer, GradNorm, PCGrad, load
from tests.balancers import oracles

FORMS = ("classification", "regression", "regression")
FIXED = (0.5, 2.0, 1.25)


def used_balancer(name: str, num_tasks: int = 3, **options: Any) -> Balancer:
    """A balancer whose state is no longer that of the first step, so that its weights are not all 1."""
    options = {"fixed": {"weights": FIXED}, "uncertainty": {"forms": FORMS}}.get(name, {}) | options
    balancer = load(name, num_tasks, **options)
    state = balancer.state_dict()
    if name == "uncertainty":
        state["log_variance"] = torch.tensor([0.3, 1.1, -0.4])
    if name == "gradnorm":
        state["task_weights"] = torch.tensor([1.3, 0.4, 1.3], dtype=torch.float64)
    if name in ("pcgrad", "gradnorm"):
        state["step"] = torch.tensor(4)
    balancer.load_state_dict(state)
    return balancer


def weights_by_hand(name: str, balancer: Balancer, rows: Sequence[Tensor]) -> list[float]:
    """What the balancer of :func:`used_balancer` must answer, given its state before the step."""
    if name == "fixed":
        return list(FIXED)
    if name == "uncertainty":
        factors = [0.5 if form == "regression" else 1.0 for form in FORMS]
        return [f * float(torch.exp(-s.double())) for f, s in zip(factors, balancer.log_variance.detach(), strict=True)]
    if name == "gradnorm":
        assert isinstance(balancer, GradNorm)
        return balancer.task_weights.tolist()
    assert isinstance(balancer, PCGrad)
    _, weights = oracles.pcgrad([row.double() for row in rows], balancer._orders(len(rows)).tolist())
    return weights


@dataclass
class Brute:
    """Everything known about the gradients of ``T`` losses.

    Args:
        per_task: ``T`` mappings of parameter name to gradient (zeros where there is none).
        rows: ``T`` vectors, at the shared parameters, the last layer, or the features.
    """

    per_task: list[dict[str, Tensor]]
    rows: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module, losses: Sequence[Tensor], at: Sequence[str] | Sequence[Tensor]) -> Brute:
        """Differentiate; ``at`` are beginnings of parameter names, or the features themselves."""
        named = {n: p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("balancer")}
        features = [tensor for tensor in at if isinstance(tensor, Tensor)]
        per_task, rows = [], []
        for loss in losses:
            ends = [*named.values(), *features]
            grads = torch.autograd.grad(loss, ends, retain_graph=True, allow_unused=True)
            grads = [torch.zeros_like(e) if g is None else g for g, e in zip(grads, ends, strict=True)]
            per_task.append(dict(zip(named, grads[: len(named)], strict=True)))
            chosen = grads[len(named) :] or [g for n, g in per_task[-1].items() if n.startswith(tuple(at))]
            rows.append(torch.cat([grad.flatten() for grad in chosen]))
        return cls(per_task, rows)

    @property
    def gram(self) -> list[list[float]]:
        return [[float(torch.dot(a.double(), b.double())) for b in self.rows] for a in self.rows]

    def combined(self, weights: Sequence[float], weighted: Sequence[str]) -> dict[str, Tensor]:
        """Parameters whose names begin with one of ``weighted`` get the weighted sum, the others the plain one."""
        return {
            name: sum(
                (w if name.startswith(tuple(weighted)) else 1.0) * grads[name]
                for w, grads in zip(weights, self.per_task, strict=True)
            )
            for name in self.per_task[0]
        }


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of what is expected, both taken as one vector."""
    a, b = (torch.cat([tensor.double().flatten() for tensor in side]) for side in (found, expected))
    return float((a - b).norm() / b.norm())
