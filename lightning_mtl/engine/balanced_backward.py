"""The backward of a balanced step: gradients of the losses in, balanced gradients out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, RowBalancer
from lightning_mtl.checks import bad_argument, warn_once
from lightning_mtl.engine.collectives import mean_over_ranks, sum_gram
from lightning_mtl.engine.differentiate import Grads, add_up, hooks_aside, stacked
from lightning_mtl.engine.gradients import choose
from lightning_mtl.engine.gradients.stored import Stored
from lightning_mtl.engine.node import deposit
from lightning_mtl.engine.recompute import forwards_leave_no_trace, one_backward_only
from lightning_mtl.linalg import cancels
from lightning_mtl.linalg import gram as gram_of
from lightning_mtl.types import Balance, Step

Report = Callable[[Balance], None]


def global_losses(step: Step, num_tasks: int) -> Tensor:
    """One loss per task, averaged over the ranks, detached: ``[T]``."""
    return mean_over_ranks(stacked(step.losses).detach().view(-1, num_tasks).sum(0))


def private_weights(step: Step, balancer: GramBalancer | RowBalancer, num_tasks: int) -> Tensor | None:
    """What the balancer puts on the heads' own gradients, ``[T]``; the same on every rank."""
    if type(balancer).private_weights in (GramBalancer.private_weights, RowBalancer.private_weights):
        return None
    return balancer.private_weights(global_losses(step, num_tasks), step.present)


