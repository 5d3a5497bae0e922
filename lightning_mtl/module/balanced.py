"""The mixin that brings a balancer into an existing LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_mtl.balancers.base import LossBalancer
from lightning_mtl.balancers.registry import BalancerSpec, resolve
from lightning_mtl.callbacks.balance_monitor import BalanceMonitor
from lightning_mtl.callbacks.show_metrics import ShowMetrics
from lightning_mtl.checks import bad_argument, carried, check_choice, listed
from lightning_mtl.engine import (
    LEVELS,
    Labelled,
    Model,
    Owned,
    TaskLoss,
    allow_several_backwards,
    balanced_loss,
    collect,
    found,
    make_step,
    world_size,
)
from lightning_mtl.module.trainer_checks import check_balancer_is_optimized, check_trainer
from lightning_mtl.types import Balance, Step

if TYPE_CHECKING:
    import lightning.pytorch as pl

    _Base = pl.LightningModule
else:
    _Base = object

_Made = TypeVar("_Made")
_CHECKPOINT_KEY = "lightning_mtl_tasks"


class Balanced(_Base):
    """Put it before ``LightningModule``, name the tasks, and return ``self.balance(losses)`` instead of their sum.

    Args:
        args, kwargs: go on to the next class.
        tasks: the task names, in the order of every ``[T]`` tensor.
        balancer: a short name ("pcgrad"), a class name, ``{"class_path": ..., "init_args": {...}}``, a
            ``Balancer``, or a callable that makes one from the number of tasks.
        level: at which tensors the rows are taken: "parameters" (exact), or "features" (one encoder backward in
            all; ``balance`` then needs ``features=``).
        weight_heads: whether the weights of a gram balancer apply to the heads too. Loss balancers always weight them.
        last_layer: the last shared layer, for GradNorm's norms; by default the module that owns the last shared
            parameter in order of registration.
        main_tasks: the names of the tasks that count, where the others only help them; by default all. Balancers that
            put one task first (``pcd``, ``metabalance``) take the first of these unless they are told which.

    Attributes:
        balancer: the balancer, a submodule: its state is in the checkpoint.
        last_balance: what the balancer did in the last backward, or ``None``.

    Raises: ``ValueError`` if names, balancer or level are wrong; before the first batch also if the Trainer cannot
    carry it (DeepSpeed, static_graph with accumulation) or the balancer's parameters are in no parameter group.

    Example:
        >>> import lightning as L, torch
        >>> class Scene(Balanced, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__(tasks=["seg", "depth"], balancer="pcgrad")
        ...         self.encoder = torch.nn.Linear(8, 4)
        ...         self.seg, self.depth = torch.nn.Linear(4, 3), torch.nn.Linear(4, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         x, y_seg, y_depth = batch
        ...         z = self.encoder(x).relu()
        ...         seg = torch.nn.functional.cross_entropy(self.seg(z), y_seg)
        ...         depth = (self.depth(z).squeeze(1) - y_depth).abs().mean()
        ...         return self.balance({"seg": seg, "depth": depth}, features=z)
        >>> Scene().balancer
        PCGrad()
    """

    last_balance: Balance | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = [base.__name__ for base in cls.__mro__]
        if "LightningModule" in order and order.index("LightningModule") < order.index("Balanced"):
            raise bad_argument(
                cls.__name__,
                "bases",
                "name Balanced before the LightningModule",
                listed(base.__name__ for base in cls.__bases__),
                f"Write class {cls.__name__}(Balanced, LightningModule)",
                TypeError,
            )

    def __init__(
        self,
        *args: Any,
        tasks: Sequence[str],
        balancer: BalancerSpec = "fixed",
        level: str = "parameters",
        weight_heads: bool = False,
        last_layer: nn.Module | None = None,
        main_tasks: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if hasattr(type(self), "balancer"):
            raise bad_argument(
                self,
                "balancer",
                "be an argument of super().__init__(), because it is built for the tasks",
                "a class attribute",
                'Remove it and write super().__init__(tasks=[...], balancer="...")',
                TypeError,
            )
        names = tuple(tasks) if isinstance(tasks, Iterable) and not isinstance(tasks, str) else ()
        if not names or not all(carried(name) for name in names) or len(set(names)) != len(names):
            raise bad_argument(
                self,
                "tasks",
                "be distinct, non-empty names without dot, slash or space",
                repr(tasks),
                "Name every task once",
            )
        check_choice(level, LEVELS, "level", self)
        if last_layer is not None and not isinstance(last_layer, nn.Module):
            raise bad_argument(self, "last_layer", "be a module", repr(last_layer), "Pass the layer itself", TypeError)
        self.task_names = names
        self.balancer = resolve(balancer, names, tuple(main_tasks))
        self.balancer.check_level(level)
        self.level, self.weight_heads = level, weight_heads
        # Not a second registration of the layer: its parameters already have a name.
        object.__setattr__(self, "last_layer", last_layer)
        self.last_balance = None
        self._memory: dict[str, Any] = {}
        self._model = Model(self)

    @torch.compiler.disable
    def balance(
        self,
        losses: Mapping[str, TaskLoss],
        features: Any = None,
        labelled: Labelled | None = None,
        *,
        shared: Iterable[Tensor] | str | None = None,
        plain: Tensor | None = None,
    ) -> Tensor:
        """One scalar to return from ``training_step``; its backward deposits the balanced gradients.

        Args:
            losses: task name -> scalar; ``None`` for a task without any label in this process's batch. For a balancer
                that compares two independent samples (MoDo, SDMGrad) a pair of scalars, one of each.
            features: the tensors that all heads read, in any nested structure. What lies behind them is shared, what
                comes after belongs to the heads. Without them, shared is what at least two losses reach.
            labelled: task name -> what this process's loss is the mean over: the number of labelled samples, a bool
                mask of them, or a float tensor of sample weights (not a scalar), whose sum is the denominator. The loss
                then is the mean over the *global* batch. Without it every process counts the same.
            shared: the shared parameters, or "all", where neither features nor the graph should decide. The others get
                the gradient of the plain sum.
            plain: a term beside the tasks, such as a regulariser; its gradient is added as it is, as in
                ``balance(...) + term``.

        Returns: a scalar ``[]``, valid for one backward.
        Raises: ``ValueError`` if a task is unknown or left out, a loss is no scalar or has no gradient, features carry
        no gradient, or part of the graph cannot be seen (reentrant checkpoint, whole-module compile).
        """
        self._check_names(losses, labelled)
        device = next((loss.device for loss in losses.values() if isinstance(loss, Tensor)), self.device)
        values, present = collect(losses, self.task_names, labelled, self._absent_loss(device), self)
        owned = Owned()
        if self._takes_gradients():
            self._model.own = self.own_parameters()
            owned = found(values, len(self.task_names), self._model, features, shared)
        loss = self._balanced(self._step(values, present, owned))
        return loss if plain is None else loss + plain

    def own_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of the model itself, without the balancer's."""
        return [parameter for parameter in self._remembered("own", self._all_own) if parameter.requires_grad]

    def _all_own(self) -> list[nn.Parameter]:
        mine = {id(parameter) for parameter in self.balancer.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in mine]

    def _remembered(self, name: str, make: Callable[[], _Made]) -> _Made:
        """What walking all modules would find again in every step, kept until the next epoch of a fit."""
        if self._trainer is None:
            return make()
        if name not in self._memory:
            self._memory[name] = make()
        made: _Made = self._memory[name]
        return made

    def setup(self, stage: str) -> None:
        """Check the Trainer, and prepare for several backwards, before anything is wrapped or run."""
        super().setup(stage)
        if stage != "fit":
            return
        several = not isinstance(self.balancer, LossBalancer)
        check_trainer(self.trainer, self, compares_gradients=several)
        if several:
            allow_several_backwards()
        # Its buffers may stay on the CPU, and are equal on all ranks by construction: nothing for DDP to broadcast.
        ignored = set(getattr(self, "_ddp_params_and_buffers_to_ignore", ()))
        ignored |= {f"balancer.{name}" for name, _ in self.balancer.named_buffers()}
        self._ddp_params_and_buffers_to_ignore = sorted(ignored)

    def on_fit_start(self) -> None:
        """Check that the optimizer has the balancer's parameters."""
        super().on_fit_start()
        self._memory.clear()
        check_balancer_is_optimized(self.balancer, self.trainer.optimizers, self)

    def on_train_epoch_start(self) -> None:
        """Look again at what belongs to whom: parameters may have come or gone."""
        super().on_train_epoch_start()
        self._memory.clear()

    def on_train_epoch_end(self) -> None:
        """Tell the balancer."""
        super().on_train_epoch_end()
        self.balancer.end_epoch()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write down the order of the tasks, in which the balancer's state stands."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_CHECKPOINT_KEY] = list(self.task_names)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other tasks, or of the same in another order."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get(_CHECKPOINT_KEY, list(self.task_names))
        if saved != list(self.task_names):
            raise bad_argument(
                self,
                "tasks",
                f"be those of the checkpoint, {saved}, in this order, because the balancer's state is per task",
                list(self.task_names),
                "Declare the tasks in the saved order",
            )

    def configure_callbacks(self) -> list[Any]:
        """Log the balance, unless the Trainer already has a monitor, and show metrics to a balancer that asks."""
        given = super().configure_callbacks()
        callbacks = list(given) if isinstance(given, Sequence) else [given]
        if any(hasattr(part, "observe_metrics") for part in self.balancer.modules()):
            callbacks.append(ShowMetrics())
        if any(isinstance(callback, BalanceMonitor) for callback in cast(Any, self.trainer).callbacks):
            return callbacks
        return [*callbacks, BalanceMonitor()]

    def _balanced(self, step: Step) -> Tensor:
        return balanced_loss(
            step,
            self.balancer,
            self.task_names,
            level=self.level,
            weight_heads=self.weight_heads,
            report=self._remember,
        )

    def _remember(self, balance: Balance) -> None:
        self.last_balance = balance

    def _check_names(self, losses: Mapping[str, Any], labelled: Mapping[str, Any] | None) -> None:
        if not isinstance(losses, Mapping) or set(losses) != set(self.task_names):
            got = listed(losses) if isinstance(losses, Mapping) else type(losses).__name__
            raise bad_argument(
                self,
                "losses",
                f"hold exactly the tasks {listed(self.task_names)}",
                got,
                "Pass None for a task without labels in this batch",
            )
        # With several processes the others may have labels, and would wait.
        if world_size() == 1 and all(loss is None for loss in losses.values()):
            raise bad_argument(
                self,
                "losses",
                "hold a loss of at least one task",
                "None for each",
                "Return None from training_step to skip a batch without any label",
            )
        if labelled is not None and not set(labelled) <= set(self.task_names):
            raise bad_argument(
                self, "labelled", f"hold tasks among {listed(self.task_names)}", listed(labelled), "Correct the name"
            )

    def _absent_loss(self, device: torch.device) -> Tensor:
        """A loss of 0. Where DDP waits for every parameter of an ordinary objective, it reaches them all."""
        if world_size() > 1 and isinstance(self.balancer, LossBalancer):
            return torch.stack([parameter.flatten()[0].float() * 0 for parameter in self.own_parameters()]).sum()
        return torch.zeros((), device=device)

    def _takes_gradients(self) -> bool:
        return not isinstance(self.balancer, LossBalancer) and torch.is_grad_enabled()

    def _step(self, losses: Sequence[Tensor], present: Tensor | None, owned: Owned, **cut: Any) -> Step:
        layer = cast("nn.Module | None", self.last_layer)
        self._model.modules = self._remembered("modules", lambda: list(self.modules()))
        return make_step(losses, present, owned, self.balancer, self._model, self.level, layer=layer, **cut)
