"""The LightningModule in which everything is declared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_mtl.balancers.base import Balancer, GramBalancer, LossBalancer
from lightning_mtl.checks import bad_argument, check_choice, listed, shape
from lightning_mtl.engine import (
    Owned,
    as_plain,
    declared,
    halves_to_global,
    leaves_per_head,
    mean_over_ranks,
    reached,
    tensors_of,
    to_global,
    world_size,
)
from lightning_mtl.metrics.total_loss import TotalLoss
from lightning_mtl.module.balanced import Balanced
from lightning_mtl.module.batches import Group, groups_of, num_samples, task_of_loader
from lightning_mtl.module.results import TaskResult, halved_loss, trains
from lightning_mtl.tasks import LabelTask, Task, TaskRegistry
from lightning_mtl.types import Step

OptimizerFn = Callable[[Iterable], Optimizer]
SchedulerFn = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]
BalancerOrName = Callable[[int], Balancer] | Balancer | str | dict[str, Any]


class MultiTaskModule(Balanced, pl.LightningModule):
    """One encoder, one head and one loss per task, one balancer. Subclass it, or use it as it is.

    Args:
        encoder: input -> features: a tensor, or any nested structure of tensors, which every head receives.
        tasks: name -> :class:`Task`; the order of the names is the order of every ``[T]`` tensor.
        balancer: see :class:`Balanced`.
        level: "parameters", or "features": one encoder backward in all.
        optimizer: parameter groups -> optimizer; by default Adam with a learning rate of 1e-3. Or override
            ``configure_optimizers`` as in any LightningModule.
        lr_scheduler: optimizer -> scheduler.
        lr_interval: "epoch" or "step", how often the scheduler steps.
        weight_heads: see :class:`Balanced`.
        last_layer: the last shared layer, a module or the name of one inside the encoder; by default the encoder's
            last module that has trainable parameters of its own.
        input_key: where the input stands in a batch that is a mapping.
        train_metrics: whether to compute the metrics on training batches too.
        strict_targets: whether a batch ``(input, {task: target})`` may hold no target that no task uses.

    Batches: ``(input, {task: target})``; ``{input_key: input, task: target, ...}``; or, with one loader per task,
    ``{task: (input, target)}``, where each task sees its own samples and ``None`` stands for an exhausted loader.

    Logs: ``{stage}/loss``, ``{stage}/loss/{task}``, ``{stage}/{task}/{metric}`` for the stages train, val, test (in
    training every ``log_every_n_steps``), and the scalars of ``BalanceMonitor``. A task's loss is the mean over its
    labels, NaN if there are none; ``{stage}/loss`` is the sum over the tasks that have any.

    Raises: ``ValueError`` or ``TypeError`` if an argument is wrong, and at the first batch if it does not fit.

    Example:
        >>> import torch
        >>> from lightning_mtl.tasks import ClassificationTask, RegressionTask
        >>> seg, depth = torch.nn.Linear(4, 3), torch.nn.Linear(4, 1)
        >>> tasks = {"seg": ClassificationTask(seg, num_classes=3), "depth": RegressionTask(depth)}
        >>> module = MultiTaskModule(torch.nn.Linear(8, 4), tasks, balancer="pcgrad")
        >>> {name: list(out.shape) for name, out in module(torch.ones(2, 8)).items()}
        {'seg': [2, 3], 'depth': [2, 1]}
    """

    def __init__(
        self,
        encoder: nn.Module,
        tasks: Mapping[str, Task],
        balancer: BalancerOrName = "fixed",
        level: str = "parameters",
        optimizer: OptimizerFn | None = None,
        lr_scheduler: SchedulerFn | None = None,
        *,
        lr_interval: str = "epoch",
        weight_heads: bool = False,
        last_layer: nn.Module | str | None = None,
        input_key: str = "input",
        train_metrics: bool = False,
        strict_targets: bool = True,
    ) -> None:
        if not isinstance(encoder, nn.Module):
            raise bad_argument(
                self, "encoder", "be an nn.Module", type(encoder).__name__, "Wrap the function in a module", TypeError
            )
        registry = tasks if isinstance(tasks, TaskRegistry) else TaskRegistry(tasks)
        if len(registry) == 0:
            raise bad_argument(self, "tasks", "hold at least one task", "none", 'Pass {"name": Task(head, loss)}')
        check_choice(lr_interval, ("epoch", "step"), "lr_interval", self)
        for arg, value in {"optimizer": optimizer, "lr_scheduler": lr_scheduler}.items():
            if value is not None and not callable(value):
                raise bad_argument(
                    self, arg, "be callable", type(value).__name__, "Pass a function that builds it", TypeError
                )
        super().__init__(
            tasks=registry.names, balancer=balancer, level=level, weight_heads=weight_heads, main_tasks=registry.main
        )
        self.encoder = encoder
        self.tasks = registry
        self.input_key, self.train_metrics, self.strict_targets = input_key, train_metrics, strict_targets
        self.total_loss = nn.ModuleDict({stage: TotalLoss(len(registry)) for stage in ("val", "test")})
        self._optimizer_fn, self._scheduler_fn, self._lr_interval = optimizer, lr_scheduler, lr_interval
        if isinstance(last_layer, str):
            last_layer = self._named_layer(last_layer)
        if last_layer is not None and not any(last_layer is layer for layer in encoder.modules()):
            raise bad_argument(
                self, "last_layer", "be a module inside the encoder", repr(last_layer), "Pass it or its name"
            )
        object.__setattr__(self, "last_layer", last_layer)
        if type(self) is MultiTaskModule:
            # A subclass has arguments of its own, and says itself which to save.
            plain = {"balancer": balancer} if isinstance(balancer, str | dict) else {}
            self.save_hyperparameters({"level": level} | plain)

    def forward(self, inputs: Any) -> dict[str, Any]:
        """The output of every head: inputs of ``B`` samples -> task name -> output."""
        features = self.encoder(inputs)
        return {name: task(features) for name, task in self.tasks.items()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The balanced loss of a batch; its value is the objective, or the plain sum of the losses."""
        cut = not isinstance(self.balancer, LossBalancer) and torch.is_grad_enabled()
        cut = cut and (self.level == "features" or not self._owned().tied)
        halved = isinstance(self.balancer, GramBalancer) and self.balancer.halves and torch.is_grad_enabled()
        results = self._run(batch, cut=cut, halved=halved)
        losses, present = self._global_losses(results, 2 if halved else 1)
        num = len(self.task_names)
        whole = [a + b for a, b in zip(losses[:num], losses[num:], strict=True)] if halved else losses
        self._log_training(results, whole, present)
        return self._balanced(self._declared_step(results, losses, present))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log losses and metrics under ``val/``."""
        self._evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log losses and metrics under ``test/``."""
        self._evaluate("test", batch, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Task name -> prediction. The batch is an input, or a batch as in training."""
        inputs = batch
        if isinstance(batch, Mapping) and self.input_key in batch:
            inputs = batch[self.input_key]
        elif isinstance(batch, tuple | list):
            inputs = batch[0]
        return {name: self.tasks[name].predict(output) for name, output in self(inputs).items()}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: the model's trainable parameters, and the balancer's without decay."""
        groups: list[dict[str, Any]] = [{"params": list(self.own_parameters())}]
        learned = [p for p in self.balancer.parameters() if p.requires_grad]
        return [*groups, {"params": learned, "weight_decay": 0.0}] if learned else groups

    def configure_optimizers(self) -> Any:
        """What ``optimizer=`` and ``lr_scheduler=`` say."""
        make = self._optimizer_fn or (lambda groups: torch.optim.Adam(groups, lr=1e-3))
        optimizer = make(self.parameter_groups())
        if self._scheduler_fn is None:
            return optimizer
        scheduler = {"scheduler": self._scheduler_fn(optimizer), "interval": self._lr_interval, "monitor": "val/loss"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def setup(self, stage: str) -> None:
        """Check that the tasks are those that the balancer was built for."""
        if self.tasks.names != self.task_names:
            raise bad_argument(
                self,
                "tasks",
                f"still be {list(self.task_names)}, for which the balancer was built",
                list(self.tasks.names),
                "Add and remove tasks before building the module",
            )
        super().setup(stage)

    def _run(
        self, batch: Any, *, cut: bool = False, halved: bool = False, dataloader: str | None = None
    ) -> dict[str, TaskResult]:
        results: dict[str, TaskResult] = {}
        for group in groups_of(batch, self.tasks, self.input_key, self.strict_targets, self, dataloader):
            results.update(self._run_group(group, cut, halved))
        return {name: results[name] for name in self.task_names if name in results}

    def _run_group(self, group: Group, cut: bool, halved: bool) -> dict[str, TaskResult]:
        features = self.encoder(group.inputs)
        roots = tensors_of(features)
        cut = cut and bool(roots)
        if torch.is_grad_enabled() and not roots and any(p.requires_grad for p in self.encoder.parameters()):
            raise bad_argument(
                self,
                "encoder",
                "return features that require grad",
                f"{shape(features)} without a gradient",
                "Remove detach() or no_grad() from it, or freeze it with requires_grad_(False)",
            )
        copies = leaves_per_head(features, len(group.names)) if cut else [features] * len(group.names)
        results: dict[str, TaskResult] = {}
        leaf_lists = {id(copy): tensors_of(copy) for copy in copies} if cut else {}
        common: dict[int, tuple[Any, Any]] = {}
        for name, copy in zip(group.names, copies, strict=True):
            task = self.tasks[name]
            if isinstance(task, LabelTask):
                # The head that several labels share runs once.
                copy, every = common.setdefault(id(task.head), (copy, None))
                if every is None:
                    every = task.head(copy)
                    common[id(task.head)] = copy, every
                output = task.column_of(every)
            else:
                output = task(copy)
            target, mask = task.pick(group.targets, group.inputs, name)
            means: tuple[Tensor, ...]
            counts: tuple[Tensor | int | None, ...]
            if halved:
                loss, means, counts = halved_loss(task, output, target, name, mask)
            else:
                loss, count = task.mean_loss(output, target, name, mask)
                means, counts = (loss,), (count,)
            # A subclass (with labels, with meta data) has no use for them in a sum of losses.
            loss, means = as_plain(loss), tuple(as_plain(mean) for mean in means)
            leaves = leaf_lists.get(id(copy))
            if torch.is_grad_enabled() and not loss.requires_grad and trains(task, copy):
                raise bad_argument(
                    task,
                    f"loss of '{name}'",
                    "have a gradient",
                    "a tensor with requires_grad=False",
                    "Remove detach(), no_grad() or rounding from the head and the loss",
                )
            results[name] = TaskResult(loss, means, counts, output, target, mask, roots, leaves)
        if cut:
            # Here by name; another step may take another way, so every backward looks again.
            self._remembered("only features", lambda: self._check_only_features(results))
        return results

    def _check_only_features(self, results: dict[str, TaskResult]) -> None:
        """The graph is cut at the features, so a loss that reaches the encoder by another way would lose gradient."""
        owned = self._owned()
        encoder = {id(p) for p in owned.shared} - {id(p) for p in owned.tied}
        read = {name: reached([result.loss], self) for name, result in results.items()}
        for name, result in results.items():
            others = [
                leaf for other in results.values() if other.leaves is not result.leaves for leaf in other.leaves or ()
            ]
            if {id(leaf) for leaf in others} & {id(leaf) for leaf in read[name]}:
                raise bad_argument(
                    self,
                    "tasks",
                    "have heads that read nothing but the features and what they own",
                    f"one of {name!r} that reads what another head has computed",
                    "Give it a part of its own, or use Balanced without features=",
                )
        beside = [leaf for leaves in read.values() for leaf in leaves if id(leaf) in encoder]
        if beside:
            names = {id(parameter): name for name, parameter in self.named_parameters()}
            raise bad_argument(
                self,
                "encoder",
                "return everything that heads and losses read of it",
                f"losses that also reach {listed(names[id(p)] for p in beside[:3])} beside the features",
                "Return these tensors as features too, or use Balanced without features=",
            )

    def _global_losses(self, results: dict[str, TaskResult], parts: int) -> tuple[list[Tensor], Tensor | None]:
        """Per task the mean over the global batch's labelled samples, and who is present; ``None``: everybody.

        In parts, first the share of each task's first part, then that of its second.
        """
        found = [results.get(name) for name in self.task_names]
        means = [(self._absent_loss(self.device),) * parts if r is None else r.means for r in found]
        counts = [(0,) * parts if r is None else tuple(1 if c is None else c for c in r.counts) for r in found]
        losses = [mean for part in zip(*means, strict=True) for mean in part]
        labels = [count for part in zip(*counts, strict=True) for count in part]
        if parts > 1:
            return halves_to_global(losses, labels)
        complete = all(r is not None and r.counts == (None,) for r in found)
        # With one loader per task another rank may lack a task that this one has.
        alike = world_size() == 1 or len({id(result.roots) for result in results.values()}) == 1
        if complete and alike:
            return losses, None
        return to_global(losses, labels)

    def _declared_step(self, results: dict[str, TaskResult], losses: list[Tensor], present: Tensor | None) -> Step:
        if not self._takes_gradients():
            return self._step(losses, present, Owned())
        owned = self._owned()
        if owned.tied and self.level == "parameters":
            # The way into the encoder past the features must count too: whole backwards from each loss.
            return self._step(losses, present, owned)
        if self.level == "features":
            # There is nothing to compare in what comes after the features.
            owned.shared_heads, owned.private = [], [*owned.shared_heads, *owned.private, *owned.tied]
        found, parts = [results.get(name) for name in self.task_names], len(losses) // len(self.task_names)
        if self.level == "parameters":
            # Refuses a reentrant checkpoint, through which no row can be taken.
            self._remembered("walked", lambda: reached([root for r in results.values() for root in r.roots], self))
        roots: list[list[Tensor]] = [[] if result is None else result.roots for result in found]
        leaves = None
        if any(result is not None and result.leaves is not None for result in found):
            leaves = parts * [[] if result is None or result.leaves is None else result.leaves for result in found]
        return self._step(losses, present, owned, roots=roots * parts, leaves=leaves)

    def _owned(self) -> Owned:
        """Who owns the trainable parameters now."""
        every = self._remembered("owned", lambda: declared(self.encoder, self.tasks.tasks, self._all_own()))
        lists = (every.shared, every.shared_heads, every.private, every.tied)
        shared, heads, private, tied = ([p for p in parameters if p.requires_grad] for parameters in lists)
        return Owned(shared, heads, private, tied)

    def _evaluate(self, stage: str, batch: Any, dataloader_idx: int) -> None:
        loaders: Any = self.trainer.val_dataloaders if stage == "val" else self.trainer.test_dataloaders
        name = task_of_loader(loaders, batch, dataloader_idx, self.tasks)
        if name is None and dataloader_idx > 0:
            raise bad_argument(
                self,
                f"{stage}_dataloaders",
                f"be one loader, or one per task ({listed(self.tasks)})",
                f"{len(loaders)} loaders" + (f" named {listed(loaders)}" if isinstance(loaders, Mapping) else ""),
                "Join them with ConcatDataset, or override validation_step and test_step",
            )
        results = self._run(batch, dataloader=name)
        total: Any = self.total_loss[stage]
        for task, result in results.items():
            size = num_samples(result.target) if result.counts[0] is None else int(result.counts[0])
            self._log_now(f"{stage}/loss/{task}", result.loss, size)
            metrics = self.tasks[task].update_metrics(stage, result.output, result.target, task, result.mask)
            for key, metric in metrics.items():
                self._log_now(f"{stage}/{task}/{key}", metric, size)
            total.update(self.task_names.index(task), result.loss, size)
        # With a loader per task Lightning takes one key from one loader only; the total is known after the last.
        if name is None or dataloader_idx == len(loaders) - 1:
            self._log_now(f"{stage}/loss", total, 1)

    def _log_now(self, key: str, value: Any, size: int) -> None:
        self.log(
            key,
            value,
            on_step=False,
            on_epoch=True,
            # Lightning divides the total over the ranks by their number, and rounds it down.
            batch_size=size * world_size(),
            sync_dist=isinstance(value, Tensor),
            add_dataloader_idx=False,
        )

    def _log_training(self, results: dict[str, TaskResult], losses: list[Tensor], present: Tensor | None) -> None:
        if self.train_metrics:
            for task, result in results.items():
                metrics = self.tasks[task].update_metrics("train", result.output, result.target, task, result.mask)
                for key, metric in metrics.items():
                    self.log(f"train/{task}/{key}", metric, on_step=False, on_epoch=True, batch_size=1)
        every = cast(Any, self.trainer).log_every_n_steps if self._trainer is not None else 0
        if every and (self.trainer.global_step + 1) % every == 0:
            values = mean_over_ranks(torch.stack([loss.detach() for loss in losses]))
            keys = [f"train/loss/{name}" for name in self.task_names]
            shown = values if present is None else values.where(present, torch.nan)
            self.log_dict(dict(zip(keys, shown, strict=True)), prog_bar=True, batch_size=1)
            self.log("train/loss", values.sum(), batch_size=1)

    def _named_layer(self, name: str) -> nn.Module:
        try:
            return self.encoder.get_submodule(name)
        except AttributeError as error:
            raise bad_argument(
                self, "last_layer", "be a module inside the encoder", repr(name), "Correct the name"
            ) from error
