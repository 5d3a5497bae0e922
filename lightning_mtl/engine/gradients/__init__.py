"""Ways of taking the tasks' gradients: one file each, behind one interface.

A new way is a file here and a line in :func:`choose`.
"""

from __future__ import annotations

from lightning_mtl.balancers.base import GramBalancer, RowBalancer
from lightning_mtl.engine.gradients.base import TaskGradients as TaskGradients
from lightning_mtl.engine.gradients.features import Features
from lightning_mtl.engine.gradients.last_layer import LastLayer, layer_of
from lightning_mtl.engine.gradients.stored import Stored
from lightning_mtl.engine.gradients.whole import Whole
from lightning_mtl.types import Step


def choose(step: Step, balancer: GramBalancer | RowBalancer, level: str) -> TaskGradients:
    """The way of taking gradients that a step needs."""
    if level == "features":
        return Features(step, balancer)
    if (
        isinstance(balancer, RowBalancer)
        or balancer.granularity != "whole"
        or (balancer.due and not _at_layer(step, balancer))
    ):
        return Stored(step, balancer)
    if step.roots is None:
        return Whole(step, balancer)
    return LastLayer(step, balancer) if balancer.due else Features(step, balancer)


def _at_layer(step: Step, balancer: GramBalancer) -> bool:
    """Whether the gram of one layer is enough, and that layer lies behind the features."""
    if balancer.gram_at != "last_layer":
        return False
    return step.roots is None or {id(p) for p in layer_of(step, balancer)} <= {id(p) for p in step.shared}
