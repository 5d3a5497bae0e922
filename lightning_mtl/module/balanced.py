"""The mixin that brings a balancer into an existing LightningModule."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_mtl.balancers.base import Balancer
from lightning_mtl.balancers.registry import BalancerSpec, resolve
from lightning_mtl.checks import bad_argument, check_choice, listed
from lightning_mtl.engine import LEVELS, Labelled, Owned, TaskLoss, collect, found
from lightning_mtl.module.checkpoints import fit_balancer_state
from lightning_mtl.module.core import ATTRIBUTE, Core, core_of
from lightning_mtl.module.hyper_parameters import Unseen, keep_ours, without_modules, written
from lightning_mtl.module.lifecycle import HOOKS, add_ours, with_ours
from lightning_mtl.module.names import (
    PUBLIC,
    ShownSignature,
    arguments_of,
    check_class,
    check_module,
    constructor,
    has,
    is_lightning_module,
    may_be_written,
    names_in_order,
    replacement,
)

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_mtl.types import Balance

    _Base = pl.LightningModule
else:
    _Base = object


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
        last_layer: the last shared layer, for GradNorm's norms; by default the last that every task reaches.
        main_tasks: the names of the tasks that count, where the others only help them; by default all. Balancers that
            put one task first (``pcd``, ``metabalance``) take the first of these unless they are told which.
        base_arguments: arguments of the next class that have a name of these: ``{"tasks": 3}``.

    Attributes:
        balancer: the balancer, a submodule: its state is in the checkpoint. It may be replaced by another ``Balancer``.
        last_balance: what the balancer did in the last backward, or ``None``.
        task_names: the names, unless another class has an attribute of this name.

    The other names of the module are its class's, as are all of Lightning's hooks: these need not call ``super()``.

    Raises: ``ValueError`` if names, balancer or level are wrong; before the first batch also if the Trainer cannot
    carry it (DeepSpeed, static_graph with accumulation), if the balancer's parameters are in no parameter group, or if
    several processes would train a parameter that no module has. ``TypeError`` where another class or an assignment
    takes the name ``balance``, ``balancer``, ``last_balance`` or ``own_parameters``.

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

    __signature__ = ShownSignature(lambda cls: _shown(cls))
    __jit_ignored_attributes__ = ("balancer",)  # exported modules predict, and train no more
    if TYPE_CHECKING:  # torch.jit.script would read these
        balancer: Balancer
        last_balance: Balance | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(Balanced)]
        if any(is_lightning_module(base) for base in before):
            raise bad_argument(
                cls.__name__,
                "bases",
                "name Balanced before the LightningModule",
                listed(base.__name__ for base in cls.__bases__),
                f"Write class {cls.__name__}(Balanced, LightningModule)",
                TypeError,
            )
        add_ours(cls)
        if not may_be_written(cls):
            _show_arguments(cls)

    def __init__(
        self,
        *args: Any,
        tasks: Sequence[str],
        balancer: BalancerSpec = "fixed",
        level: str = "parameters",
        weight_heads: bool = False,
        last_layer: nn.Module | None = None,
        main_tasks: Sequence[str] = (),
        base_arguments: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_class(type(self), Balanced)
        _show_arguments(type(self))
        # save_hyperparameters() of the next class looks at the arguments of every constructor on the way, and finds its
        # class by this name. It shall find what it would find without Balanced.
        __class__ = Unseen  # noqa: F841
        super(Balanced, self).__init__(*args, **kwargs, **(base_arguments or {}))  # noqa: UP008
        names, main = names_in_order(tasks, "tasks", self), names_in_order(main_tasks, "main_tasks", self, some=False)
        check_choice(level, LEVELS, "level", self)
        if last_layer is not None and not isinstance(last_layer, nn.Module):
            raise bad_argument(self, "last_layer", "be a module", repr(last_layer), "Pass the layer itself", TypeError)
        made = resolve(balancer, names, main)
        made.check_level(level)
        check_module(self)
        given = {
            "tasks": list(names),
            "balancer": written(balancer, made),
            "level": level,
            "weight_heads": weight_heads,
            "main_tasks": list(main),
        }
        visible, theirs = _is_ours(type(self).__init__), arguments_of(type(self), Balanced)
        core = Core(self, names, main, level, weight_heads, last_layer, given, visible, theirs)
        self.__dict__.update({ATTRIBUTE: core, "last_balance": None})
        nn.Module.__setattr__(self, "balancer", made)
        if not has(self, "task_names"):  # a name that many classes have, and nothing here reads
            self.task_names = names
        keep_ours(self, base_arguments or {})

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
        core = core_of(self)
        core.look()
        core.check_names(losses, labelled)
        device = next((loss.device for loss in losses.values() if isinstance(loss, Tensor)), self.device)
        values, present = collect(losses, core.names, labelled, core.absent_loss(device), self, halves=core.halves)
        owned = Owned()
        if core.takes_gradients():
            core.model.own = self.own_parameters()
            owned = found(values, len(core.names), core.model, features, shared)
        loss = core.loss(core.step(values, present, owned))
        return loss if plain is None else loss + plain

    def own_parameters(self) -> list[Tensor]:
        """The trainable parameters of the model itself, without the balancer's; in a fit all that an optimizer has."""
        return [parameter for parameter in core_of(self).own() if parameter.requires_grad]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in PUBLIC:
            value = replacement(self, name, value)
        elif name in HOOKS:
            value = with_ours(self, name, value)
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if ATTRIBUTE in vars(self):  # a class may load something before this one is made
            fit_balancer_state(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _set_hparams(self, values: Any) -> None:
        super()._set_hparams(without_modules(values))


def _is_ours(init: Any) -> bool:
    """Whether a class has no constructor before that of ``Balanced``."""
    return getattr(init, "__code__", None) is Balanced.__init__.__code__


def _show_arguments(cls: type[Balanced]) -> None:
    """Let a class without a constructor have one that shows the arguments of all classes behind it."""
    if _is_ours(cls.__init__) and "__init__" not in vars(cls):
        cls.__init__ = constructor(cls, Balanced)  # type: ignore[method-assign]


def _shown(cls: type[Balanced]) -> inspect.Signature | None:
    if cls is Balanced or not _is_ours(cls.__init__):
        return None
    return inspect.signature(partial(constructor(cls, Balanced), None))
