"""GradNorm: learn the weights that make the tasks train at similar rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, Tasks
from lightning_mtl.checks import bad_argument, check_choice, check_number
from lightning_mtl.linalg import adam_step


class GradNorm(GramBalancer):
    r"""Move each task's weighted gradient norm towards one that fits its training rate.

    With :math:`n_t = \|\nabla_W \ell_t\|`, :math:`G_t = w_t n_t`, their mean :math:`\bar G`, and the relative inverse
    training rate :math:`r_t = \frac{\ell_t / \ell_t(0)}{\mathrm{mean}_u\, \ell_u / \ell_u(0)}`, the weights descend on
    :math:`\sum_t |G_t - \bar G r_t^\alpha|` with the target held constant. That gradient has a closed form,
    :math:`\mathrm{sign}(G_t - \bar G r_t^\alpha)\, n_t`: no second-order graph is built.

    Args:
        num_tasks: ``T``.
        alpha: pull towards equal training rates, >= 0. 0 makes all norms equal; the paper has 1.5 (NYUv2), 0.12 (toy).
            The default is what did least harm over ten problems (``benchmarks/defaults.py``).
        lr: of the Adam that moves the weights (the paper's 0.025).
        norms_at: "last_layer" (the paper's ``W``) or all "shared" parameters; at level "features" the features.
        loss_offset: for losses that can go negative a lower bound, subtracted before ratios are formed.
        initial_losses: :math:`\ell_t(0)` if known (``log C`` for ``C`` classes); else each task's first loss above its
            offset.
        every_n_steps: solve in every n-th step only.

    Shapes: gram ``[T, T]``, losses ``[T]`` -> weights ``[T]``.
    State (``[T]``): ``task_weights``, ``initial_losses``, Adam's ``first_moment``, ``second_moment``, ``updates``.
    Update: the weights sum to ``T``, so it has sum scale; scale-free; heads keep their own gradient unless the module
    has ``weight_heads=True``. The weights used in a step are those from before it, as in algorithm 1. A task whose loss
    is exactly 0 or at its offset keeps its weight in that step and has no say in the others'.
    Raises: ``ValueError`` if an argument is out of range, or a loss is below its offset.
    Paper: Chen et al., ICML 2018, arXiv:1711.02257, section 3 and algorithm 1. Departures: the gradient is divided by
    the mean norm, so that Adam's epsilon has no unit; weights are kept >= 0.

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
        alpha: float = 0.0,
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
        self._setting("loss_offset", loss_offset, 0.0)
        self._initial = dict(initial_losses) if isinstance(initial_losses, Mapping) else initial_losses
        for name in ("first_moment", "second_moment", "updates"):
            self.register_buffer(name, torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("task_weights", torch.ones(num_tasks, dtype=torch.float64))
        self.register_buffer("initial_losses", self._given_losses())

    def bind(self, names: Sequence[str]) -> None:
        super().bind(names)
        given = self._given_losses()
        if isinstance(self._initial, dict):
            # What a checkpoint or a step has brought already stays.
            self.initial_losses.copy_(torch.where(self.initial_losses.isnan(), given, self.initial_losses))

    def _given_losses(self) -> Tensor:
        values = self._by_task(self._initial, float("nan"), "initial_losses", float)
        given = torch.tensor(values, dtype=torch.float64)
        early = self.names is None and isinstance(self._settings["loss_offset"][0], dict)  # asked again with the names
        if not early and bool((given <= self.loss_offset).any()):  # NaN: not given
            raise bad_argument(self, "initial_losses", "lie above the offset", values, "Pass a lower loss_offset=")
        return given

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        used, norms = self.task_weights[tasks].clone(), gram.diagonal().clamp(min=0).sqrt()
        above = losses - self.loss_offset[tasks]
        counts = (losses != 0) & (above != 0)
        if bool((counts & (above < 0)).any()):
            want = "be >= 0 after the offset, because the method compares their ratios"
            raise bad_argument(
                self, "losses", want, losses.tolist(), "Pass loss_offset= with a lower bound of the losses"
            )
        if bool(counts.all()):
            self._move(used, norms, above, tasks)
        elif bool(counts.any()):
            self._move(used[counts], norms[counts], above[counts], torch.arange(self.num_tasks)[tasks][counts])
        return used

    def _move(self, used: Tensor, norms: Tensor, above: Tensor, tasks: Tasks) -> None:
        """Move the weights of these tasks, whose losses are above their offsets."""
        initial = self.initial_losses[tasks] - self.loss_offset[tasks]
        initial = torch.where(initial > 0, initial, above)  # NaN: not known yet
        self.initial_losses[tasks] = initial + self.loss_offset[tasks]
        ratios, weighted = above / initial, used * norms
        if float(norms.mean()) > 0:
            target = weighted.mean() * (ratios / ratios.mean()) ** self.alpha
            gradient = torch.sign(weighted - target) * norms / norms.mean()
            step, self.first_moment[tasks], self.second_moment[tasks], self.updates[tasks] = adam_step(
                gradient, self.first_moment[tasks], self.second_moment[tasks], self.updates[tasks], self.lr
            )
            moved = (used - step).clamp(min=0)
            if float(moved.sum()) > 0:  # these tasks' weights keep their sum, the others theirs
                self.task_weights[tasks] = moved * (used.sum() / moved.sum())
