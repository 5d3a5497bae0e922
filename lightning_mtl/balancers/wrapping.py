"""What the balancers have in common that are made from other balancers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mtl.balancers.base import Balancer, GramBalancer, LossBalancer, Tasks
from lightning_mtl.balancers.registry import build
from lightning_mtl.checks import bad_argument


class Wrapper(GramBalancer):
    """A gram balancer that asks others for their weights.

    Args:
        num_tasks: ``T``.
        inner: a loss balancer, or a gram balancer on the whole of the shared parameters; see ``build`` for the forms.
        every_n_steps: solve in every n-th step only.
        arg: what ``inner`` is called in the method's own arguments, for error messages.

    Their parameters are the user's optimizer's, as ever; their state moves with each solve.
    """

    inner: Balancer

    def __init__(self, num_tasks: int, inner: Any, every_n_steps: int = 1, arg: str = "balancer") -> None:
        super().__init__(num_tasks, every_n_steps)
        self.inner = self._made(inner, arg)

    def bind(self, names: Sequence[str]) -> None:
        super().bind(names)
        for child in self.children():
            if isinstance(child, Balancer):
                child.bind(names)

    def bind_roles(self, main: Sequence[str]) -> None:
        super().bind_roles(main)
        for child in self.children():
            if isinstance(child, Balancer):
                child.bind_roles(main)

    def end_epoch(self) -> None:
        for child in self.children():
            if isinstance(child, Balancer):
                child.end_epoch()

    def private_weights(self, losses: Tensor, present: Tensor | None = None) -> Tensor | None:
        return private_weights_of(self.inner, losses, present)

    def own_objective(self, losses: Tensor, present: Tensor | None = None) -> Tensor | None:
        return own_objective_of(self.inner, losses, present)

    def _made(self, spec: Any, arg: str) -> Balancer:
        balancer = build(spec, self.num_tasks)
        if balancer.num_tasks != self.num_tasks:
            raise bad_argument(
                self,
                arg,
                f"be a balancer of {self.num_tasks} tasks",
                f"one of {balancer.num_tasks}",
                "Pass its name, so that it gets the number of tasks from here",
            )
        plain = isinstance(balancer, LossBalancer) or (
            isinstance(balancer, GramBalancer)
            and not (balancer.grouped or balancer.halves or balancer.gram_at == "last_layer")
        )
        if not plain:
            raise bad_argument(
                self,
                arg,
                "need the losses, or one gram of all shared parameters",
                type(balancer).__name__,
                "Choose another balancer",
            )
        return balancer

    def _inner_weights(self, balancer: Balancer, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        """One step of a balancer: its weights for the present tasks, ``[P]``."""
        present = torch.zeros(self.num_tasks, dtype=torch.bool)
        present[tasks] = True
        all_losses = losses.new_zeros(self.num_tasks)
        all_losses[tasks] = losses
        if isinstance(balancer, LossBalancer):
            at = all_losses.to(device_of(balancer))
            weights = balancer.weights(at, present)
            balancer.advance(at, present)
            return weights.to(losses)[tasks]
        assert isinstance(balancer, GramBalancer)
        whole = gram.new_zeros((self.num_tasks, self.num_tasks))
        index = torch.arange(self.num_tasks)[tasks]
        whole[index[:, None], index] = gram
        if not balancer.due:
            return balancer.reuse(present)[tasks]
        solved: Tensor = balancer(whole, all_losses, present, self.resolution)
        return solved[tasks]


def device_of(balancer: Balancer) -> torch.device:
    """Where a balancer's numbers are."""
    for tensor in (*balancer.parameters(), *(value for _, value in balancer.named_state())):
        return tensor.device
    return torch.device("cpu")


def private_weights_of(balancer: Balancer, losses: Tensor, present: Tensor | None) -> Tensor | None:
    """The factors that a balancer puts on the heads' gradients, ``[T]``."""
    if isinstance(balancer, LossBalancer):
        return balancer.weights(losses.to(device_of(balancer)), present).to(losses)
    assert isinstance(balancer, GramBalancer)
    return balancer.private_weights(losses, present)


def own_objective_of(balancer: Balancer, losses: Tensor, present: Tensor | None) -> Tensor | None:
    """What a balancer's own parameters minimise."""
    if isinstance(balancer, LossBalancer):
        learns = any(parameter.requires_grad for parameter in balancer.parameters())
        return balancer(losses.detach().to(device_of(balancer)), present) if learns else None
    assert isinstance(balancer, GramBalancer)
    return balancer.own_objective(losses, present)
