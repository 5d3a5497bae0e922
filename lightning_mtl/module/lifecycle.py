"""What a balanced module does in the course of a fit, whatever hooks its class has."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_mtl.balancers.base import LossBalancer
from lightning_mtl.callbacks.balance_monitor import BalanceMonitor
from lightning_mtl.callbacks.show_metrics import ShowMetrics
from lightning_mtl.compat import is_named
from lightning_mtl.engine import allow_several_backwards, free_graph
from lightning_mtl.module.checkpoints import load, save
from lightning_mtl.module.core import ATTRIBUTE, Core
from lightning_mtl.module.optimizer_states import adapt
from lightning_mtl.module.trainer_checks import check_optimizers, check_trainer, warn_if_left_out

#: Lightning's callbacks that average all parameters of a module.
_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


class Lifecycle(pl.Callback):
    """Brought by every balanced module: the hooks of its class belong to its user, who need not call ``super()``."""

    def __init__(self) -> None:
        self._warned, self._step = False, 0
        # The epoch in which it was last asked whether every parameter is trained, and whether one is not.
        self._epoch: int | None = None
        self._left_out = False
        # What the balancer learned, where a callback averages all parameters.
        self._averaged, self._learned = False, list[tuple[Tensor, Tensor]]()
        self._last: tuple[Tensor | None] | None = None
        # Who is present in each batch that an optimizer step accumulates.
        self._present: list[Tensor | None] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the Trainer, and prepare for several backwards, before anything is wrapped, compiled or run."""
        core = _core(pl_module)
        if core is None:
            return
        core.check_tasks()
        core.heard = id(pl_module._trainer)
        if stage == "fit":
            core.checkpoint = {}  # one may come
            several = not isinstance(core.balancer, LossBalancer)
            check_trainer(trainer, pl_module, compares_gradients=several)
            if several:
                allow_several_backwards()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The optimizers are known now, and their states not loaded yet."""
        core = _core(pl_module)
        if core is not None and core.checkpoint:
            adapt(core.checkpoint, trainer, core.balancer, pl_module)
        _forget_checkpoint(core)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first time after the module's own ``on_fit_start``, which may still add parameters to an optimizer."""
        core = _core(pl_module)
        if core is not None:
            check_optimizers(trainer, core.balancer, core.strangers(), pl_module)
            core.checked = (id(pl_module._trainer), core.balancer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same where there is no sanity check."""
        self.on_sanity_check_start(trainer, pl_module)
        core = _core(pl_module)
        if core is not None:
            core.forget()
            self._start(trainer.global_step)
            self._epoch, self._left_out, self._learned = None, False, []
            self._averaged = any(is_named(each, *_AVERAGING) for each in cast(Any, trainer).callbacks)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The first of an epoch: whoever thaws something has done so, and added it to an optimizer."""
        if _only_forward(trainer):
            self._put_back()
        if trainer.current_epoch == self._epoch or self._left_out:
            return
        self._epoch, core = trainer.current_epoch, _core(pl_module)
        if core is not None and _makes_optimizers(pl_module):
            self._left_out = warn_if_left_out(trainer, pl_module, core.balancer)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """The whole loss is known now, and with it whether the graph may be freed on the way."""
        # By hand, other backwards over the same graph may follow.
        if pl_module.automatic_optimization:
            free_graph(loss)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what is learned, and see whether a method that compares gradients ever meets two of them."""
        core = _core(pl_module)
        if core is not None and self._averaged and not _only_forward(trainer):
            self._learned = [(each, each.detach().clone()) for each in core.balancer.parameters()]
        if core is None or self._warned:
            return
        if core.last_present is not None and core.last_present is not self._last:
            self._last = core.last_present
            self._present += core.last_present
        if trainer.global_step > self._step:
            self._warned = self._warned or _warn_if_alone(self._present, core)
            self._start(trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell the balancer."""
        core = _core(pl_module)
        if core is not None:
            core.balancer.end_epoch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A callback that averages weights has put the average into the module."""
        self._put_back()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hold nothing on to what may change now."""
        self._put_back()
        self._learned = []
        core = _core(pl_module)
        if core is not None:
            core.forget()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """A finder of Lightning's loads a checkpoint, and leaves before the fit starts."""
        core = _core(pl_module)
        _forget_checkpoint(core)
        if core is not None:
            core.heard = core.checked = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """So does a fit that breaks off."""
        _forget_checkpoint(_core(pl_module))

    def _put_back(self) -> None:
        """What a balancer learned is its state, and no part of the model that is averaged."""
        with torch.no_grad():
            for parameter, value in self._learned:
                parameter.copy_(value)

    def _start(self, step: int) -> None:
        self._step, self._present = step, []


def _core(pl_module: pl.LightningModule) -> Core | None:
    """A Trainer that fitted a balanced module may go on with another kind."""
    return vars(pl_module).get(ATTRIBUTE)


def _makes_optimizers(pl_module: pl.LightningModule) -> bool:
    """Whether the optimizers are this package's, and not of a class or a command line of the user's."""
    made = type(pl_module).configure_optimizers
    return made.__module__.startswith("lightning_mtl.") and "configure_optimizers" not in vars(pl_module)


def _only_forward(trainer: pl.Trainer) -> bool:
    """Whether this is the epoch in which SWA computes batch norm anew."""
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))


