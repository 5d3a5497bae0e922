"""Uncertainty weighting: learn one log-variance per task with the user's optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_mtl.balancers.base import ALL, LossBalancer, Tasks
from lightning_mtl.checks import bad_argument, check_choice, check_number

_FORMS = ("regression", "classification")


class Uncertainty(LossBalancer):
    r"""Weigh each loss by its learned precision, with :math:`s_t = \log \sigma_t^2`.

    Regression (Gaussian likelihood, squared error): :math:`\tfrac12 e^{-s_t} \ell_t + \tfrac12 s_t`.
    Classification (softmax with temperature, cross-entropy): :math:`e^{-s_t} \ell_t + \tfrac12 s_t`.

    Args:
        num_tasks: ``T``.
        forms: "regression" or "classification" for all tasks, a sequence of ``T`` of them, or a mapping of task
            names (a task left out is a regression).
        initial_log_variance: where every ``s_t`` starts.

    Shapes: losses ``[T]`` -> objective ``[]``.
    State: ``log_variance`` ``[T]``, a parameter: it must be in a parameter group of the optimizer, best without
    weight decay, which would pull every weight back to its start.
    Update: sum scale; heads are weighted. An absent task's ``s_t`` does not move, except by the optimizer's own
    momentum.
    Raises: ``ValueError`` if a form or a task name is unknown.
    Paper: Kendall, Gal, Cipolla, CVPR 2018, arXiv:1705.07115, equations 7 and 10. The classification form uses
    the approximation of its equation 10.

    Example:
        >>> import torch
        >>> Uncertainty(2)(torch.tensor([1.0, 3.0])).item()
        2.0
    """

    # It is linear, but without the mean of the losses over the ranks `log_variance` would have another gradient on each
    # rank, and in a loop of one's own it is in no DDP module.
    linear_in_losses = False

    def __init__(
        self,
        num_tasks: int,
        forms: str | Sequence[str] | Mapping[str, str] = "regression",
        initial_log_variance: float = 0.0,
    ) -> None:
        super().__init__(num_tasks)
        check_number(initial_log_variance, "initial_log_variance", self)
        self._given = dict(forms) if isinstance(forms, Mapping) else forms
        self.log_variance = nn.Parameter(torch.full((num_tasks,), float(initial_log_variance)))
        # Derived from the arguments, not learned: nothing to save.
        self.register_buffer("scale", self._resolve(), persistent=False)
        self.scale: Tensor

    def bind(self, names: Sequence[str]) -> None:
        super().bind(names)
        self.scale.copy_(self._resolve())

    def objective(self, losses: Tensor, tasks: Tasks = ALL) -> Tensor:
        if isinstance(self._given, dict) and self.names is None:
            raise bad_argument(
                self,
                "forms",
                "be a string or a sequence where the task names are not known",
                "a mapping",
                "Call bind(names) first, or pass the forms in task order",
            )
        log_variance, scale = self.log_variance.to(losses.dtype), self.scale.to(losses.dtype)
        if tasks is not ALL:
            log_variance, scale = log_variance[tasks], scale[tasks]
        precision = scale * torch.exp(-log_variance)
        return (precision * losses + 0.5 * log_variance).sum()

    def _resolve(self) -> Tensor:
        forms = self._by_task(self._given, "regression", "forms", str)
        for form in forms:
            check_choice(form, _FORMS, "forms", self)
        return torch.tensor([0.5 if form == "regression" else 1.0 for form in forms])
