"""Uncertainty weighting: learn one log-variance per task with the user's optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_mtl.balancers.base import ALL, LearnedBalancer, Tasks
from lightning_mtl.checks import bad_argument, check_choice, check_number

#: Factors of the loss and of the logarithm.
_FORMS = {"regression": (0.5, 0.5), "classification": (1.0, 0.5), "laplace": (1.0, 1.0)}


class Uncertainty(LearnedBalancer):
    r"""Weigh each loss by its learned precision, with :math:`s_t = \log \sigma_t^2`.

    Regression (Gaussian likelihood, squared error): :math:`\tfrac12 e^{-s_t} \ell_t + \tfrac12 s_t`.
    Classification (softmax with temperature, cross-entropy): :math:`e^{-s_t} \ell_t + \tfrac12 s_t`.
    Laplace (absolute error, with :math:`s_t` the logarithm of its scale): :math:`e^{-s_t} \ell_t + s_t`; it is also the
    form in which the authors published code, for the squared error, twice that of a regression.

    Args:
        num_tasks: ``T``.
        forms: "regression", "classification" or "laplace" for all tasks, a sequence of ``T`` of them, or a mapping of
            task names (a task left out is a regression).
        initial_log_variance: where every ``s_t`` starts.
        lr: of an Adam of the balancer's own that moves the ``s_t``, where a library makes the optimizer; by default
            they are the user's optimizer's.

    Shapes: losses ``[T]`` -> objective ``[]``.
    State: ``log_variance`` ``[T]``, a parameter: it must be in a parameter group of the optimizer, best without
    weight decay, which would pull every weight back to its start. With ``lr`` no parameter, and Adam's
    ``first_moment``, ``second_moment`` and ``updates`` beside it, ``[T]``.
    Update: sum scale; heads are weighted. The ``s_t`` of an absent task, and of one whose loss is exactly 0, does not
    move, except by the optimizer's own momentum.
    Raises: ``ValueError`` if a form or a task name is unknown, or ``lr`` is not > 0.
    Paper: Kendall, Gal, Cipolla, CVPR 2018, arXiv:1705.07115, equations 7 and 10. The classification form uses
    the approximation of its equation 10. Code in the third form: github.com/yaringal/multi-task-learning-example.

    Example:
        >>> import torch
        >>> Uncertainty(2)(torch.tensor([1.0, 3.0])).item()
        2.0
    """

    log_variance: Tensor
    scale: Tensor
    slope: Tensor

    def __init__(
        self,
        num_tasks: int,
        forms: str | Sequence[str] | Mapping[str, str] = "regression",
        initial_log_variance: float = 0.0,
        lr: float | None = None,
    ) -> None:
        check_number(initial_log_variance, "initial_log_variance", self)
        super().__init__(num_tasks, "log_variance", initial_log_variance, sign=-1, lr=lr)
        self._given = dict(forms) if isinstance(forms, Mapping) else forms
        # Derived from the arguments, not learned: nothing to save.
        for name, values in zip(("scale", "slope"), self._resolve(), strict=True):
            self.register_buffer(name, values, persistent=False)

    def bind(self, names: Sequence[str]) -> None:
        super().bind(names)
        for state, values in zip((self.scale, self.slope), self._resolve(), strict=True):
            state.copy_(values)

    def factors(self, tasks: Tasks) -> tuple[Tensor, Tensor]:
        return self.scale[tasks], self.slope[tasks]

    def objective(self, losses: Tensor, tasks: Tasks = ALL) -> Tensor:
        if isinstance(self._given, dict) and self.names is None:
            raise bad_argument(
                self,
                "forms",
                "be a string or a sequence where the task names are not known",
                "a mapping",
                "Call bind(names) first, or pass the forms in task order",
            )
        return super().objective(losses, tasks)

    def _resolve(self) -> Tensor:
        """Their factors, ``[2, T]``."""
        forms = self._by_task(self._given, "regression", "forms", str)
        for form in forms:
            check_choice(form, tuple(_FORMS), "forms", self)
        return torch.tensor([_FORMS[form] for form in forms]).T
