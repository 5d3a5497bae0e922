"""The metrics of one task, apart for each stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_mtl.checks import bad_argument
from lightning_mtl.tasks.names import key_of, name_of, usable

STAGES = ("train", "val", "test")


class StageMetrics(nn.ModuleDict):
    """A fresh copy of each metric for every stage.

    Args:
        metrics: name -> metric.
        owner: the task, which an error names.

    Raises: ``TypeError`` if it is no mapping of metrics; ``ValueError`` for a name that no log key can hold, and at the
    first batch for a metric that was made on the meta device and so has lost the numbers that it starts from.
    """

    def __init__(self, metrics: Mapping[str, Metric] | None, owner: object) -> None:
        if metrics is not None and not isinstance(metrics, Mapping | nn.ModuleDict):
            raise bad_argument(
                owner, "metrics", "be a mapping of names to metrics", type(metrics).__name__, "Pass a dict", TypeError
            )
        given: dict[str, Metric] = dict(metrics or {})
        for name, metric in given.items():
            if not usable(name):
                raise bad_argument(
                    owner,
                    "metrics",
                    "have non-empty strings as names, without 'dataloader_idx_'",
                    repr(name),
                    "Rename the metric",
                )
            if not isinstance(metric, Metric):
                raise bad_argument(
                    owner,
                    f"metrics['{name}']",
                    "be a torchmetrics metric",
                    type(metric).__name__,
                    "Pass an object such as torchmetrics.MeanSquaredError()",
                    TypeError,
                )
        # "train" would be an attribute of every module, hence the prefix.
        super().__init__({f"on_{stage}": nn.ModuleDict() for stage in STAGES})
        self.owner_name = type(owner).__name__
        self.made_on_meta = [name for name, metric in given.items() if any(each.is_meta for each in _defaults(metric))]
        for stage in STAGES:
            group: Any = self[f"on_{stage}"]
            group.update({key_of(name): _fresh(metric) for name, metric in given.items()})

    def on(self, stage: str) -> dict[str, Metric]:
        """The metrics of a stage by name."""
        group: Any = self[f"on_{stage}"]
        return {name_of(key): metric for key, metric in group.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StageMetrics:
        """Metrics keep the numbers that they start from where memory is given up, or asked for without its content."""
        emptied = "to_empty" in getattr(fn, "__qualname__", "")
        metrics = [part for part in self.modules() if isinstance(part, Metric)]
        before = [dict(metric._defaults) for metric in metrics]
        super()._apply(fn, recurse)
        for metric, defaults in zip(metrics, before, strict=True):
            for key, value in metric._defaults.items():
                old = defaults[key]
                if not isinstance(value, Tensor) or not isinstance(old, Tensor) or old.is_meta:
                    continue
                if value.is_meta:
                    metric._defaults[key] = old
                elif emptied:
                    metric._defaults[key] = old.to(value.device)
            if emptied:
                metric.reset()
        return self

    @torch.no_grad()
    def show(self, stage: str, output: Any, target: Any) -> None:
        """Update the metrics of a stage."""
        for name, metric in self.on(stage).items():
            if name in self.made_on_meta and metric.device.type != "meta":
                raise bad_argument(
                    self.owner_name,
                    f"metrics['{name}']",
                    "know the numbers that it starts from",
                    "one that was made on the meta device",
                    "Make it under torch.device('cpu'), or outside of torch.device('meta')",
                )
            _leave_inference_mode(metric)
            metric.update(output, target)


def off_meta() -> AbstractContextManager[Any]:
    """Where metrics are made: what one starts from is in no state dict, and without memory it would be lost."""
    return torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext()


def _defaults(metric: Metric) -> Iterator[Tensor]:
    """The tensors that a metric, or one inside it, starts from."""
    for part in metric.modules():
        if isinstance(part, Metric):
            yield from (value for value in part._defaults.values() if isinstance(value, Tensor))


def _fresh(metric: Metric) -> Metric:
    """A copy that has seen nothing."""
    copy = metric.clone()
    copy.reset()
    return copy


def _leave_inference_mode(metric: Metric) -> None:
    """Make ordinary tensors of what a metric, or one inside it, holds from inference mode.

    ``validate`` and ``test`` run in that mode, and reset metrics in it. Outside, torch lets nobody change such a tensor
    in place, as most metrics do.
    """
    if torch.is_inference_mode_enabled():
        return
    for part in metric.modules():
        for held in (vars(part), part._buffers):
            for key, value in held.items():
                if isinstance(value, Tensor) and value.is_inference():
                    held[key] = value.clone()
