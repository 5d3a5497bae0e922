"""Task gradients at the last shared layer: looked at there, combined at the features."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, RowBalancer
from lightning_mtl.checks import bad_argument
from lightning_mtl.engine.collectives import parts_gram
from lightning_mtl.engine.differentiate import grad_of, real, resolution, seeds_for
from lightning_mtl.engine.gradients.features import Features
from lightning_mtl.types import Step


class LastLayer(Features):
    """``T`` short backwards, from the features to one layer, and one whole one."""

    def __init__(self, step: Step, balancer: GramBalancer | RowBalancer) -> None:
        super().__init__(step, balancer)
        self.layer = layer_of(step, balancer)

    def gram(self) -> Tensor:
        assert self.step.roots is not None
        assert self.layer is not None
        rows = []
        for roots, read in zip(self.step.roots, self.heads.roots, strict=True):
            grads = grad_of(roots, self.layer, seeds_for(roots, read), keep=True)
            pairs = zip(grads, self.layer, strict=True)
            rows.append([real(torch.zeros_like(p) if grad is None else grad) for grad, p in pairs])
        self.resolution = resolution(grad.dtype for grad in rows[0])
        return parts_gram(rows, disjoint=False)


def layer_of(step: Step, balancer: GramBalancer | RowBalancer) -> list[Tensor]:
    """The parameters of the last shared layer. Raises: ``ValueError`` if it is not known."""
    if not step.last_layer:
        raise bad_argument(
            balancer,
            "last_layer",
            "be known, because the norms are taken there",
            "no last shared layer",
            'Pass last_layer= (a module inside the encoder), norms_at="shared" or level="features"',
        )
    return step.last_layer
