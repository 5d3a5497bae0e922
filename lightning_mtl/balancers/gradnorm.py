"""GradNorm: learn the weights that make the tasks train at similar rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, Tasks
from lightning_mtl.checks import bad_argument, check_choice, check_number

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


class GradNorm(GramBalancer):
    r"""Move each task's weighted gradient norm towards one that fits its training rate.

    With :math:`n_t = \|\nabla_W \ell_t\|`, :math:`G_t = w_t n_t`, their mean :math:`\bar G`, and the relative
    inverse training rate :math:`r_t = \frac{\ell_t / \ell_t(0)}{\mathrm{mean}_u\, \ell_u / \ell_u(0)}`, the weights
    descend on :math:`\sum_t |G_t - \bar G r_t^\alpha|` with the target held constant. That gradient has a closed
    form, :math:`\mathrm{sign}(G_t - \bar G r_t^\alpha)\, n_t`: no second-order graph is built.

    Args:
        num_tasks: ``T``.
        alpha: pull back towards equal rates, >= 0; the paper uses 1.5 (NYUv2) and 0.12 (toy). 0 makes all norms
            equal.
        lr: of the Adam that moves the weights (the paper's 0.025).
        norms_at: at level "parameters", "last_layer" takes the norms at the last shared layer (the paper's ``W``),
            "shared" at all shared parameters. At level "features" they are taken at the features.
        loss_offset: a number, or one per task, subtracted from the losses before ratios are formed; for losses
            that can go negative pass a lower bound.
        initial_losses: :math:`\ell_t(0)` if known (for cross-entropy over ``C`` classes ``log C``); otherwise each
            task's first finite loss.
        every_n_steps: solve in every n-th step only.

    Shapes: gram ``[T, T]``, losses ``[T]`` -> weights ``[T]``.
    State (buffers): ``task_weights``, ``initial_losses``, Adam's ``first_moment``, ``second_moment`` and
    ``updates``, all ``[T]``.
    Update: the weights sum to ``T``, so it has sum scale; scale-free; heads keep their own gradient unless the
    module has ``weight_heads=True``. The weights used in a step are those from before it, as in algorithm 1.
    Raises: ``ValueError`` if an argument is out of range, or in training if a loss is
    below its offset, or not above it in the task's first step.
    Paper: Chen et al., ICML 2018, arXiv:1711.02257, section 3 and algorithm 1. Departures: the gradient is divided
    by the mean norm, so that Adam's epsilon has no unit; weights are kept >= 0.

    Example:
        >>> import torch
        >>> balancer = GradNorm(2, alpha=0.0)
        >>> _ = balancer(torch.diag(torch.tensor([1.0, 10_000.0])), torch.ones(2))
        >>> [round(w, 3) for w in balancer.task_weights.tolist()]  # the loud task is turned down
        [1.025, 0.975]
    """

    task_weights: Tensor
    initial_losses: Tensor
    loss_offset: Tensor
    first_moment: Tensor
    second_moment: Tensor
    updates: Tensor

    def __init__(
        self,
        num_tasks: int,
        alpha: float = 1.5,
        lr: float = 0.025,
        norms_at: Literal["last_layer", "shared"] = "last_layer",
        loss_offset: float | Sequence[float] | Mapping[str, float] = 0.0,
        initial_losses: Sequence[float] | Mapping[str, float] | None = None,
        every_n_steps: int = 1,
    ) -> None:
        super().__init__(num_tasks, every_n_steps)
        check_number(alpha, "alpha", self, low=0.0)
        check_number(lr, "lr", self, low=0.0, exclusive=True)
        check_choice(norms_at, ("last_layer", "shared"), "norms_at", self)
        self.alpha, self.lr, self.gram_at = alpha, lr, norms_at
        self._offset_given = dict(loss_offset) if isinstance(loss_offset, Mapping) else loss_offset
        self._initial_given = dict(initial_losses) if isinstance(initial_losses, Mapping) else initial_losses
        nan = float("nan")
        for name, values in {
            "task_weights": [1.0] * num_tasks,
            "initial_losses": self._by_task(self._initial_given, nan, "initial_losses", float),
            "first_moment": [0.0] * num_tasks,
            "second_moment": [0.0] * num_tasks,
            "updates": [0.0] * num_tasks,
        }.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64))
        offset = torch.tensor(self._by_task(self._offset_given, 0.0, "loss_offset", float), dtype=torch.float64)
        self.register_buffer("loss_offset", offset, persistent=False)
        self._check_given()

    def bind(self, names: Sequence[str]) -> None:
        super().bind(names)
        if isinstance(self._offset_given, dict):
            values = self._by_task(self._offset_given, 0.0, "loss_offset", float)
            self.loss_offset.copy_(torch.tensor(values, dtype=torch.float64))
        if isinstance(self._initial_given, dict):
            values = self._by_task(self._initial_given, float("nan"), "initial_losses", float)
            self.initial_losses.copy_(torch.tensor(values, dtype=torch.float64))
        self._check_given()

    def _check_given(self) -> None:
        if self.names is None and isinstance(self._offset_given, dict):
            return  # asked again when the names are known
        if not bool(torch.isfinite(self.loss_offset).all()):
            raise bad_argument(
                self, "loss_offset", "be finite", self.loss_offset.tolist(), "Pass a lower bound of the losses"
            )
        if bool((self.initial_losses <= self.loss_offset).any()):  # NaN: not given
            raise bad_argument(
                self,
                "initial_losses",
                "lie above the offset, because the method divides by them",
                self.initial_losses.tolist(),
                "Leave them out, or pass a smaller loss_offset=",
            )

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        used = self.task_weights[tasks].clone()
        norms = gram.diagonal().clamp(min=0).sqrt()
        ratios = self._ratios(losses, tasks)
        weighted = used * norms
        if float(norms.mean()) > 0 and float(ratios.mean()) > 0:
            target = weighted.mean() * (ratios / ratios.mean()) ** self.alpha
            self._descend(torch.sign(weighted - target) * norms / norms.mean(), tasks)
        return used

    def _ratios(self, losses: Tensor, tasks: Tasks) -> Tensor:
        losses = losses - self.loss_offset[tasks]
        initial = self.initial_losses[tasks] - self.loss_offset[tasks]
        initial = torch.where(initial.isnan(), losses, initial)
        if not bool((losses >= 0).all() & (initial > 0).all()):
            raise bad_argument(
                self,
                "losses",
                "be >= 0 after the offset, and > 0 in a task's first step, because the method compares their ratios",
                losses.tolist(),
                "Pass loss_offset= with a lower bound of the losses, or initial_losses=",
            )
        self.initial_losses[tasks] = initial + self.loss_offset[tasks]
        return losses / initial

    def _descend(self, gradient: Tensor, tasks: Tasks) -> None:
        """One Adam step of the present tasks' weights, which keep their sum: absent tasks keep theirs."""
        total = self.task_weights[tasks].sum()
        self.updates[tasks] += 1
        first = _BETAS[0] * self.first_moment[tasks] + (1 - _BETAS[0]) * gradient
        second = _BETAS[1] * self.second_moment[tasks] + (1 - _BETAS[1]) * gradient**2
        self.first_moment[tasks], self.second_moment[tasks] = first, second
        first = first / (1 - _BETAS[0] ** self.updates[tasks])
        second = second / (1 - _BETAS[1] ** self.updates[tasks])
        moved = (self.task_weights[tasks] - self.lr * first / (second.sqrt() + _EPSILON)).clamp(min=0)
        if float(moved.sum()) > 0:
            self.task_weights[tasks] = moved * (total / moved.sum())
