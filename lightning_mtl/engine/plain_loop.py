"""The engine for Fabric and plain loops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_mtl.balancers.base import Balancer, LossBalancer
from lightning_mtl.checks import bad_argument, listed, shape
from lightning_mtl.engine.collectives import world_size
from lightning_mtl.engine.graph import reached, read_sparsely
from lightning_mtl.engine.loss import balanced_loss
from lightning_mtl.engine.model import Model
from lightning_mtl.engine.node import free_graph
from lightning_mtl.engine.present import Labelled, TaskLoss, collect, zero_that_reaches
from lightning_mtl.engine.step import Owned, found, make_step
from lightning_mtl.types import Balance

_WHO = "lightning_mtl.backward"

#: What the losses of each balancer were found to share: it stays so where a task is absent.
_met: WeakKeyDictionary[Balancer, list[Tensor]] = WeakKeyDictionary()


def _check_of_one_kind(owned: Owned) -> None:
    """No module says whether a leaf that is no parameter is an input, as of energy and forces, or is trained."""
    rows = [*owned.shared, *owned.shared_heads]
    others = [tensor for tensor in rows if not isinstance(tensor, nn.Parameter)]
    if 0 < len(others) < len(rows):
        raise bad_argument(
            _WHO,
            "shared",
            "be an iterable where tensors that are no nn.Parameter are shared too",
            f"a tensor of shape {shape(others[0])} that requires grad beside parameters",
            "Pass those that are trained, such as shared=encoder.parameters(); the others get the plain gradient",
        )


def backward(
    losses: Mapping[str, TaskLoss],
    balancer: Balancer,
    features: Any = None,
    shared: Iterable[Tensor] | str | None = None,
    level: str = "parameters",
    *,
    labelled: Labelled | None = None,
    weight_heads: bool = False,
    last_layer: Iterable[Tensor] | None = None,
    plain: Tensor | None = None,
    backward_fn: Callable[[Tensor], Any] | None = None,
) -> Balance:
    """Add balanced gradients to ``.grad``, as ``sum(losses).backward()`` would add plain ones.

    Args:
        losses: task name -> scalar, always in the same order; ``T`` entries. ``None`` for a task without any label in
            this batch; with several processes then pass ``labelled`` on all of them, and ``features`` or ``shared``,
            and a loss in place of ``None``, if only the mean of nothing: DDP waits for what it reaches.
            For a balancer that compares two independent samples a pair of scalars, one of each.
        balancer: built once, before the loop; its parameters, if any, belong into the optimizer.
        features: the tensors that all heads read, in any nested structure; what lies behind them is shared.
        shared: the shared parameters, or "all"; without it and ``features`` those that at least two losses reach. The
            others get the gradient of the plain sum.
        level: "parameters" (exact) or "features" (rows are gradients at the features, which must be given).
        labelled: task name -> what this process's loss is the mean over: the number of labelled samples, a bool mask of
            them, or a float tensor of sample weights, whose sum is the denominator; the loss then is the mean over the
            samples of all processes.
        weight_heads: whether the weights apply to private parameters too.
        last_layer: parameters of the last shared layer, for a balancer that takes its gram there.
        plain: a term beside the tasks, such as a regulariser; its gradient is added as it is.
        backward_fn: called with the balanced loss in place of ``loss.backward()``: ``fabric.backward``, or
            ``lambda loss: scaler.scale(loss).backward()``. The graph is freed on the way: what else shall go backward
            through it is a ``plain`` term.

    Returns: what the balancer did.
    Raises: ``ValueError`` if a loss is not a scalar with a gradient, the balancer is for another number of tasks,
    features carry no gradient, the graph hides its parameters (reentrant checkpoint), or it was compiled before
    ``allow_several_backwards()``.

    Example:
        >>> import torch, lightning_mtl
        >>> from lightning_mtl.balancers import PCGrad
        >>> encoder, heads = torch.nn.Linear(2, 3), {"a": torch.nn.Linear(3, 1), "b": torch.nn.Linear(3, 1)}
        >>> balancer, features = PCGrad(2), encoder(torch.ones(4, 2))
        >>> losses = {name: head(features).square().mean() for name, head in heads.items()}
        >>> balance = lightning_mtl.backward(losses, balancer, features=features)
        >>> balance.weights.shape, encoder.weight.grad.shape
        (torch.Size([2]), torch.Size([3, 2]))
    """
    names = list(losses)
    if not isinstance(balancer, Balancer):
        raise bad_argument(
            _WHO,
            "balancer",
            "be a Balancer",
            repr(balancer),
            "Build it once with lightning_mtl.balancers.load(name, num_tasks=T), so that its state lives on",
            TypeError,
        )
    if len(names) != balancer.num_tasks or (balancer.names is not None and tuple(names) != balancer.names):
        expected = listed(balancer.names) if balancer.names else f"{balancer.num_tasks} tasks"
        raise bad_argument(_WHO, "losses", f"hold {expected} in this order", listed(names), "Pass one loss per task")
    if balancer.names is None:
        balancer.bind(names)
    device = next((loss.device for loss in losses.values() if isinstance(loss, Tensor)), torch.device("cpu"))
    halves, absent = getattr(balancer, "halves", False), torch.zeros((), device=device)
    done: list[Balance] = []
    owned, model, waiting = Owned(), Model(_WHO), []
    if world_size() > 1:
        # DDP waits for what a loss reaches, also if it is the mean of nothing.
        parts = [part for loss in losses.values() for part in (loss if isinstance(loss, tuple | list) else (loss,))]
        ends = [part for part in parts if isinstance(part, Tensor)]
        waiting, model.found_tables = reached(ends, _WHO), read_sparsely(ends, _WHO)
    if isinstance(balancer, LossBalancer) and waiting:
        absent = zero_that_reaches(waiting, model.tables(), device)
    values, present = collect(losses, names, labelled, absent, _WHO, balancer, halves=halves)
    if not isinstance(balancer, LossBalancer):
        model.met = _met.get(balancer, [])
        owned = found(values, len(names), model, features, shared)
        _met[balancer] = model.met
        if level == "parameters" and (shared is None or shared == "all"):
            _check_of_one_kind(owned)
        known = {id(leaf) for leaf in (*owned.shared, *owned.shared_heads, *owned.between, *owned.private)}
        owned.private = [*owned.private, *(leaf for leaf in waiting if id(leaf) not in known)]
    layer = None if last_layer is None else list(last_layer)
    step = make_step(values, present, owned, balancer, model, level=level, layer=layer)
    loss = balanced_loss(step, balancer, names, level=level, weight_heads=weight_heads, report=done.append)
    if plain is None:
        free_graph(loss)
    (backward_fn or torch.Tensor.backward)(loss if plain is None else loss + plain)
    if done:
        return done[0]
    # Nothing is shared (a frozen encoder): every task went backward with weight 1.
    sums = torch.stack([loss.detach() for loss in values]).view(-1, len(names)).sum(0)
    return Balance(tuple(names), sums, torch.ones(len(names)), None, present)
