"""Whole backwards from the losses where one is enough: no features are known, and no row has to be kept."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, RowBalancer
from lightning_mtl.engine.collectives import parts_gram
from lightning_mtl.engine.differentiate import Grads, add_up, grad_of, real, resolution
from lightning_mtl.engine.gradients.base import TaskGradients
from lightning_mtl.engine.gradients.last_layer import layer_of
from lightning_mtl.types import Step


class Whole(TaskGradients):
    """``T`` short backwards, to the heads' parameters and to one layer, and a whole one over the weighted losses.

    Without a gram the short ones are one, and end at the heads' parameters.
    """

    def __init__(self, step: Step, balancer: GramBalancer | RowBalancer) -> None:
        super().__init__(step, balancer)
        self.inputs = [*step.shared, *step.shared_heads]
        self.layer = layer_of(step, balancer) if balancer.due else None

    def take(self, scale: Tensor, *, apart: bool, keep: bool) -> list[Grads]:
        step, self.keep, self.scale = self.step, keep, scale
        own, seeds = step.private, [scale.to(loss) for loss in step.losses]
        if self.layer is None and not apart:
            return [grad_of(step.losses, own, seeds, keep=True)]
        layer = self.layer or []
        every = [
            grad_of([one], [*layer, *own], [seed], keep=True) for one, seed in zip(step.losses, seeds, strict=True)
        ]
        self.rows, private = [grads[: len(layer)] for grads in every], [grads[len(layer) :] for grads in every]
        return private if apart else [add_up(private)]

    def look_at(self, layer: list[Tensor]) -> None:
        self.rows = [grad_of([loss], layer, [self.scale.to(loss)], keep=True) for loss in self.step.losses]
        self.layer = layer

    def gram(self) -> Tensor:
        assert self.layer is not None
        parts = [
            [real(torch.zeros_like(p) if grad is None else grad) for grad, p in zip(row, self.layer, strict=True)]
            for row in self.rows
        ]
        self.resolution = resolution(grad.dtype for grad in parts[0])
        return parts_gram(parts, disjoint=False)

    def combine(self, weights: Tensor, *, wide: bool) -> Grads:
        seeds = [(self.scale * w).to(loss) for loss, w in zip(self.step.losses, self.per_loss(weights), strict=True)]
        return grad_of(self.step.losses, self.inputs, seeds, keep=self.keep)
