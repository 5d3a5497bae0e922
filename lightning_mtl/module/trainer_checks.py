"""Whether a Trainer can carry a balanced module: asked before the first batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_mtl.balancers.base import LossBalancer
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
            'Add {"params": self.balancer.parameters(), "weight_decay": 0.0} to the optimizer\'s parameter groups, or '
            "build it with lr=, where it has this argument",
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


def check_fit(core: Any) -> None:
    """At a balanced step: what ``Lifecycle`` checks before the first, if it does not run or the balancer is new.

    Raises: as :func:`check_trainer` and :func:`check_optimizers`.
    """
    trainer, balancer = core.owner._trainer, core.balancer
    if trainer is None:
        return
    here = id(trainer)
    if core.checked is not None and core.checked[0] == here and core.checked[1] is balancer:
        return
    try:
        state = trainer.state
        if state.fn != "fit" or state.status != "running" or not trainer.training:
            return
    except ReferenceError:  # the module outlived its Trainer
        return
    heard = core.heard == here
    if not heard:
        check_trainer(trainer, core.owner, compares_gradients=not isinstance(balancer, LossBalancer))
    check_optimizers(trainer, balancer, (), core.owner)
    core.checked = (here, balancer)
    if not heard:
        _warn_unheard(trainer, core.owner, balancer)


def _warn_unheard(trainer: Any, owner: object, balancer: object) -> None:
    who, outer = type(owner).__name__, trainer.lightning_module
    if outer is owner:
        why = "the callback that it brings does not run in this fit"
        cure = (
            "Pass lightning_mtl.module.lifecycle.Lifecycle() to Trainer(callbacks=...), or override "
            "configure_callbacks in the class instead of replacing it afterwards."
        )
    else:
        why, name = f"the Trainer fits {type(outer).__name__}, of which it is a part", type(outer).__name__
        cure = (
            f"Fit {who} itself, or balance where the Trainer looks: write class {name}(Balanced, LightningModule), and "
            "return self.balance(losses) from its training_step."
        )
    rank_zero_warn(
        f"{who}: {why}, so {type(balancer).__name__} does not hear when an epoch ends, nothing is logged of it, and "
        f"checkpoints say nothing of it. {cure}"
    )


def warn_if_left_out(trainer: Any, module: nn.Module, balancer: nn.Module) -> bool:
    """Say so where a parameter can be trained and no optimizer has it; the balancer's are looked at elsewhere."""
    known = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    known |= {id(p) for p in balancer.parameters()}
    left_out = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in known]
    if not left_out or is_sharded(trainer.strategy):  # which trains others in their place
        return False
    more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    rank_zero_warn(
        f"{type(module).__name__}: {listed(left_out[:3])}{more} can be trained, but no optimizer has it, so it stays "
        "as it is: it was frozen, or not there, when the optimizer was made. Unfreeze it before the fit, or in a "
        "callback that adds a parameter group (BaseFinetuning.unfreeze_and_add_param_group), or write a "
        "configure_optimizers that has it."
    )
    return True
