"""Ways of taking the tasks' gradients: one file each, behind one interface.

A new way is a file here and a line in :func:`choose`.
"""

from __future__ import annotations

from lightning_mtl.balancers.base import GramBalancer, RowBalancer
from lightning_mtl.engine.gradients.base import TaskGradients as TaskGradients
from lightning_mtl.engine.gradients.features import Features
from lightning_mtl.engine.gradients.last_layer import LastLayer, layer_of
from lightning_mtl.engine.gradients.stored import Stored
from lightning_mtl.types import Step


def choose(step: Step, balancer: GramBalancer | RowBalancer, level: str) -> TaskGradients:
    """The cheapest way that gives what the balancer looks at in this step."""
    if isinstance(balancer, RowBalancer) or step.roots is None:
        return Stored(step, balancer)
    if level == "features" or (not balancer.due and balancer.granularity == "whole"):
        return Features(step, balancer)
    if balancer.gram_at == "last_layer" and {id(p) for p in layer_of(step, balancer)} <= {id(p) for p in step.shared}:
        return LastLayer(step, balancer)
    return Stored(step, balancer)
