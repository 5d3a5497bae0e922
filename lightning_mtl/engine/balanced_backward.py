"""The backward of a balanced step: gradients of the losses in, balanced gradients out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, RowBalancer
from lightning_mtl.checks import bad_argument
from lightning_mtl.engine.deposit import deposit
from lightning_mtl.engine.gather import RowExchange, mean_over_ranks, parts_gram, sum_gram
from lightning_mtl.engine.rows import (
    Grads,
    HeadGrads,
    add_up,
    grad_of,
    head_grads,
    rows_from_losses,
    rows_from_roots,
    unflatten,
    zeros_for,
)
from lightning_mtl.linalg import gram as gram_of
from lightning_mtl.types import Balance, Step

Report = Callable[[Balance], None]


def stacked(losses: Sequence[Tensor]) -> Tensor:
    """The losses as ``[T]``, in float32 or better: sums and weights are not taken in half precision."""
    return torch.stack([loss if loss.dtype == torch.float64 else loss.float() for loss in losses])


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
        self.step, self.balancer, self.names, self.report = step, balancer, names, report
        self.weight_heads = weight_heads
        self.losses = stacked(step.losses).detach()
        if isinstance(balancer, RowBalancer):
            self.due, self.at_last_layer, self.needs_rows = True, False, True
            _check_no_weights(balancer, weight_heads)
        else:
            self.due = balancer.due
            self.at_last_layer = level == "parameters" and balancer.gram_at == "last_layer"
            one_group = balancer.granularity == "whole"
            self.needs_rows = level == "parameters" and not self.at_last_layer and (self.due or not one_group)
        self.sizes = _sizes(step, balancer)
        if self.at_last_layer and self.due and not step.last_layer:
            raise bad_argument(
                balancer,
                "last_layer",
                "be known, because the norms are taken there",
                "no last shared layer",
                'Pass last_layer= (a module inside the encoder), norms_at="shared" or level="features"',
            )
        own = private_weights(step, balancer, len(names))
        self.own_weights: list[float] | None = None if own is None else self._per_loss(own)
        self.apart = weight_heads or own is not None

    def loss(self) -> Tensor:
        """The scalar whose backward this is; its value is the plain sum of the losses."""
        step = self.step
        value = self.losses.sum()
        if self.needs_rows or not self._roots_are_tensors():
            return deposit(value, [*step.shared, *step.shared_heads, *step.private], self._parameters)
        return deposit(value, [*self._distinct_roots(), *step.shared_heads, *step.private], self._features)

    def _parameters(self, scale: Tensor) -> Grads:
        """Gradients of shared, shared_heads and private, made here entirely."""
        step, whole = self.step, isinstance(self.balancer, RowBalancer)
        if step.roots is None:
            exchange, apart = rows_from_losses(step, scale, whole=whole)
            update, weights = self._update(exchange, scale)
            return [*update, *self._private(apart, weights)]
        heads = head_grads(step, scale, apart=self.apart)
        if self.needs_rows:
            exchange = rows_from_roots(step, heads, whole=whole)
            update, weights = self._update(exchange, scale)
            return [*update, *self._private(heads.private, weights)]
        weights = self._per_loss(self._weigh(self._gram_of_heads(heads), scale))
        seeds = self._weighted_roots(heads, weights)
        shared = grad_of(self._distinct_roots(), step.shared, seeds, keep=False)
        return [*shared, *add_up(heads.shared_heads, weights), *self._private(heads.private, weights)]

    def _features(self, scale: Tensor) -> Grads:
        """Gradients of the features, through which autograd goes on, and of shared_heads and private."""
        heads = head_grads(self.step, scale, apart=self.apart)
        weights = self._per_loss(self._weigh(self._gram_of_heads(heads), scale))
        back = self._weighted_roots(heads, weights)
        return [*back, *add_up(heads.shared_heads, weights), *self._private(heads.private, weights)]

    def _update(self, exchange: RowExchange, scale: Tensor) -> tuple[list[Tensor], list[float]]:
        """From rows: the update of shared and shared_heads, and the weight of each loss."""
        if isinstance(self.balancer, RowBalancer):
            return unflatten(self._row_update(self.balancer, exchange, scale), self._like()), []
        weights = self._weigh(self._gram_of_rows(exchange), scale)
        return self._combine(exchange, weights), self._per_loss(weights)

    def _row_update(self, balancer: RowBalancer, exchange: RowExchange, scale: Tensor) -> Tensor:
        """The same on every rank, so that DDP's average leaves it as it is."""
        factor = float(scale)
        if factor == 0:
            exchange.wait()
            return torch.zeros_like(exchange[0])
        rows = exchange.mean_rows(factor)
        losses = global_losses(self.step, len(self.names)).double()
        update = balancer.combine(rows, losses, self.step.present)
        if self.report is not None:
            gram, losses = gram_of(rows).cpu(), losses.cpu()
            self.report(Balance(self.names, losses, balancer.last_weights.clone(), gram, self.step.present))
        return update * factor

    def _weigh(self, gram: Tensor | None, scale: Tensor) -> Tensor:
        """Ask the balancer and report: weights ``[T]``, or ``[K, T]`` in groups."""
        assert isinstance(self.balancer, GramBalancer)
        losses = self.losses.double()
        if len(losses) != len(self.names):
            losses = losses.view(-1, len(self.names)).sum(0)
        present = self.step.present
        total: Tensor | None = None
        if gram is None:
            weights = self.balancer.reuse(present)
        else:
            if self.balancer.grouped and gram.ndim == 2:
                gram = gram[None]
            total, losses = sum_gram(gram, losses, scale)
            weights = self.balancer.last_weights if total is None else self.balancer(total, losses, present)
        if self.report is not None:
            shown = weights.mean(0) if weights.ndim == 2 else weights
            self.report(Balance(self.names, losses, shown, self._shown_gram(total), present))
        return weights

    def _shown_gram(self, gram: Tensor | None) -> Tensor | None:
        """The gram of the tasks' whole rows, ``[T, T]``."""
        num = len(self.names)
        if gram is None or gram.shape == (num, num):
            return gram
        return gram.view(-1, gram.shape[-1] // num, num, gram.shape[-1] // num, num).sum((0, 1, 3))

    def _per_loss(self, weights: Tensor) -> list[float]:
        """A number per loss, which a kernel takes without a transfer."""
        flat: list[float] = (weights.mean(0) if weights.ndim == 2 else weights).tolist()
        return flat * (len(self.step.losses) // len(self.names))

    def _gram_of_heads(self, heads: HeadGrads) -> Tensor | None:
        """From feature gradients: the gram there, at the last layer, or none if this step reuses its weights."""
        step = self.step
        if not self.due:
            return None
        assert step.roots is not None
        parts = [
            [zeros_for(root) if grad is None else grad for root, grad in zip(roots, grads, strict=True)]
            for roots, grads in zip(step.roots, heads.roots, strict=True)
        ]
        if not self.at_last_layer:
            return parts_gram(parts, disjoint=True)
        layer = step.last_layer or []
        rows = []
        for roots, seeds in zip(step.roots, parts, strict=True):
            grads = grad_of(roots, layer, seeds, keep=True)
            rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(grads, layer, strict=True)])
        return parts_gram(rows, disjoint=False)

    def _gram_of_rows(self, exchange: RowExchange) -> Tensor | None:
        if not self.due:
            return None
        if not self.at_last_layer:
            return exchange.local_gram() if self.sizes is None else exchange.local_grams(self.sizes)
        exchange.wait()
        layer = {id(parameter) for parameter in self.step.last_layer or []}
        shared = self._like()
        rows = [
            [view for view, like in zip(unflatten(exchange[task], shared), shared, strict=True) if id(like) in layer]
            for task in range(len(self.names))
        ]
        return parts_gram(rows, disjoint=False)

    def _combine(self, exchange: RowExchange, weights: Tensor) -> list[Tensor]:
        """``weights @ rows`` of this rank, per group; DDP averages the result, which is linear in the rows."""
        rows = exchange.rows[:, : exchange.size]
        wide = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        factors = weights.view(-1, len(self.names)).repeat(1, len(rows) // len(self.names)).to(wide)
        parts = wide.split(self.sizes or [exchange.size], dim=1)
        updates = [torch.mv(part.T, factor) for part, factor in zip(parts, factors, strict=True)]
        update = updates[0] if len(updates) == 1 else torch.cat(updates)
        return unflatten(update.to(rows.dtype), self._like())

    def _like(self) -> list[Tensor]:
        return [*self.step.shared, *self.step.shared_heads]

    def _private(self, per_task: list[Grads], weights: list[float]) -> Grads:
        return add_up(per_task, weights if self.weight_heads else self.own_weights)

    def _weighted_roots(self, heads: HeadGrads, weights: list[float]) -> Grads:
        """What flows back into each distinct root."""
        assert self.step.roots is not None
        if self._common_roots():
            return add_up(heads.roots, weights)
        return [
            None if grad is None else grad * weights[task] for task, grads in enumerate(heads.roots) for grad in grads
        ]

    def _distinct_roots(self) -> list[Tensor]:
        assert self.step.roots is not None
        roots = self.step.roots[:1] if self._common_roots() else self.step.roots
        return [root for task in roots for root in task]  # type: ignore[misc]  # edges only where grad_of takes them

    def _common_roots(self) -> bool:
        assert self.step.roots is not None
        return all(task is self.step.roots[0] for task in self.step.roots)

    def _roots_are_tensors(self) -> bool:
        return self.step.roots is not None and all(isinstance(r, Tensor) for task in self.step.roots for r in task)


def _sizes(step: Step, balancer: GramBalancer | RowBalancer) -> list[int] | None:
    """The widths of the groups of parameters on which a balancer works apart; ``None`` if it does not."""
    if not isinstance(balancer, GramBalancer) or not balancer.grouped:
        return None
    sizes = [tensor.numel() for tensor in (*step.shared, *step.shared_heads)]
    if balancer.granularity == "whole":
        return [sum(sizes)]
    if balancer.granularity == "tensor":
        return sizes
    if step.layers is None:
        raise bad_argument(
            balancer,
            "granularity",
            'be "whole" or "tensor" where modules are not known',
            "'layer'",
            "Change it, or use Balanced or MultiTaskModule",
        )
    pairs = groupby(zip(step.layers, sizes, strict=True), key=lambda pair: pair[0])
    return [sum(size for _, size in members) for _, members in pairs]


def _check_no_weights(balancer: RowBalancer, weight_heads: bool) -> None:
    if weight_heads:
        raise bad_argument(
            balancer,
            "weight_heads",
            "be False for a balancer of rows, whose update need not be a weighted sum of them",
            True,
            "Leave it out; heads keep their own gradient",
        )
