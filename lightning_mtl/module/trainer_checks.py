"""Whether a Trainer can carry a balanced module: asked before the first batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_mtl.checks import bad_argument, listed
from lightning_mtl.compat import is_named


def check_trainer(trainer: Any, owner: object, *, compares_gradients: bool) -> None:
    """Refuse what would fail later or, worse, train wrongly.

    Args:
        trainer: the Trainer about to fit.
        owner: whom an error names.
        compares_gradients: whether the balancer needs task gradients, which sharded parameters do not offer.

    Raises: ``ValueError`` for DeepSpeed, for sharded parameters with ``compares_gradients``, and for DDP's static_graph
    together with gradient accumulation.
    """
    strategy = trainer.strategy
    if is_named(strategy, "DeepSpeedStrategy"):
        raise bad_argument(
            owner,
            "Trainer(strategy=...)",
            "leave gradients to autograd",
            "DeepSpeed, which partitions them in hooks of its own",
            'Use strategy="ddp"',
        )
    if compares_gradients and is_sharded(strategy):
        raise bad_argument(
            owner,
            "balancer",
            "be a loss balancer where parameters are sharded: their gradients appear in hooks of FSDP's own",
            f"one that compares gradients, under {type(strategy).__name__}",
            'Use strategy="ddp", or a loss balancer such as "uncertainty"',
        )
    static = getattr(strategy, "_ddp_kwargs", {}).get("static_graph", False)
    most = max([trainer.accumulate_grad_batches, *_scheduled(trainer)])
    if static and most != 1:
        raise bad_argument(
            owner,
            "Trainer(accumulate_grad_batches=...)",
            "be 1 with DDPStrategy(static_graph=True), with which torch cannot accumulate",
            most,
            "Leave out static_graph",
        )


def _scheduled(trainer: Any) -> list[int]:
    """The numbers of accumulated batches that a callback will set later."""
    schedulers = [c for c in trainer.callbacks if is_named(c, "GradientAccumulationScheduler")]
    return [number for scheduler in schedulers for number in scheduler.scheduling.values()]


def is_sharded(strategy: object) -> bool:
    """Whether each process holds a part of every parameter only."""
    return is_named(strategy, "FSDPStrategy", "ModelParallelStrategy")


def check_optimizers(trainer: Any, balancer: nn.Module, strangers: Sequence[Tensor], owner: object) -> None:
    """Refuse optimizers that would not train what they should.

    Args:
        trainer: the Trainer, whose optimizers are made.
        balancer: the module's balancer.
        strangers: what the optimizers have and no module.
        owner: whom an error names.

    Raises: ``ValueError`` if a trainable parameter of the balancer is in none, naming the line to add; or if there are
    several processes, which do not bring together what no module has, naming the parameter group.
    """
    groups = [
        (number, place, parameter)
        for number, optimizer in enumerate(trainer.optimizers)
        for place, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    ]
    known = {id(parameter) for _, _, parameter in groups}
    forgotten = [name for name, p in balancer.named_parameters() if p.requires_grad and id(p) not in known]
    if forgotten and groups:
        raise bad_argument(
            owner,
            "configure_optimizers",
            "put the balancer's parameters into a parameter group",
            f"none for {listed(forgotten)} of {type(balancer).__name__}",
            'Add {"params": self.balancer.parameters(), "weight_decay": 0.0} to the optimizer\'s parameter groups',
        )
    if not strangers or trainer.world_size == 1 or is_sharded(trainer.strategy):
        return
    number, place, parameter = next(each for each in groups if each[2] is strangers[0])
    raise bad_argument(
        owner,
        "configure_optimizers",
        "train parameters of the module only under several processes, which bring no others together",
        f"one of shape {list(parameter.shape)} that no module has, in parameter group {place} of optimizer {number}",
        "Hold it as nn.Parameter, or its layer in an nn.ModuleList, as an attribute of the module",
    )
