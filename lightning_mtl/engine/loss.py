"""A step and a balancer in, one scalar out whose ordinary backward is balanced."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mtl.balancers.base import Balancer, GramBalancer, LossBalancer, RowBalancer
from lightning_mtl.checks import bad_argument, check_choice
from lightning_mtl.engine.balanced_backward import BalancedBackward, Report, global_losses, private_weights
from lightning_mtl.engine.collectives import mean_over_ranks, world_size
from lightning_mtl.engine.compiled import check_not_siblings, check_several_backwards
from lightning_mtl.engine.differentiate import Grads, grad_of, stacked
from lightning_mtl.engine.node import deposit
from lightning_mtl.types import Balance, Step

LEVELS = ("parameters", "features")


@torch.compiler.disable
def balanced_loss(
    step: Step,
    balancer: Balancer,
    names: Sequence[str],
    *,
    level: str = "parameters",
    weight_heads: bool = False,
    report: Report | None = None,
) -> Tensor:
    """One scalar to return from ``training_step`` (or to call ``.backward()`` on).

    Args:
        step: losses, features, and who is shared.
        balancer: a loss balancer makes an ordinary objective; any other one autograd node.
        names: the ``T`` task names.
        level: at which tensors the rows are taken, "parameters" or "features".
        weight_heads: whether the weights of a gram balancer apply to private parameters too.
        report: called once per backward with what was done.

    Returns: a scalar; its value is the objective of a loss balancer, else the plain sum of the losses.
    Raises: ``ValueError`` if the level is unknown or does not fit the step.
    """
    check_choice(level, LEVELS, "level", "lightning_mtl")
    balancer.check_level(level)
    # Where this rank has no loss another may have one, and waits.
    waited_for = world_size() > 1 and not isinstance(balancer, LossBalancer) and torch.is_grad_enabled()
    if not waited_for and not any(loss.requires_grad for loss in step.losses):
        return stacked(step.losses).sum()
    _check_halves(step, balancer, len(names))
    if isinstance(balancer, LossBalancer):
        return _objective(step, balancer, tuple(names), report)
    assert isinstance(balancer, GramBalancer | RowBalancer)
    check_not_siblings(step, balancer)
    check_several_backwards([*step.losses, *(root for roots in step.roots or () for root in roots)], balancer)
    if not step.shared and not step.shared_heads:
        return _with_own(_plain_sum(step, balancer, len(names)), step, balancer, len(names))
    if level == "features":
        _check_features(step)
    loss = BalancedBackward(step, balancer, tuple(names), level, weight_heads, report).loss()
    return _with_own(loss, step, balancer, len(names))


def _with_own(loss: Tensor, step: Step, balancer: Balancer, num_tasks: int) -> Tensor:
    """The loss, whose backward also reaches the parameters that the balancer itself learns."""
    if not isinstance(balancer, GramBalancer) or type(balancer).own_objective is GramBalancer.own_objective:
        return loss
    if any(parameter.requires_grad for parameter in balancer.parameters()):
        own = balancer.own_objective(global_losses(step, num_tasks), step.present)
        # Its value is not part of the losses, its gradient is.
        return loss if own is None else loss + (own - own.detach()).to(loss)
    return loss


def _check_halves(step: Step, balancer: Balancer, num_tasks: int) -> None:
    wanted = 2 if isinstance(balancer, GramBalancer) and balancer.halves else 1
    if len(step.losses) != wanted * num_tasks:
        raise bad_argument(
            balancer,
            "losses",
            f"hold {wanted} per task" + (", of two independent samples" if wanted == 2 else ""),
            f"{len(step.losses)} for {num_tasks} tasks",
            'Pass {"task": (loss of one half, loss of the other)} to a balancer that compares halves, or use '
            "MultiTaskModule, which halves the batch; to any other one loss per task",
        )


def _plain_sum(step: Step, balancer: GramBalancer | RowBalancer, num_tasks: int) -> Tensor:
    """Nothing is shared: heads only, with what the balancer puts on them.

    Under a process group every parameter still gets a gradient, for which DDP waits.
    """
    losses = stacked(step.losses)
    total, own = losses.sum(), private_weights(step, balancer, num_tasks)
    if own is not None:
        factors = own.to(losses).repeat(len(losses) // num_tasks)
        total = torch.dot(factors, losses) + (total - torch.dot(factors, losses)).detach()
    if world_size() == 1 or not step.private:
        return total
    ones = [1.0] * len(losses) if own is None else factors.tolist()

    def solve(scale: Tensor, keep: bool) -> Grads:
        seeds = [(scale * one).to(loss) for loss, one in zip(step.losses, ones, strict=True)]
        return grad_of(step.losses, step.private, seeds, keep=keep)

    return deposit(total.detach(), step.private, solve, step.tables)


def _objective(step: Step, balancer: LossBalancer, names: tuple[str, ...], report: Report | None) -> Tensor:
    losses = stacked(step.losses)
    if not balancer.linear_in_losses and world_size() > 1:
        # Weights are taken at the global losses, the gradients stay this rank's own.
        losses = losses + (mean_over_ranks(losses.detach()) - losses).detach()
    objective = balancer(losses, step.present)
    if losses.requires_grad:
        # The hook holds nothing of the graph: a cycle through a node is never collected.
        values, present = losses.detach(), step.present
        scale: list[Tensor] = []
        objective.register_hook(scale.append)

        def weights_arrived(grad: Tensor) -> None:
            balancer.advance(values, present)
            if report is not None:
                report(Balance(names, values, grad / scale.pop(), present=present))

        losses.register_hook(weights_arrived)
    return objective


def _check_features(step: Step) -> None:
    roots = step.roots
    if roots is None:
        raise bad_argument(
            "lightning_mtl",
            "level",
            'be "parameters" where no cut at the features gives the whole gradient',
            "'features'",
            "Pass features=, the tensors that all heads read, none computed from another, and leave out shared=",
        )
    if any(task is not roots[0] for task in roots):
        raise bad_argument(
            "lightning_mtl",
            "level",
            'be "parameters" where each task has its own samples',
            "'features' with one loader per task",
            "Feature gradients of different samples cannot be compared; use level='parameters'",
        )
