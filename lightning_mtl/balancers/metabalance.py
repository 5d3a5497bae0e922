"""MetaBalance: bring auxiliary gradients near the length of the main task's, tensor by tensor."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, Tasks
from lightning_mtl.checks import check_choice, check_number


class MetaBalance(GramBalancer):
    r"""Bring auxiliary gradients near the length of the main task's, tensor by tensor.

    Add all gradients, the auxiliary ones rescaled:
    :math:`d = g_1 + \sum_{t > 1} (r\, m_1 / m_t + 1 - r)\, g_t`, with moving averages :math:`m_t` of the norms.

    Args:
        num_tasks: ``T``.
        main: which task the others serve: its name, or its place in the order; by default the first main task.
        relax: ``r`` in [0, 1]: 1 gives every auxiliary the main task's length, 0 leaves it alone; the paper's code has
            0.7.
        beta: how much of the average is kept per step, in [0, 1); the paper's code has 0.9.
        granularity: per "tensor" as published, per "layer", or the "whole" of the shared parameters.
        every_n_steps: solve in every n-th step only.

    Shapes: gram ``[K, T, T]`` of the ``K`` groups, losses ``[T]`` (unused) -> weights ``[K, T]``, > 0.
    State: that of :class:`GramBalancer`, and ``norms`` ``[K, T]``, started at the first norms (0: not seen yet).
    Update: sum scale; scale-free while the unit is the same in all steps; the main task has weight 1; heads keep their
    own gradient. Without the main task in a batch the auxiliaries keep their own gradients.
    Raises: ``ValueError`` if an option is out of range, no task has the name, or the task is an auxiliary one.
    Paper: He et al., WWW 2022, arXiv:2203.06801, algorithm 1 and section 3.4.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 10.0]])
        >>> MetaBalance(2, relax=1.0, granularity="whole").combine(rows, torch.ones(2))
        tensor([1., 1.])
    """

    norms: Tensor
    grouped = True
    growing = ("norms", "last_weights")
    levels = ("parameters", "features")

    def __init__(
        self,
        num_tasks: int,
        main: int | str | None = None,
        relax: float = 0.7,
        beta: float = 0.9,
        granularity: Literal["whole", "layer", "tensor"] = "tensor",
        every_n_steps: int = 1,
    ) -> None:
        super().__init__(num_tasks, every_n_steps)
        check_number(relax, "relax", self, low=0.0, high=1.0)
        check_number(beta, "beta", self, low=0.0, high=1.0)
        check_choice(granularity, ("whole", "layer", "tensor"), "granularity", self)
        self.relax, self.beta, self.granularity = relax, beta, granularity
        self.main = main
        self._place(main, "main")
        self.register_buffer("norms", torch.zeros((1, num_tasks), dtype=torch.float64))

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        self._grown("norms", len(gram))
        now = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        kept = self.norms[:, tasks]
        average = torch.where(kept > 0, self.beta * kept + (1 - self.beta) * now, now)
        self.norms[:, tasks] = average
        index = torch.arange(self.num_tasks)[tasks].tolist()
        main = self._place(self.main, "main")
        if main not in index:
            return torch.ones_like(now)
        own = average[:, index.index(main), None]
        weights = torch.where(average > 0, self.relax * own / average + 1 - self.relax, 1.0)
        weights[:, index.index(main)] = 1.0
        return weights