def _forget_checkpoint(core: Core | None) -> None:
    if core is not None:
        core.checkpoint = None


def _warn_if_alone(present: Sequence[Tensor | None], core: Core) -> bool:
    if len(present) < 2 or any(each is None or int(each.sum()) != 1 for each in present):
        return False
    if len({int(each.int().argmax()) for each in present if each is not None}) < 2:
        return False
    warnings.warn(
        f"{type(core.owner).__name__}: the {len(present)} batches of an optimizer step have labels of one task each. "
        f"{type(core.balancer).__name__} then sees one gradient at a time and has nothing to compare: the step is a "
        "plain sum. Put several tasks into each batch, with accumulate_grad_batches=1: a dict of one loader per task, "
        'or CombinedLoader(loaders, "max_size"), draws a batch of every task for each step.',
        stacklevel=2,
    )
    return True


def _bring_callbacks(module: Any, given: Any) -> list[Any]:
    """The callbacks of the class, and ours unless there are such already."""
    callbacks = list(given) if isinstance(given, Sequence) else [] if given is None else [given]
    there = [*callbacks, *([] if module._trainer is None else module._trainer.callbacks)]
    wanted: list[type[pl.Callback]] = [Lifecycle, BalanceMonitor]
    if any(hasattr(part, "observe_metrics") for part in module.balancer.modules()):
        wanted.insert(1, ShowMetrics)
    return [*callbacks, *(kind() for kind in wanted if not any(isinstance(each, kind) for each in there))]


#: Ours are called after those of the class, with the module and what these returned. Each may be called again when a
#: class calls ``super()``, and then changes nothing.
HOOKS: dict[str, Callable[..., Any]] = {
    "configure_callbacks": _bring_callbacks,
    "on_save_checkpoint": save,
    "on_load_checkpoint": load,
}
_OURS = "_with_ours"


def add_ours(cls: type) -> None:
    """Let the hooks that a class has, or inherits, end with ours, so that no override can lose them."""
    for name, ours in HOOKS.items():
        theirs = getattr(cls, name, None)
        if theirs is not None and not hasattr(theirs, _OURS):
            setattr(cls, name, _followed(theirs, ours))


def with_ours(module: Any, name: str, value: Any) -> Any:
    """As :func:`add_ours`, for a hook that is set on one module."""
    return partial(_call_both, value, HOOKS[name], module) if callable(value) else value


def _followed(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(theirs)
    def both(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(self, theirs(self, *args, **kwargs), *args, **kwargs)

    cast(Any, both)._with_ours = True
    return both


def _call_both(theirs: Callable[..., Any], ours: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
    return ours(module, theirs(*args, **kwargs), *args, **kwargs)
