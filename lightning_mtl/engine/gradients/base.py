"""What every way of taking task gradients offers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, RowBalancer
from lightning_mtl.engine.differentiate import Grads
from lightning_mtl.types import Step


class TaskGradients(ABC):
    """The task gradients of one step: :meth:`take` them, look at their :meth:`gram`, :meth:`combine` them.

    Args:
        step: losses, who is shared, and where the heads begin.
        balancer: what it looks at decides what is kept.

    Attributes:
        inputs: what the combination is for; the autograd node hands it there, before the private parameters.
        resolution: the relative rounding of the numbers behind the gram, once that is taken.
        layer: the one at which the gram is taken; ``None`` for all that is shared.
    """

    inputs: list[Tensor]
    resolution: float
    layer: list[Tensor] | None = None

    def __init__(self, step: Step, balancer: GramBalancer | RowBalancer) -> None:
        self.step, self.balancer = step, balancer

    @abstractmethod
    def take(self, scale: Tensor, *, apart: bool, keep: bool) -> list[Grads]:
        """Differentiate the losses, each times ``scale``.

        Args:
            scale: the factor in the gradients, ``[]``.
            apart: whether the gradients of private parameters are needed per task.
            keep: whether the graph must survive, for a term beside the losses.

        Returns: gradients of ``step.private``, per loss; a single entry, their sum, if not asked apart.
        """

    @abstractmethod
    def gram(self) -> Tensor:
        """This rank's share of the gram, scale and all: float64 ``[T, T]``, ``[K, T, T]`` in groups."""

    def look_at(self, layer: list[Tensor]) -> None:
        """Take the gram at another layer: the last one is not a part of every forward."""
        self.layer = layer

    @abstractmethod
    def combine(self, weights: Tensor, *, wide: bool) -> Grads:
        """The weighted sum over tasks, one gradient per entry of ``inputs``.

        Args:
            weights: ``[T]`` or ``[K, T]``.
            wide: whether the gradients nearly cancel, so that they must be added up in float64.
        """

    def per_loss(self, weights: Tensor) -> list[float]:
        """A number per loss, which a kernel takes without a transfer."""
        flat: list[float] = (weights.mean(0) if weights.ndim == 2 else weights).tolist()
        return flat * (len(self.step.losses) // len(flat))
