"""Small steps of differentiation: gradients that may be missing, and what is done with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor

from lightning_mtl.engine.collectives import world_size

Grads = list[Tensor | None]


def stacked(losses: Sequence[Tensor]) -> Tensor:
    """The losses as ``[T]``, in float32 or better: sums and weights are not taken in half precision."""
    return torch.stack([loss if loss.dtype == torch.float64 else loss.float() for loss in losses])


@contextmanager
def hooks_aside(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within this context no hook of these tensors runs, and what they retain of gradients stays as it was.

    A backward inside the engine is not the one that a hook was registered for: that comes with the final gradient.
    """
    # Autograd holds on to the dict itself, so that emptying it is enough.
    held = [(tensor._backward_hooks, dict(tensor._backward_hooks)) for tensor in tensors if tensor._backward_hooks]
    retained = [(tensor, tensor.grad) for tensor in tensors if tensor.retains_grad]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, saved in held:
            hooks.update(saved)
        for tensor, grad in retained:
            tensor.grad = grad


def grad_of(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], seeds: Sequence[Tensor | None], *, keep: bool
) -> Grads:
    """``torch.autograd.grad`` that gives ``None`` for what is not reached, also if nothing is asked or attached."""
    pairs = [(o, s) for o, s in zip(outputs, seeds, strict=True) if s is not None and o.requires_grad]
    if not inputs or not pairs:
        return [None] * len(inputs)
    ends, starts = zip(*pairs, strict=True)
    grads = torch.autograd.grad(ends, inputs, starts, retain_graph=keep, allow_unused=True)
    return [None if grad is None else as_plain(grad) for grad in grads]


def as_plain(tensor: Tensor) -> Tensor:
    """Without a subclass that only carries labels or meta data: its rules say nothing about gradients.

    One that decides how its operations run (sharded, nested) stays what it is.
    """
    kind = type(tensor)
    if kind is Tensor or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return tensor
    return tensor.as_subclass(Tensor)


def seeds_for(roots: Sequence[Tensor], grads: Grads) -> Grads:
    """What arrives at the roots. Several processes run the same backwards, so a root that is not read gets zeros.

    On one process it gets nothing, and so does what lies behind it alone.
    """
    if world_size() == 1:
        return grads
    return [zeros_for(root) if grad is None else grad for root, grad in zip(roots, grads, strict=True)]


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


def zeros_for(root: Tensor) -> Tensor:
    """A zero gradient for a root."""
    return torch.zeros_like(as_plain(root))


def add_up(per_task: Sequence[Grads], weights: Sequence[float] | None = None, *, wide: bool = False) -> Grads:
    """Sum, or weighted sum, over tasks of gradients that may be missing; ``wide``: in double precision."""
    total: Grads = []
    for column in zip(*per_task, strict=True):
        there = [(grad, task) for task, grad in enumerate(column) if grad is not None]
        # Sparse gradients can be added to dense ones only.
        there.sort(key=lambda pair: pair[0].is_sparse)
        if weights is None:
            total.append(reduce(torch.add, [grad for grad, _ in there]) if there else None)
            continue
        found: Tensor | None = None
        for grad, task in there:
            # The first product is ours, so the others are added in place.
            if found is None:
                found = (grad.to(torch.promote_types(grad.dtype, torch.float64)) if wide else grad) * weights[task]
            else:
                found.add_(grad, alpha=weights[task])
        total.append(found.to(there[0][0].dtype) if found is not None else None)
    return total
