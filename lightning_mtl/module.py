"""The LightningModule in which everything is declared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_mtl.balanced import Balanced
from lightning_mtl.balancers.base import Balancer, GramBalancer
from lightning_mtl.batches import Group, groups_of
from lightning_mtl.checks import bad_argument, check_choice, shape
from lightning_mtl.engine import leaves_per_head, rescale_to_global, tensors_of
from lightning_mtl.engine.gather import mean_over_ranks
from lightning_mtl.tasks import Task, TaskRegistry
from lightning_mtl.types import Step

OptimizerFn = Callable[[Iterable], Optimizer]
SchedulerFn = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]
BalancerOrName = Callable[[int], Balancer] | Balancer | str | dict[str, Any]


@dataclass
class _TaskResult:
    """One task in one batch."""

    loss: Tensor
    count: Tensor | None
    output: Any
    target: Any
    mask: Tensor | None
    roots: list[Tensor]
    leaves: list[Tensor] | None


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
    training every ``log_every_n_steps``), and the scalars of ``BalanceMonitor``.

    Raises: ``ValueError`` or ``TypeError`` if an argument is wrong, and at the first batch if it does not fit.

    Example:
        >>> import torch
        >>> from lightning_mtl.tasks import ClassificationTask, RegressionTask
        >>> tasks = {"seg": ClassificationTask(torch.nn.Linear(4, 3), 3), "depth": RegressionTask(torch.nn.Linear(4, 1))}
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
                self,
                "encoder",
                "be an nn.Module",
                type(encoder).__name__,
                "Wrap the function in a module",
                TypeError,
            )
        registry = tasks if isinstance(tasks, TaskRegistry) else TaskRegistry(tasks)
        if len(registry) == 0:
            raise bad_argument(self, "tasks", "hold at least one task", "none", 'Pass {"name": Task(head, loss)}')
        check_choice(lr_interval, ("epoch", "step"), "lr_interval", self)
        for arg, value in {"optimizer": optimizer, "lr_scheduler": lr_scheduler}.items():
            if value is not None and not callable(value):
                raise bad_argument(
                    self,
                    arg,
                    "be callable",
                    type(value).__name__,
                    "Pass a function that builds it",
                    TypeError,
                )
        super().__init__(tasks=registry.names, balancer=balancer, level=level, weight_heads=weight_heads)
        self.encoder = encoder
        self.tasks = registry
        self.input_key, self.train_metrics, self.strict_targets = input_key, train_metrics, strict_targets
        self._optimizer_fn, self._scheduler_fn, self._lr_interval = optimizer, lr_scheduler, lr_interval
        if isinstance(last_layer, str):
            last_layer = self._named_layer(last_layer)
        object.__setattr__(self, "last_layer", last_layer)
        plain = balancer if isinstance(balancer, str | dict) else None
        self.save_hyperparameters({"level": level} | ({"balancer": plain} if plain else {}))

    def forward(self, inputs: Any) -> dict[str, Any]:
        """The output of every head: inputs of ``B`` samples -> task name -> output."""
        features = self.encoder(inputs)
        return {name: task(features) for name, task in self.tasks.items()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The balanced loss of a batch; its value is the objective, or the plain sum of the losses."""
        results = self._run(batch, cut=isinstance(self.balancer, GramBalancer) and torch.is_grad_enabled())
        losses, present = self._global_losses(results)
        self._log_training(results, losses)
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
        scheduler = {
            "scheduler": self._scheduler_fn(optimizer),
            "interval": self._lr_interval,
            "monitor": "val/loss",
        }
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

    def _run(self, batch: Any, *, cut: bool = False, dataloader: str | None = None) -> dict[str, _TaskResult]:
        results: dict[str, _TaskResult] = {}
        for group in groups_of(batch, self.tasks, self.input_key, self.strict_targets, self, dataloader):
            results.update(self._run_group(group, cut))
        return {name: results[name] for name in self.task_names if name in results}

    def _run_group(self, group: Group, cut: bool) -> dict[str, _TaskResult]:
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
        results = {}
        for name, copy in zip(group.names, copies, strict=True):
            task = self.tasks[name]
            output = task(copy)
            target, mask = task.pick(group.targets, group.inputs, name)
            loss, count = task.mean_loss(output, target, name, mask)
            leaves = tensors_of(copy) if cut else None
            results[name] = _TaskResult(loss, count, output, target, mask, roots, leaves)
        return results

    def _global_losses(self, results: dict[str, _TaskResult]) -> tuple[list[Tensor], Tensor | None]:
        """Per task the mean over the global batch's labelled samples, and who is present; ``None``: everybody."""
        losses, counts, partial = [], [], False
        for name in self.task_names:
            result = results.get(name)
            if result is None:
                losses.append(self._absent_loss(self.device))
                counts.append(torch.zeros((), dtype=torch.float64, device=self.device))
                partial = True
                continue
            losses.append(result.loss)
            counts.append(result.count if result.count is not None else result.loss.new_ones((), dtype=torch.float64))
            partial = partial or result.count is not None
        if not partial:
            return losses, None
        return rescale_to_global(losses, torch.stack(counts))

    def _declared_step(self, results: dict[str, _TaskResult], losses: list[Tensor], present: Tensor | None) -> Step:
        if not isinstance(self.balancer, GramBalancer) or not torch.is_grad_enabled():
            return Step(losses, [], [], [], None, present=present)
        shared: list[Tensor] = [p for p in self.encoder.parameters() if p.requires_grad]
        seen, several = {id(p) for p in shared}, {}
        for task in self.tasks.children_in_order():
            for parameter in task.parameters():
                if parameter.requires_grad and id(parameter) in seen:
                    several[id(parameter)] = parameter
                seen.add(id(parameter))
        several = {key: p for key, p in several.items() if not any(p is q for q in shared)}
        taken = {id(p) for p in shared} | several.keys()
        private: list[Tensor] = [p for p in self.own_parameters() if id(p) not in taken]
        empty: list[Tensor] = []
        found = [results.get(name) for name in self.task_names]
        roots = [empty if result is None else result.roots for result in found]
        leaves = None
        if any(result is not None and result.leaves is not None for result in found):
            leaves = [[] if result is None or result.leaves is None else result.leaves for result in found]
        last_layer = self._last_layer_of(shared)
        return Step(losses, shared, list(several.values()), private, roots, leaves, present, last_layer)

    def _evaluate(self, stage: str, batch: Any, dataloader_idx: int) -> None:
        loaders = self.trainer.val_dataloaders if stage == "val" else self.trainer.test_dataloaders
        name = list(loaders)[dataloader_idx] if isinstance(loaders, Mapping) and len(loaders) > 1 else None
        results = self._run(batch, dataloader=name)
        total: Tensor | None = None
        for task, result in results.items():
            size = len(result.target) if result.count is None else int(result.count)
            self._log_now(f"{stage}/loss/{task}", result.loss, size)
            metrics = self.tasks[task].update_metrics(stage, result.output, result.target, task, result.mask)
            for key, metric in metrics.items():
                self._log_now(f"{stage}/{task}/{key}", metric, size)
            total = result.loss if total is None else total + result.loss
        if total is not None and len(results) == len(self.task_names):
            self._log_now(f"{stage}/loss", total, len(next(iter(results.values())).target))

    def _log_now(self, key: str, value: Any, size: int) -> None:
        self.log(
            key,
            value,
            on_step=False,
            on_epoch=True,
            batch_size=size,
            sync_dist=isinstance(value, Tensor),
            add_dataloader_idx=False,
        )

    def _log_training(self, results: dict[str, _TaskResult], losses: list[Tensor]) -> None:
        if self.train_metrics:
            for task, result in results.items():
                metrics = self.tasks[task].update_metrics("train", result.output, result.target, task, result.mask)
                for key, metric in metrics.items():
                    self.log(f"train/{task}/{key}", metric, on_step=False, on_epoch=True, batch_size=1)
        every = self.trainer.log_every_n_steps if self._trainer is not None else 0
        if every and (self.trainer.global_step + 1) % every == 0:
            values = mean_over_ranks(torch.stack([loss.detach() for loss in losses]))
            keys = [f"train/loss/{name}" for name in self.task_names]
            self.log_dict(dict(zip(keys, values, strict=True)), prog_bar=True, batch_size=1)
            self.log("train/loss", values.sum(), batch_size=1)

    def _named_layer(self, name: str) -> nn.Module:
        try:
            return self.encoder.get_submodule(name)
        except AttributeError as error:
            raise bad_argument(
                self, "last_layer", "be a module inside the encoder", repr(name), "Correct the name"
            ) from error
