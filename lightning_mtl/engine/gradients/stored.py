"""Task gradients at the parameters: all of them, as rows in one buffer ``[T, N]``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import accumulate, groupby

import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, RowBalancer
from lightning_mtl.checks import bad_argument
from lightning_mtl.engine.collectives import RowExchange, parts_gram
from lightning_mtl.engine.differentiate import Grads, grad_of, resolution, seeds_for
from lightning_mtl.engine.gradients.base import TaskGradients
from lightning_mtl.engine.gradients.heads import HeadGrads, head_grads
from lightning_mtl.engine.gradients.last_layer import layer_of
from lightning_mtl.engine.gradients.layout import Layout
from lightning_mtl.linalg import combination
from lightning_mtl.types import Step


class Stored(TaskGradients):
    """``T`` backwards, one after the other; the row of a task travels while the next one is made.

    From the features, where the graph can be cut there; else each row by a whole backward from its loss.
    """

    def __init__(self, step: Step, balancer: GramBalancer | RowBalancer) -> None:
        super().__init__(step, balancer)
        self.inputs = [*step.shared, *step.shared_heads]
        self.layout = Layout(self.inputs)
        self.resolution = resolution(parameter.dtype for parameter in self.inputs)
        groups = _groups(step, balancer, self.layout.sizes)
        self.groups = None if groups is None else list(groups.values())
        if balancer.growing:
            columns = zip(map(id, self.inputs), self.layout.sizes, strict=True)
            _follow(balancer, dict(columns) if groups is None else dict.fromkeys(groups, 1))
        at_layer = isinstance(balancer, GramBalancer) and balancer.gram_at == "last_layer" and balancer.due
        self.layer = layer_of(step, balancer) if at_layer else None

    def take(self, scale: Tensor, *, apart: bool, keep: bool) -> list[Grads]:
        like = self.inputs[0].new_empty(0, dtype=self.layout.dtype)
        whole = isinstance(self.balancer, RowBalancer)
        self.exchange = RowExchange(len(self.step.losses), self.layout.size, like, whole=whole)
        if self.step.roots is None:
            return self._from_losses(scale, keep)
        return self._from_roots(scale, head_grads(self.step, scale, apart=apart, keep=keep), keep)

    def _from_roots(self, scale: Tensor, heads: HeadGrads, keep: bool) -> list[Grads]:
        # The same number of encoder backwards in the same order on every rank, zeros for a task without labels:
        # synchronised batch norm holds collectives.
        step = self.step
        assert step.roots is not None
        for task, roots in enumerate(step.roots):
            seeds = seeds_for(roots, heads.roots[task])
            # With one loader per task each task has an encoder graph of its own, used once.
            again = any(later is roots for later in step.roots[task + 1 :])
            self._send(task, [*grad_of(roots, step.shared, seeds, keep=keep or again), *heads.shared_heads[task]])
        return heads.private

    def _from_losses(self, scale: Tensor, keep: bool) -> list[Grads]:
        step, num, private = self.step, len(self.inputs), []
        for task, loss in enumerate(step.losses):
            again = task < len(step.losses) - 1
            grads = grad_of([loss], [*self.inputs, *step.private], [scale.to(loss)], keep=keep or again)
            self._send(task, grads[:num])
            private.append(grads[num:])
        return private

    def _send(self, task: int, grads: Grads) -> None:
        self.layout.fill(self.exchange[task], grads)
        self.exchange.send(task)

    def gram(self) -> Tensor:
        if self.layer is None:
            return self.exchange.local_gram() if self.groups is None else self.exchange.local_grams(self.groups)
        self.exchange.wait()
        layer = {id(parameter) for parameter in self.layer}
        rows = [self.exchange[task].split(self.layout.sizes) for task in range(len(self.step.losses))]
        at = [place for place, parameter in enumerate(self.inputs) if id(parameter) in layer]
        return parts_gram([[row[place] for place in at] for row in rows], disjoint=False)

    def combine(self, weights: Tensor, *, wide: bool) -> Grads:
        """Of this rank's rows; DDP averages the result, which is linear in the rows."""
        rows = self.exchange.rows[:, : self.exchange.size]
        factors = weights.view(-1, weights.shape[-1]).repeat(1, len(rows) // weights.shape[-1])
        add = combination if wide else _in_float32
        parts = rows.split(self.groups or [self.exchange.size], dim=1)
        updates = [add(factor, part) for part, factor in zip(parts, factors, strict=True)]
        update = updates[0] if len(updates) == 1 else torch.cat(updates)
        return self.spread(update)

    def whole(self, scale: float) -> Tensor:
        """The rows averaged over the ranks, without the scale: ``[T, N]``."""
        return self.exchange.mean_rows(scale)

    def spread(self, update: Tensor) -> Grads:
        """An update ``[N]`` as one gradient per entry of ``inputs``; ``None`` where no task reached it.

        A balancer that remembers gradients may move what this step did not reach.
        """
        grads: Grads = list(self.layout.gradients(update))
        for place, reached in enumerate(self.layout.reached):
            if not reached and (not self.balancer.growing or not bool(grads[place].any())):  # type: ignore[union-attr]
                grads[place] = None
        return grads


def _in_float32(weights: Tensor, rows: Tensor) -> Tensor:
    """``weights @ rows`` in one pass, in float32 where rows have fewer digits: ``[N]``."""
    numbers = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    return torch.mv(numbers.T, weights.to(numbers)).to(rows.dtype)


def _groups(step: Step, balancer: GramBalancer | RowBalancer, sizes: list[int]) -> dict[object, int] | None:
    """The groups of parameters on which a balancer works apart, each with its width; ``None`` if it does not."""
    if not isinstance(balancer, GramBalancer) or not balancer.grouped:
        return None
    if balancer.granularity == "whole":
        return {0: sum(sizes)}
    if balancer.granularity == "tensor":
        return {id(parameter): size for parameter, size in zip((*step.shared, *step.shared_heads), sizes, strict=True)}
    if step.layers is None:
        raise bad_argument(
            balancer,
            "granularity",
            'be "whole" or "tensor" where modules are not known',
            "'layer'",
            "Change it, or use Balanced or MultiTaskModule",
        )
    found: dict[object, int] = {}
    times: Counter[int] = Counter()
    for layer, members in groupby(zip(step.layers, sizes, strict=True), key=lambda pair: pair[0]):
        # A layer whose parameters do not stand side by side is several groups.
        found[layer, times[layer]] = sum(size for _, size in members)
        times[layer] += 1
    return found


def _follow(balancer: GramBalancer | RowBalancer, places: Mapping[object, int]) -> None:
    """Tell a balancer that remembers something per parameter which of them are where, if that has changed.

    Args:
        balancer: any.
        places: key of each parameter, or group of them -> how many columns, or groups, it is, in their order.
    """
    before, balancer.followed = balancer.followed, places
    # Of a copy, or after a resume, the parameters are others, in the same order.
    if before is None or before == places or not before.keys() & places.keys():
        return
    starts = dict(zip(before, accumulate(before.values(), initial=0), strict=False))
    kept = [
        torch.arange(starts[key], starts[key] + size) if before.get(key) == size else torch.full((size,), -1)
        for key, size in places.items()
    ]
    balancer.rearrange(torch.cat(kept))
