"""COSMOS: a weighted sum that is drawn towards losses in the chosen proportion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_mtl.balancers.base import ALL, LossBalancer, Tasks
from lightning_mtl.checks import bad_argument, check_number
from lightning_mtl.linalg import one_or_nan


class COSMOS(LossBalancer):
    r"""Minimise :math:`r^\top \ell - \lambda \cos(r, \ell)`: low losses, in the proportion ``r``.

    Args:
        num_tasks: ``T``.
        preference: > 0, one number, a sequence of ``T``, or a mapping of task names (a task left out has
            1); divided by their sum over the present tasks they are ``r``, by default ``1 / T`` each.
        strength: :math:`\lambda`, >= 0, how much the angle counts. The paper chooses it per data set; 0 is a weighted
            sum.

    Shapes: losses ``[T]`` -> objective ``[]``. State: none.
    Update: mean scale where the losses have the proportion ``r``; heads are weighted. A weight is negative where the
    angle counts more than the sum. An absent task is left out.
    Raises: ``ValueError`` if an argument is out of range.
    Paper: Ruchte and Grabocka, ICDM 2021, arXiv:2103.13392. Departure: there ``r`` is drawn anew for each
    batch and fed to the network, which learns the whole front; here it is fixed and one point is found.

    Example:
        >>> import torch
        >>> COSMOS(2, strength=2.0)(torch.tensor([3.0, 3.0]))  # 3 - 2 * 1
        tensor(1.0000)
    """

    preference: Tensor

    def __init__(
        self,
        num_tasks: int,
        preference: float | Sequence[float] | Mapping[str, float] | None = None,
        strength: float = 1.0,
    ) -> None:
        super().__init__(num_tasks)
        check_number(strength, "strength", self, low=0.0)
        self.strength = strength
        # A setting, not state: a checkpoint must not bring an old one back.
        self._setting("preference", preference, 1.0)

    def objective(self, losses: Tensor, tasks: Tasks = ALL) -> Tensor:
        preference = self.preference[tasks].to(losses.dtype)
        share = preference / preference.sum()
        # In units of the largest loss: no square overflows, and only losses that are all 0 have a norm below 1.
        largest = losses.detach().abs().amax()
        scaled = losses / torch.where(largest > 0, largest, 1)
        cosine = (share @ scaled) / (share.norm() * scaled.norm().clamp(min=0.5))
        return (share @ losses - self.strength * torch.where(largest > 0, cosine, 0)) * one_or_nan(losses)

    def _setting_values(self, name: str) -> Tensor:
        values = super()._setting_values(name)
        if name == "preference" and not bool((values > 0).all()):
            raise bad_argument(self, name, "be > 0", values.tolist(), "Leave out a task that shall not count")
        return values
