"""PCGrad for two tasks, on paper: no code of the package."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def pcgrad(losses: Sequence[Tensor], shared: Sequence[Tensor]) -> list[Tensor]:
    """The update of the shared parameters: each gradient without what opposes the other, added."""
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, shared, strict=True)])
        )
    a, b = (row.double() for row in rows)
    inner = min(float(a @ b), 0.0)
    update = a - inner / float(b @ b) * b + b - inner / float(a @ a) * a
    sizes = [p.numel() for p in shared]
    return [part.view_as(p).to(p) for part, p in zip(update.split(sizes), shared, strict=True)]


def conflict(losses: Sequence[Tensor], shared: Sequence[Tensor]) -> bool:
    """Whether the two gradients oppose each other, so that PCGrad is no plain sum."""
    a, b = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True, materialize_grads=True)])
        for loss in losses
    )
    return (a @ b).item() < 0


def assert_update(model: nn.Module, losses: Sequence[Tensor], shared: Sequence[nn.Parameter]) -> None:
    """After a backward: the shared parameters hold PCGrad's update of these losses, the others their own gradients."""
    assert conflict(losses, shared)
    for parameter, wanted in zip(shared, pcgrad(losses, shared), strict=True):
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    known = {id(p) for p in shared}
    others = [p for p in model.parameters() if id(p) not in known]
    plain = torch.autograd.grad(sum(losses), others, retain_graph=True, allow_unused=True) if others else ()
    for parameter, grad in zip(others, plain, strict=True):
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, torch.zeros_like(parameter) if grad is None else grad, rtol=1e-4, atol=1e-6)
