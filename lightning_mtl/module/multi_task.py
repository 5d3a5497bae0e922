"""The LightningModule in which everything is declared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_mtl.balancers.registry import BalancerSpec
from lightning_mtl.checks import bad_argument, check_choice
from lightning_mtl.engine import Owned, declared
from lightning_mtl.module.balanced import Balanced
from lightning_mtl.module.batches import BatchForm, task_of_loader
from lightning_mtl.module.core import core_of
from lightning_mtl.module.cut import (
    check_features_can_be_cut,
    check_only_features,
    inputs_behind,
    inputs_in_reach,
    needs_the_features,
    uncut_at_features,
)
from lightning_mtl.module.evaluation import EvaluationLog, log_training
from lightning_mtl.module.optimizers import OptimizerFn, SchedulerFn, give_own_rate, groups_of, keep_ratio
from lightning_mtl.module.results import Encoded, TaskResult, encode, run_heads
from lightning_mtl.module.shares import shares
from lightning_mtl.tasks import Task, TaskRegistry
from lightning_mtl.types import Step


class MultiTaskModule(Balanced, pl.LightningModule):
    """One encoder, one head and one loss per task, one balancer. Subclass it, or use it as it is.

    Args:
        encoder: input -> features: a tensor, or any nested structure of tensors (tuples, dicts, dataclasses, a
            ``ModelOutput``, graph data), which every head receives.
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
        input_key: where the input stands in a batch that is a mapping; several keys name arguments of the encoder, of
            which the first is always there and the others may be missing.
        train_metrics: whether to compute the metrics on training batches too.
        strict_targets: whether a batch ``(input, {task: target})`` may hold no target that no task uses.

    Batches: ``(input, {task: target})``; ``{input_key: input, task: target, ...}``; or, with one loader per task,
    ``{task: (input, target)}``, where each task sees its own samples and ``None`` stands for an exhausted loader. What
    has none of these forms is itself the input, which prediction takes, and training if no task needs a target; the
    one element of a list or tuple is taken out of it.

    Logs: ``{stage}/loss``, ``{stage}/loss/{task}``, ``{stage}/{task}/{metric}`` for the stages train, val, test (in
    training every ``log_every_n_steps``), and the scalars of ``BalanceMonitor``. A task's loss is the mean over its
    labels, NaN if there are none; ``{stage}/loss`` is the sum over the tasks that have any. With several evaluation
    loaders that are not one per task, each has keys of its own, which end in ``/dataloader_idx_0`` and so on.

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
        balancer: BalancerSpec = "fixed",
        level: str = "parameters",
        optimizer: OptimizerFn | None = None,
        lr_scheduler: SchedulerFn | None = None,
        *,
        lr_interval: str = "epoch",
        weight_heads: bool = False,
        last_layer: nn.Module | str | None = None,
        input_key: str | Sequence[str] = "input",
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
            tasks=registry.names,
            balancer=balancer,
            level=level,
            weight_heads=weight_heads,
            last_layer=_layer_of(encoder, last_layer, self),
            main_tasks=registry.main,
        )
        self.encoder = encoder
        self.tasks = core_of(self).registry = registry
        # Mangled: the other names of the module belong to whoever subclasses it.
        self.__form = BatchForm(input_key, strict_targets, type(self).__name__)
        self.__train_metrics, self.__uncut = train_metrics, False
        self.__logs = {stage: EvaluationLog(stage, len(registry)) for stage in ("val", "test")}
        self.__optimizer_fn, self.__scheduler_fn, self.__lr_interval = optimizer, lr_scheduler, lr_interval
        if type(self) is MultiTaskModule:
            # A subclass has arguments of its own, and says itself which to save.
            self.save_hyperparameters({"level": level, "balancer": core_of(self).arguments["balancer"]})

    def forward(self, inputs: Any) -> dict[str, Any]:
        """The output of every head: inputs of ``B`` samples -> task name -> output."""
        features = self.__form.encode(self.encoder, inputs)
        return {name: task(features) for name, task in self.tasks.items()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The balanced loss of a batch; its value is the objective, or the plain sum of the losses."""
        core_of(self).look()
        apart = core_of(self).takes_gradients()
        halved = apart and core_of(self).halves
        results = self.__run(batch, apart=apart, halved=halved)
        losses, present = shares(results, core_of(self).names, 1 + halved, core_of(self).absent_loss(self.device), self)
        num = len(core_of(self).names)
        whole = [a + b for a, b in zip(losses[:num], losses[num:], strict=True)] if halved else losses
        log_training(self, self.tasks, results, whole, present, metrics=self.__train_metrics)
        return core_of(self).loss(self.__step(results, losses, present))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log losses and metrics under ``val/``."""
        self.__evaluate("val", self.trainer.val_dataloaders, batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log losses and metrics under ``test/``."""
        self.__evaluate("test", self.trainer.test_dataloaders, batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Task name -> prediction. The input is found in the batch as in training; targets may be missing."""
        loaders = None if self._trainer is None else self.trainer.predict_dataloaders
        dataloader = task_of_loader(loaders, batch, dataloader_idx, self.tasks)
        found: dict[str, Any] = {}
        for group in self.__form.inputs_of(batch, self.tasks, dataloader):
            outputs = self(group.inputs)
            found |= {name: self.tasks[name].predict(outputs[name]) for name in group.names}
        return {name: found[name] for name in core_of(self).names if name in found}

    def parameter_groups(self, lr: float | None = None) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: the model's trainable parameters, and the balancer's without decay.

        Args:
            lr: the optimizer's learning rate. With it the balancer's group (of ``uncertainty``, ``imtl_l``) gets a rate
                of its own, ten times as high.
        """
        model = [parameter for parameter in core_of(self).registered() if parameter.requires_grad]
        return groups_of(model, self.__learned(), lr)

    def configure_optimizers(self) -> Any:
        """What ``optimizer=`` and ``lr_scheduler=`` say, with ten times the rate for what the balancer learns."""
        make = self.__optimizer_fn or (lambda groups: torch.optim.Adam(groups, lr=1e-3))
        optimizer = make(self.parameter_groups())
        own = give_own_rate(optimizer, self.__learned())
        if self.__scheduler_fn is None:
            return optimizer
        scheduler = self.__scheduler_fn(optimizer)
        if own is not None:
            keep_ratio(scheduler, optimizer, own)
        options = {"scheduler": scheduler, "interval": self.__lr_interval, "monitor": "val/loss"}
        return {"optimizer": optimizer, "lr_scheduler": options}

    def to_torchscript(self, file_path: Any = None, method: str | None = "script", *args: Any, **kwargs: Any) -> Any:
        """As in any LightningModule, by tracing: a script knows neither tasks by name nor features of any structure.

        Raises: ``ValueError`` if the method is "script".
        """
        if method == "script":
            raise bad_argument(
                self,
                "method",
                'be "trace"',
                "'script'",
                'Pass method="trace", strict=False and example_inputs=, or script the encoder and the heads',
            )
        return super().to_torchscript(file_path, method, *args, **kwargs)

    def __learned(self) -> list[Tensor]:
        return [parameter for parameter in self.balancer.parameters() if parameter.requires_grad]

    def __evaluate(self, stage: str, loaders: Any, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        name, logs = task_of_loader(loaders, batch, dataloader_idx, self.tasks), self.__logs[stage]
        if batch_idx == 0 and dataloader_idx > 0 and name is None:
            logs.start_loader(self.tasks)
        results = self.__run(batch, dataloader=name)
        last = name is not None and dataloader_idx == len(loaders) - 1
        logs.add(self, self.tasks, results, named=name is not None, last=last)

    def __run(
        self, batch: Any, *, apart: bool = False, halved: bool = False, dataloader: str | None = None
    ) -> dict[str, TaskResult]:
        """What each task gives in a batch; ``apart`` if each loss is differentiated by itself."""
        groups = self.__form.groups_of(batch, self.tasks, dataloader)
        parts = [encode(group, self.encoder, self.__form, self) for group in groups]
        cut = apart and self.__may_cut(parts)
        try:
            results = run_heads(parts, self.tasks, cut=cut, halved=halved)
        except RuntimeError as error:
            if not cut or not needs_the_features(error):
                raise
            if core_of(self).level == "features":
                raise uncut_at_features(self) from error
            # From now on heads read the features themselves, as with a plain sum.
            cut, self.__uncut = False, True
            results = run_heads(parts, self.tasks, cut=False, halved=halved)
        if cut:
            # Here by name; another step may take another way, so every backward looks again.
            core_of(self).remembered("only features", lambda: check_only_features(results, self.__owned(results), self))
        for result in results.values():
            result.whole = apart and not cut
        return results

    def __may_cut(self, parts: Sequence[Encoded]) -> bool:
        own = core_of(self).remembered("ids", lambda: {id(parameter) for parameter in core_of(self).own()})
        inputs = inputs_in_reach(parts, own)
        if core_of(self).level == "features":
            check_features_can_be_cut(parts, inputs, self)
            return True
        hidden = core_of(self).remembered("inputs", lambda: inputs_behind(parts, own, self))
        tied = any(parameter.requires_grad for parameter in self.__declared().tied)
        return not (inputs or hidden or tied or self.__uncut or any(part.unknown for part in parts))

    def __step(self, results: dict[str, TaskResult], losses: list[Tensor], present: Tensor | None) -> Step:
        core = core_of(self)
        if not core.takes_gradients():
            return core.step(losses, present, Owned())
        owned = self.__owned(results)
        if any(result.whole for result in results.values()):
            # A gradient has ways past the features too: whole backwards from each loss.
            return core.step(losses, present, owned)
        if core.level == "features":
            # There is nothing to compare in what comes after the features.
            owned.shared_heads, owned.private = [], [*owned.shared_heads, *owned.private, *owned.tied]
        found, parts = [results.get(name) for name in core.names], len(losses) // len(core.names)
        roots: list[list[Tensor]] = [[] if result is None else result.roots for result in found]
        leaves = None
        if any(result is not None and result.leaves is not None for result in found):
            leaves = parts * [[] if result is None or result.leaves is None else result.leaves for result in found]
        return core.step(losses, present, owned, roots=roots * parts, leaves=leaves)

    def __declared(self) -> Owned:
        """Who owns which parameters, trained or frozen."""
        return core_of(self).remembered("owned", lambda: declared(self.encoder, self.tasks.tasks, core_of(self).own()))

    def __owned(self, results: Mapping[str, TaskResult]) -> Owned:
        """Who owns the trainable parameters now; the results tell of those that no module has."""
        every = self.__declared()
        lists = (every.shared, every.shared_heads, every.private, every.tied)
        shared, heads, private, tied = ([p for p in parameters if p.requires_grad] for parameters in lists)
        roots = [root for result in results.values() for root in result.roots]
        return core_of(self).placed(Owned(shared, heads, private, tied), roots)


def _layer_of(encoder: nn.Module, layer: nn.Module | str | None, owner: object) -> nn.Module | None:
    """The last shared layer, which must lie in the encoder."""
    inside = dict(encoder.named_modules())
    found = inside.get(layer) if isinstance(layer, str) else layer
    if layer is not None and not any(found is module for module in inside.values()):
        raise bad_argument(owner, "last_layer", "be a module inside the encoder", repr(layer), "Pass it or its name")
    return found