class BalancedBackward:
    """The backward of one step. Lives until that backward, then lets the graph go."""

    def __init__(
        self,
        step: Step,
        balancer: GramBalancer | RowBalancer,
        names: tuple[str, ...],
        level: str,
        weight_heads: bool,
        report: Report | None,
    ) -> None:
        if isinstance(balancer, RowBalancer) and weight_heads:
            raise bad_argument(
                balancer,
                "weight_heads",
                "be False for a balancer of rows, whose update need not be a weighted sum of them",
                True,
                "Leave it out; heads keep their own gradient",
            )
        self.step, self.balancer, self.names, self.report = step, balancer, names, report
        self.weight_heads = weight_heads
        self.losses = stacked(step.losses).detach()
        self.gradients = choose(step, balancer, level)
        #: Who is present, but without a gradient.
        self.silent = torch.zeros(len(names), dtype=torch.bool)
        own = private_weights(step, balancer, len(names))
        self.own_weights = None if own is None else self.gradients.per_loss(own)

    def loss(self) -> Tensor:
        """The scalar whose backward this is; its value is the plain sum of the losses."""
        return deposit(self.losses.sum(), [*self.gradients.inputs, *self.step.private], self._solve, self.step.tables)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Gradients that are only on their way: no hook of a parameter sees them, and no module counts a forward."""
        step = self.step
        with hooks_aside([*step.shared, *step.shared_heads, *step.private]), forwards_leave_no_trace():
            try:
                yield
            except RuntimeError as error:
                if not one_backward_only(error):
                    raise
                raise bad_argument(
                    self.balancer,
                    "level",
                    'be "features" where activations are checkpointed selectively, which allows one backward',
                    "'parameters'",
                    'Pass level="features" and features=, or leave context_fn= of checkpoint() out',
                ) from error

    def _solve(self, scale: Tensor, keep: bool) -> Grads:
        apart = self.weight_heads or self.own_weights is not None
        own = self.own_weights
        with self._inside():
            private = self.gradients.take(scale, apart=apart, keep=keep)
        if isinstance(self.balancer, RowBalancer):
            assert isinstance(self.gradients, Stored)
            update = self.gradients.spread(self._update(self.balancer, self.gradients, scale))
        else:
            weights, gram = self._weigh(self.balancer, scale)
            with self._inside():
                update = self.gradients.combine(weights, wide=gram is not None and cancels(weights, gram))
            if self.weight_heads:
                # A task that counts as absent trains its own head: only so can its gradient come back.
                own = self.gradients.per_loss(weights.masked_fill(self.silent, 1))
        return [*update, *add_up(private, own)]

    def _update(self, balancer: RowBalancer, gradients: Stored, scale: Tensor) -> Tensor:
        """The same on every rank, so that DDP's average leaves it as it is: ``[N]``."""
        factor = float(scale)
        if factor == 0:
            gradients.exchange.wait()
            return torch.zeros_like(gradients.exchange[0])
        rows = gradients.whole(factor)
        gram = gram_of(rows).cpu()
        present = self._with_a_gradient(gram)
        losses = global_losses(self.step, len(self.names)).double()
        update = balancer.combine(rows, losses, present)
        if self.report is not None:
            self.report(Balance(self.names, losses.cpu(), balancer.last_weights.clone(), gram, present))
        return update * factor

    def _weigh(self, balancer: GramBalancer, scale: Tensor) -> tuple[Tensor, Tensor | None]:
        """Ask the balancer and report: weights ``[T]``, or ``[K, T]`` in groups, and the gram that they are for."""
        present, total = self.step.present, None
        losses = self.losses.double()
        if len(losses) != len(self.names):
            losses = losses.view(-1, len(self.names)).sum(0)
        if balancer.due:
            total, summed = self._gram(balancer, losses, scale)
            if total is not None and self.gradients.layer is not None and self._looks_again(total):
                total, summed = self._gram(balancer, losses, scale)
            losses = summed
            present = self._with_a_gradient(total)
            exact = self.gradients.resolution
            weights = balancer.last_weights if total is None else balancer(total, losses, present, exact)
        else:
            weights = balancer.reuse(present)
        if self.report is not None:
            shown = weights.mean(0) if weights.ndim == 2 else weights
            self.report(Balance(self.names, losses, shown, self._shown_gram(total), present))
        return weights, total

    def _gram(self, balancer: GramBalancer, losses: Tensor, scale: Tensor) -> tuple[Tensor | None, Tensor]:
        with self._inside():
            gram = self.gradients.gram()
        return sum_gram(gram[None] if balancer.grouped and gram.ndim == 2 else gram, losses, scale)

    def _looks_again(self, gram: Tensor) -> bool:
        """Where a task has no gradient at the layer that is looked at, see whether the step left it out.

        The same on every rank, as the gram is.
        """
        missing = gram.numpy().diagonal(0, -2, -1).reshape(-1, len(self.names)).sum(0) == 0
        present = self.step.present
        if self.step.find_layer is None or not any(missing if present is None else missing & present.cpu().numpy()):
            return False
        layer = self.step.find_layer(self.step)
        if {id(p) for p in layer} == {id(p) for p in self.gradients.layer or ()}:
            return False
        with self._inside():
            self.gradients.look_at(layer)
        return True

    def _with_a_gradient(self, gram: Tensor | None) -> Tensor | None:
        """Who is present, without the tasks whose gradient is exactly zero: they have nothing to say in this step.

        Such a task (a loss times 0, a term annealed from 0) would stop all others under a method such as MGDA.
        """
        present = self.step.present
        if gram is None:
            return present
        squares = gram.numpy().diagonal(0, -2, -1)  # a handful of numbers, which torch takes longer to look at
        if squares.all():
            return present
        zero = torch.from_numpy(squares.reshape(-1, len(self.names)).sum(0) == 0)
        if not bool(zero.any()) or not bool(gram.isfinite().all()):
            return present
        here = torch.ones_like(zero) if present is None else present.cpu()
        self.silent = zero & here
        for task in self.silent.nonzero().flatten().tolist():
            warn_once(
                self.balancer,
                f"The gradient of task {self.names[task]!r} is exactly zero at what the tasks share. In such steps the "
                "task counts as absent.",
            )
        return here & ~zero

    def _shown_gram(self, gram: Tensor | None) -> Tensor | None:
        """The gram of the tasks' whole rows, ``[T, T]``."""
        num = len(self.names)
        if gram is None or gram.shape == (num, num):
            return gram
        return gram.view(-1, gram.shape[-1] // num, num, gram.shape[-1] // num, num).sum((0, 1, 3))
