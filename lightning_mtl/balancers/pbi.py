"""PBI, penalty-based boundary intersection: go down a ray through loss space, and stay on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_mtl.balancers.base import ALL, LossBalancer, Tasks
from lightning_mtl.checks import bad_argument, check_number
from lightning_mtl.linalg import one_or_nan


class PBI(LossBalancer):
    r"""Minimise :math:`d_1 + \theta d_2`, the way along a ray and the distance from it.

    The ray starts at ``z`` and has the direction ``u``, the preference divided by its norm:
    :math:`d_1 = u^\top (\ell - z)`, :math:`d_2 = \| \ell - z - d_1 u \|`. On the ray the distance has no gradient; 0
    is taken.

    Args:
        num_tasks: ``T``.
        preference: the proportion that the losses above ``z`` shall have, > 0: one number, a sequence of ``T``, or a
            mapping of task names (a task left out has 1).
        theta: :math:`\theta`, >= 0, how much the distance counts (5 in the paper).
        reference: ``z``, the best losses one can hope for, in the same forms; 0 by default.

    Shapes: losses ``[T]`` -> objective ``[]``. State: none.
    Update: weights ``u`` on the ray; heads are weighted. A weight may be negative: beside the ray a loss that is too
    small for its place is let go. An absent task is left out.
    Raises: ``ValueError`` if an argument is out of range.
    Paper: Zhang and Li, IEEE Transactions on Evolutionary Computation 11(6), 2007 (MOEA/D), the third decomposition of
    section II. Departures: written for minimisation, with the ray's direction of length 1 throughout, and without the
    absolute value of :math:`d_1`, which would turn the tasks round once they pass ``z``.

    Example:
        >>> import torch
        >>> PBI(2)(torch.tensor([3.0, 4.0])).item()  # 7 / sqrt(2) + 5 / sqrt(2)
        8.485...
    """

    preference: Tensor
    reference: Tensor

    def __init__(
        self,
        num_tasks: int,
        preference: float | Sequence[float] | Mapping[str, float] | None = None,
        theta: float = 5.0,
        reference: float | Sequence[float] | Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(num_tasks)
        check_number(theta, "theta", self, low=0.0)
        self.theta = theta
        self._setting("preference", preference, 1.0)
        self._setting("reference", reference, 0.0)

    def objective(self, losses: Tensor, tasks: Tasks = ALL) -> Tensor:
        preference = self.preference[tasks].to(losses.dtype)
        ray = preference / preference.norm()
        above = losses - self.reference[tasks].to(losses.dtype)
        # In units of the largest entry, so that no square overflows.
        largest = above.detach().abs().amax()
        unit = torch.where(largest > 0, largest, 1)
        scaled = above / unit
        along = ray @ scaled
        beside = scaled - along * ray
        # What is left on the ray is rounding, and would have a direction of its own.
        rounding = 8 * len(losses) * torch.finfo(losses.dtype).eps
        beside = torch.where(beside.detach().norm() > rounding, beside, 0)
        return unit * (along + self.theta * beside.norm()) * one_or_nan(losses)

    def _setting_values(self, name: str) -> Tensor:
        values = super()._setting_values(name)
        if name == "preference" and not bool((values > 0).all()):
            raise bad_argument(self, name, "be > 0", values.tolist(), "Leave out a task that shall not count")
        return values
