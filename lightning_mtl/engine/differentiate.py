"""Small steps of differentiation: gradients that may be missing, and what is done with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor

from lightning_mtl.engine.recompute import forwards_leave_no_trace
from lightning_mtl.types import Root

Grads = list[Tensor | None]


def stacked(losses: Sequence[Tensor]) -> Tensor:
    """The losses as ``[T]``, in float32 or better: sums and weights are not taken in half precision."""
    return torch.stack([loss if loss.dtype == torch.float64 else loss.float() for loss in losses])


def grad_of(outputs: Sequence[Root], inputs: Sequence[Root], seeds: Sequence[Tensor | None], *, keep: bool) -> Grads:
    """``torch.autograd.grad`` that gives ``None`` for what is not reached, also if nothing is asked or attached."""
    pairs = [
        (o, s)
        for o, s in zip(outputs, seeds, strict=True)
        if s is not None and (not isinstance(o, Tensor) or o.requires_grad)
    ]
    if not inputs or not pairs:
        return [None] * len(inputs)
    ends, starts = zip(*pairs, strict=True)
    # Tensors and edges may be mixed, which torch takes but does not declare.
    wanted = cast(Any, inputs)
    with forwards_leave_no_trace():
        return list(torch.autograd.grad(ends, wanted, starts, retain_graph=keep, allow_unused=True))


def real(grad: Tensor) -> Tensor:
    """The numbers of a gradient, dense and real: what inner products are taken of."""
    if grad.is_nested:
        grad = grad.values()
    if grad.is_sparse:
        grad = grad.to_dense()
    return torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad


def resolution(dtypes: Iterable[torch.dtype]) -> float:
    """The relative rounding of numbers of these dtypes: that of the coarsest."""
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo(torch.float64).eps)


def zeros_for(root: Root) -> Tensor:
    """A zero gradient for a root."""
    if isinstance(root, Tensor):
        return torch.zeros_like(root)
    meta = root.node._input_metadata[root.output_nr]
    return torch.zeros([int(size) for size in meta.shape], dtype=meta.dtype, device=meta.device)


def add_up(per_task: Sequence[Grads], weights: Sequence[float] | None = None) -> Grads:
    """Sum, or weighted sum, over tasks of gradients that may be missing."""
    total: Grads = []
    for column in zip(*per_task, strict=True):
        there = [(grad, task) for task, grad in enumerate(column) if grad is not None]
        if weights is None:
            total.append(reduce(torch.add, [grad for grad, _ in there]) if there else None)
            continue
        found: Tensor | None = None
        for grad, task in there:
            # The first product is ours, so the others are added in place.
            found = grad * weights[task] if found is None else found.add_(grad, alpha=weights[task])
        total.append(found)
    return total
