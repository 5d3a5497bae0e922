"""Task gradients: first at the features, from one pass over the heads; then, where needed, at the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from lightning_mtl.checks import bad_argument, shape
from lightning_mtl.engine.gather import RowExchange
from lightning_mtl.types import Root, Step

Grads = list[Tensor | None]


@dataclass
class HeadGrads:
    """What one pass over the heads gives.

    Args:
        roots: per task, ``d loss / d root``, ``None`` where a task does not read a root.
        shared_heads: per task, the gradients of ``Step.shared_heads``.
        private: per task, the gradients of ``Step.private``; a single entry, their sum, if not asked apart.
    """

    roots: list[Grads]
    shared_heads: list[Grads]
    private: list[Grads]


def head_grads(step: Step, scale: Tensor, *, apart: bool) -> HeadGrads:
    """Differentiate the losses with respect to what the heads read and own.

    Args:
        step: its losses; with leaves, and nothing asked apart, one backward serves all tasks.
        scale: factor of every gradient (a loss scale, so that half-precision gradients do not underflow).
        apart: whether private gradients are needed per task.

    Only nodes between the losses and the roots run, so the encoder's graph survives.
    Raises: ``ValueError`` if heads that read leaves reach what lies behind the roots by another way: that gradient
    would be lost.
    """
    roots = step.leaves if step.leaves is not None else step.roots
    assert roots is not None
    seeds = [scale.to(loss) for loss in step.losses]
    width = [len(root) for root in roots]
    own_leaves = step.leaves is not None and len({id(leaves) for leaves in step.leaves}) == len(step.leaves)
    own = {id(parameter) for parameter in step.private}
    behind = [] if step.leaves is None else [parameter for parameter in step.shared if id(parameter) not in own]
    if own_leaves and not apart and not step.shared_heads:
        inputs = [*(leaf for leaves in roots for leaf in leaves), *step.private]
        grads = _only_through_leaves(step.losses, inputs, behind, seeds, keep=False)
        ends = [sum(width[:task]) for task in range(len(width) + 1)]
        return HeadGrads(
            [grads[begin:end] for begin, end in pairwise(ends)],
            [[] for _ in roots],
            [grads[ends[-1] :]],
        )
    result = HeadGrads([], [], [])
    num = len(step.losses)
    for task, (loss, seed) in enumerate(zip(step.losses, seeds, strict=True)):
        inputs = [*roots[task], *step.shared_heads, *step.private]
        grads = _only_through_leaves([loss], inputs, behind, [seed], keep=task < num - 1)
        middle = width[task] + len(step.shared_heads)
        result.roots.append(grads[: width[task]])
        result.shared_heads.append(grads[width[task] : middle])
        result.private.append(grads[middle:])
    if not apart:
        result.private = [add_up(result.private)]
    return result


def _only_through_leaves(
    losses: Sequence[Tensor], inputs: Sequence[Root], behind: Sequence[Tensor], seeds: Sequence[Tensor], *, keep: bool
) -> Grads:
    # Asked for along with the rest, which costs nothing where the losses do not reach it.
    grads = grad_of(losses, [*inputs, *behind], seeds, keep=keep)
    beside = [parameter for parameter, grad in zip(behind, grads[len(inputs) :], strict=True) if grad is not None]
    if beside:
        raise bad_argument(
            "lightning_mtl",
            "encoder",
            "return everything that heads and losses read of it",
            f"losses that reach {len(beside)} of its parameters beside the features, one of shape {shape(beside[0])}",
            "Return these tensors as features too, or use Balanced without features=",
        )
    return grads[: len(inputs)]


def rows_from_roots(step: Step, heads: HeadGrads, *, whole: bool = False) -> RowExchange:
    """``T`` vector-Jacobian products of the encoder fill the rows ``[T, N]``.

    Every rank runs the same number of encoder backwards in the same order, zeros for a task without labels:
    synchronised batch norm holds collectives.
    """
    assert step.roots is not None
    exchange = _exchange(step, whole)
    num = len(step.losses)
    for task in range(num):
        roots = step.roots[task]
        seeds = [zeros_for(root) if grad is None else grad for root, grad in zip(roots, heads.roots[task], strict=True)]
        # With one loader per task each task has an encoder graph of its own, used once.
        keep = any(later is roots for later in step.roots[task + 1 :])
        grads = grad_of(roots, step.shared, seeds, keep=keep)
        fill(exchange[task], [*grads, *heads.shared_heads[task]], [*step.shared, *step.shared_heads])
        exchange.send(task)
    return exchange


def rows_from_losses(step: Step, scale: Tensor, *, whole: bool = False) -> tuple[RowExchange, list[Grads]]:
    """Without a cut: every row by a whole backward from its loss. Also returns private gradients per task."""
    exchange = _exchange(step, whole)
    private: list[Grads] = []
    shared = [*step.shared, *step.shared_heads]
    for task, loss in enumerate(step.losses):
        grads = grad_of([loss], [*shared, *step.private], [scale.to(loss)], keep=task < len(step.losses) - 1)
        fill(exchange[task], grads[: len(shared)], shared)
        private.append(grads[len(shared) :])
        exchange.send(task)
    return exchange, private


def fill(row: Tensor, grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> None:
    """Flatten gradients into a row ``[N]``; 0 where there is none."""
    views = row.split([tensor.numel() for tensor in like])
    pairs = [(view, grad) for view, grad in zip(views, grads, strict=True) if grad is not None]
    for view, grad in zip(views, grads, strict=True):
        if grad is None:
            view.zero_()
    if pairs:
        dense = [grad.to_dense() if grad.is_sparse else grad for _, grad in pairs]
        torch._foreach_copy_([view for view, _ in pairs], [grad.reshape(-1) for grad in dense])


def unflatten(row: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a row ``[N]`` in the shapes of the parameters."""
    parts = row.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


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


def zeros_for(root: Root) -> Tensor:
    """A zero gradient for a root."""
    if isinstance(root, Tensor):
        return torch.zeros_like(root)
    meta = root.node._input_metadata[root.output_nr]
    return torch.zeros([int(size) for size in meta.shape], dtype=meta.dtype, device=meta.device)


def _exchange(step: Step, whole: bool) -> RowExchange:
    shared = [*step.shared, *step.shared_heads]
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in shared))
    size, like = sum(tensor.numel() for tensor in shared), shared[0].new_empty(0, dtype=dtype)
    return RowExchange(len(step.losses), size, like, whole=whole)


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
    return list(torch.autograd.grad(ends, wanted, starts, retain_graph=keep, allow_unused=True))
