"""Task gradients at the features: they fall off the pass over the heads, and one encoder backward follows."""

from __future__ import annotations

from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, RowBalancer
from lightning_mtl.engine.collectives import parts_gram
from lightning_mtl.engine.differentiate import Grads, add_up, real, resolution, zeros_for
from lightning_mtl.engine.gradients.base import TaskGradients
from lightning_mtl.engine.gradients.heads import HeadGrads, head_grads
from lightning_mtl.types import Step


class Features(TaskGradients):
    """The combination enters the encoder at the features.

    The node is put there, and autograd goes on by itself, with whatever hangs on the encoder's backward.
    """

    heads: HeadGrads

    def __init__(self, step: Step, balancer: GramBalancer | RowBalancer) -> None:
        super().__init__(step, balancer)
        assert step.roots is not None
        # One list of features for all tasks, or one per task that has samples of its own.
        self.common = all(task is step.roots[0] for task in step.roots)
        roots = [root for task in (step.roots[:1] if self.common else step.roots) for root in task]
        self.inputs = [*roots, *step.shared_heads]

    def take(self, scale: Tensor, *, apart: bool, keep: bool) -> list[Grads]:
        self.heads = head_grads(self.step, scale, apart=apart, keep=keep)
        return self.heads.private

    def gram(self) -> Tensor:
        assert self.step.roots is not None
        rows = [
            [real(zeros_for(root) if grad is None else grad) for root, grad in zip(roots, grads, strict=True)]
            for roots, grads in zip(self.step.roots, self.heads.roots, strict=True)
        ]
        self.resolution = resolution(grad.dtype for grad in rows[0])
        return parts_gram(rows, disjoint=True)

    def combine(self, weights: Tensor, *, wide: bool) -> Grads:
        factors, heads = self.per_loss(weights), self.heads
        if self.common:
            seeds = add_up(heads.roots, factors, wide=wide)
        else:
            seeds = [
                None if grad is None else grad * factor
                for factor, grads in zip(factors, heads.roots, strict=True)
                for grad in grads
            ]
        return [*seeds, *add_up(heads.shared_heads, factors, wide=wide)]
