"""The gradients of the heads: from one pass over them, those of the features and of what the heads own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from lightning_mtl.checks import bad_argument, shape
from lightning_mtl.engine.differentiate import Grads, add_up, grad_of, hooks_aside
from lightning_mtl.engine.graph import entangled
from lightning_mtl.types import Step


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


def head_grads(step: Step, scale: Tensor, *, apart: bool, keep: bool) -> HeadGrads:
    """Differentiate the losses with respect to what the heads read and own.

    Args:
        step: its losses; with leaves, and nothing asked apart, one backward serves all tasks.
        scale: factor of every gradient (a loss scale, so that half-precision gradients do not underflow).
        apart: whether private gradients are needed per task.
        keep: whether the heads' graph must survive.

    Only nodes between the losses and the roots run, so the encoder's graph survives; hooks of the roots wait for the
    backward that goes on from there.
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
        grads = _only_through_leaves(step.losses, inputs, behind, seeds, keep=keep)
        ends = [sum(width[:task]) for task in range(len(width) + 1)]
        return HeadGrads([grads[begin:end] for begin, end in pairwise(ends)], [[] for _ in roots], [grads[ends[-1] :]])
    # What the roots' own backward still needs must not be freed by this one.
    keep = keep or (step.leaves is None and any(entangled(task) for task in roots))
    result = HeadGrads([], [], [])
    num = len(step.losses)
    for task, (loss, seed) in enumerate(zip(step.losses, seeds, strict=True)):
        inputs = [*roots[task], *step.shared_heads, *step.private]
        # Leaves have no other backward in which theirs could run.
        with hooks_aside(roots[task] if step.leaves is None else ()):
            grads = _only_through_leaves([loss], inputs, behind, [seed], keep=keep or task < num - 1)
        middle = width[task] + len(step.shared_heads)
        result.roots.append(grads[: width[task]])
        result.shared_heads.append(grads[width[task] : middle])
        result.private.append(grads[middle:])
    if not apart:
        result.private = [add_up(result.private)]
    return result


def _only_through_leaves(
    losses: Sequence[Tensor], inputs: Sequence[Tensor], behind: Sequence[Tensor], seeds: Sequence[Tensor], *, keep: bool
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
