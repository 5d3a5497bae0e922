"""The mixin that brings a balancer into an existing LightningModule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_mtl.balancers.base import GramBalancer, LossBalancer
from lightning_mtl.balancers.registry import BalancerSpec, resolve
from lightning_mtl.callbacks.balance_monitor import BalanceMonitor
from lightning_mtl.checks import bad_argument, check_choice, check_task_loss, listed
from lightning_mtl.engine import (
    allow_several_backwards,
    balanced_loss,
    discover,
    reached,
    rescale_to_global,
    tensors_of,
    union_over_ranks,
    world_size,
)
from lightning_mtl.engine.balanced import LEVELS
from lightning_mtl.trainer_checks import check_balancer_is_optimized, check_trainer
from lightning_mtl.types import Balance, Step

if TYPE_CHECKING:
    import lightning.pytorch as pl

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
        last_layer: the last shared layer, for GradNorm's norms; by default the module that owns the last shared
            parameter in order of registration.

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

    def __init__(
        self,
        *args: Any,
        tasks: Sequence[str],
        balancer: BalancerSpec = "fixed",
        level: str = "parameters",
        weight_heads: bool = False,
        last_layer: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        names = tuple(tasks)
        if isinstance(tasks, str) or not names or len(set(names)) != len(names):
            raise bad_argument(self, "tasks", "be distinct task names", repr(tasks), "Name every task once")
        check_choice(level, LEVELS, "level", self)
        self.task_names = names
        self.balancer = resolve(balancer, names)
        self.level, self.weight_heads = level, weight_heads
        # Not a second registration of the layer: its parameters already have a name.
        object.__setattr__(self, "last_layer", last_layer)
        self.last_balance = None
        self._shared_of: tuple[tuple[int, ...], list[Tensor]] | None = None

    def balance(
        self,
        losses: Mapping[str, Tensor | None],
        features: Any = None,
        labelled: Mapping[str, Tensor | int] | None = None,
    ) -> Tensor:
        """One scalar to return from ``training_step``; its backward deposits the balanced gradients.

        Args:
            losses: task name -> scalar; ``None`` for a task without any label in this process's batch.
            features: the tensors that all heads read, in any nested structure. What lies behind them is shared, what
                comes after belongs to the heads. Without them, shared is what at least two losses reach.
            labelled: task name -> number of labelled samples that this process's loss is the mean of. The loss then is
                the mean over the *global* batch's labelled samples. Without it every process counts the same.

        Returns: a scalar ``[]``, valid for one backward.
        Raises: ``ValueError`` if a task is unknown or left out, a loss is no scalar or has no gradient, features carry
        no gradient, or part of the graph cannot be seen (reentrant checkpoint, whole-module compile).
        """
        self._check_names(losses)
        device = next((loss.device for loss in losses.values() if isinstance(loss, Tensor)), self.device)
        counts = torch.ones(len(self.task_names), dtype=torch.float64, device=device)
        values: list[Tensor] = []
        for index, name in enumerate(self.task_names):
            loss = losses[name]
            if loss is None:
                counts[index] = 0
                values.append(self._absent_loss(device))
                continue
            check_task_loss(loss, name, self)
            values.append(loss)
            if labelled is not None and name in labelled:
                counts[index] = labelled[name]
        partial = labelled is not None or world_size() > 1 or any(loss is None for loss in losses.values())
        present = None
        if partial:
            values, present = rescale_to_global(values, counts)
        return self._balanced(self._found_step(values, features, present))

    def own_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of the model itself, without the balancer's."""
        mine = {id(parameter) for parameter in self.balancer.parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in mine]

    def setup(self, stage: str) -> None:
        """Check the Trainer, and prepare for several backwards, before anything is wrapped or run."""
        super().setup(stage)
        if stage != "fit":
            return
        several = isinstance(self.balancer, GramBalancer)
        check_trainer(self.trainer, self, takes_rows=several and self.level == "parameters")
        if several:
            allow_several_backwards()
            # Its buffers stay on the CPU, equal on all ranks by construction: nothing for DDP to broadcast.
            ignored = set(getattr(self, "_ddp_params_and_buffers_to_ignore", ()))
            ignored |= {f"balancer.{name}" for name, _ in self.balancer.named_buffers()}
            self._ddp_params_and_buffers_to_ignore = sorted(ignored)

    def on_fit_start(self) -> None:
        """Check that the optimizer has the balancer's parameters."""
        super().on_fit_start()
        check_balancer_is_optimized(self.balancer, self.trainer.optimizers, self)

    def configure_callbacks(self) -> list[Any]:
        """Log the balance, unless the Trainer already has a monitor."""
        callbacks = list(super().configure_callbacks())
        if any(isinstance(callback, BalanceMonitor) for callback in self.trainer.callbacks):
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

    def _check_names(self, losses: Mapping[str, Any]) -> None:
        if not isinstance(losses, Mapping) or set(losses) != set(self.task_names):
            got = listed(losses) if isinstance(losses, Mapping) else type(losses).__name__
            raise bad_argument(
                self,
                "losses",
                f"hold exactly the tasks {listed(self.task_names)}",
                got,
                "Pass None for a task without labels in this batch",
            )

    def _absent_loss(self, device: torch.device) -> Tensor:
        """A loss of 0. Where DDP waits for every parameter of an ordinary objective, it reaches them all."""
        if world_size() > 1 and isinstance(self.balancer, LossBalancer):
            return torch.stack([parameter.flatten()[0].float() * 0 for parameter in self.own_parameters()]).sum()
        return torch.zeros((), device=device)

    def _found_step(self, losses: list[Tensor], features: Any, present: Tensor | None) -> Step:
        if isinstance(self.balancer, LossBalancer) or not torch.is_grad_enabled():
            return Step(losses, [], [], [], None, present=present)
        own = self.own_parameters()
        if features is not None:
            roots = self._roots(features, own, losses)
            shared = self._behind(roots, own)
            found_roots = [roots] * len(losses)
        else:
            found = discover([loss for loss in losses if loss.requires_grad], self)
            ids = {id(parameter) for parameter in found.shared}
            flags = union_over_ranks([id(parameter) in ids for parameter in own], losses[0].device)
            shared = [parameter for parameter, flag in zip(own, flags, strict=True) if flag]
            found_roots = [found.edges] * len(losses) if found.edges else None
        taken = {id(parameter) for parameter in shared}
        private = [parameter for parameter in own if id(parameter) not in taken]
        return Step(losses, shared, [], private, found_roots, present=present, last_layer=self._last_layer_of(shared))

    def _roots(self, features: Any, own: list[nn.Parameter], losses: list[Tensor]) -> list[Tensor]:
        roots = tensors_of(features)
        if not roots:
            ids = {id(leaf) for leaf in reached(losses, self)}
            idle = [name for name, p in self.named_parameters() if any(p is q for q in own) and id(p) not in ids]
            if idle:
                raise bad_argument(
                    self,
                    "features",
                    "require grad",
                    f"tensors without a gradient, while no loss reaches {listed(idle[:3])}",
                    "Pass the encoder's output as the heads read it, without detach() or no_grad()",
                )
        return roots

    def _behind(self, roots: list[Tensor], own: list[nn.Parameter]) -> list[Tensor]:
        """The shared parameters behind the features; the walk is repeated only when what trains has changed."""
        key = tuple(id(parameter) for parameter in own)
        if self._shared_of is None or self._shared_of[0] != key:
            behind = {id(leaf) for leaf in reached(roots, self)}
            self._shared_of = key, [parameter for parameter in own if id(parameter) in behind]
        return self._shared_of[1]

    def _last_layer_of(self, shared: list[Tensor]) -> list[Tensor] | None:
        if not isinstance(self.balancer, GramBalancer) or self.balancer.gram_at != "last_layer":
            return None
        layer: nn.Module | None = self.last_layer
        if layer is None:
            ids = {id(parameter) for parameter in shared}
            for module in self.modules():
                if any(id(parameter) in ids for parameter in module.parameters(recurse=False)):
                    layer = module
        return None if layer is None else [p for p in layer.parameters() if p.requires_grad]
