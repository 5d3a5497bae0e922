"""Random loss weighting: other weights in every step."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_mtl.balancers.base import ALL, LossBalancer, Tasks
from lightning_mtl.checks import check_choice, check_integer

_LAWS = ("normal", "dirichlet")


class RLW(LossBalancer):
    r"""Weigh the losses with random numbers: :math:`L = \sum_t w_t \ell_t`, :math:`w = \mathrm{softmax}(x)`.

    Args:
        num_tasks: ``T``.
        law: "normal", :math:`x_t \sim N(0, 1)`, or "dirichlet", for which ``w`` is uniform on the simplex.
        seed: of the draws; the step counter is added to it, so all ranks and a resumed run draw the same.

    Shapes: losses ``[T]`` -> objective ``[]``.
    State: ``step`` counts backwards; it stays on the CPU.
    Update: mean scale, the weights are positive and sum to 1; heads are weighted. The same step gives the same
    weights. All ``T`` weights are drawn in every step; those of the present tasks are divided by their sum. Every
    order of the tasks is as probable as any other.
    Raises: ``ValueError`` if the law is unknown or the seed is no integer >= 0.
    Paper: Lin et al., TMLR 2022, arXiv:2111.10603. It tries more laws, with similar results.

    Example:
        >>> import torch
        >>> balancer = RLW(2)
        >>> balancer.weights(torch.ones(2)), balancer.weights(torch.ones(2))  # no backward in between
        (tensor([0.8623, 0.1377]), tensor([0.8623, 0.1377]))
    """

    step: Tensor
    # Linear in the losses, but whether they are finite decides if the step counts: all ranks must see the same losses.
    linear_in_losses = False
    state_on_cpu = True

    def __init__(self, num_tasks: int, law: Literal["normal", "dirichlet"] = "normal", seed: int = 0) -> None:
        super().__init__(num_tasks)
        check_choice(law, _LAWS, "law", self)
        check_integer(seed, "seed", self, low=0)
        self.law, self.seed = law, seed
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def objective(self, losses: Tensor, tasks: Tasks = ALL) -> Tensor:
        logits = self._draw().to(losses.device, non_blocking=True)[tasks]
        return losses @ torch.softmax(logits, 0).to(losses.dtype)

    def observe(self, losses: Tensor, tasks: Tasks = ALL) -> None:
        self.step += 1

    def _draw(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + int(self.step))
        draws = torch.empty(self.num_tasks, dtype=torch.float64)
        if self.law == "normal":
            return draws.normal_(generator=generator)
        # Exponential variables over their sum are uniform on the simplex.
        return draws.exponential_(generator=generator).log()
