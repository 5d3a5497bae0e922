"""What each task gives in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mtl.checks import bad_argument, shape
from lightning_mtl.engine import as_plain, leaves_per_head, mapped, tensors_of, unknown_types
from lightning_mtl.module.batches import BatchForm, Group
from lightning_mtl.tasks import LabelTask, Task, TaskRegistry

#: What a mean is over: a number of labels or samples, or a sum of weights.
Count = Tensor | float


@dataclass
class Encoded:
    """Tasks that read the same samples, with the features of these.

    Args:
        roots: the tensors among the features that carry a gradient.
        unknown: types of objects among the features that may hide more of them.
    """

    group: Group
    features: Any
    roots: list[Tensor]
    unknown: list[str]


@dataclass
class TaskResult:
    """One task in one batch.

    Args:
        loss: over the whole batch.
        means: the mean loss of each part that is compared: of the whole, or of two halves.
        counts: what each is the mean over; 0 where the task is absent.
        constant: whether the loss has a value, but no gradient: it is logged, and its task is absent.
        roots: where its head begins.
        leaves: what its head read in their place, if the graph is cut there.
        whole: whether a gradient may pass beside the roots, so that only whole backwards from the loss are right.
    """

    loss: Tensor
    means: tuple[Tensor, ...]
    counts: tuple[Count, ...]
    output: Any
    target: Any
    mask: Tensor | None
    constant: bool
    roots: list[Tensor]
    leaves: list[Tensor] | None
    whole: bool = False

    @property
    def absent(self) -> bool:
        """Whether it is known without waiting for a device that there is no label."""
        return all(not isinstance(count, Tensor) and count == 0 for count in self.counts)


def encode(group: Group, encoder: nn.Module, form: BatchForm, owner: object) -> Encoded:
    """Run the encoder. Raises: ``ValueError`` if it can be trained and its features carry no gradient."""
    features = form.encode(encoder, group.inputs)
    roots, unknown = tensors_of(features), unknown_types(features)
    if torch.is_grad_enabled() and not roots and not unknown and any(p.requires_grad for p in encoder.parameters()):
        raise bad_argument(
            owner,
            "encoder",
            "return features that require grad",
            f"{shape(features)} without a gradient",
            "Remove detach() or no_grad() from it, or freeze it with requires_grad_(False)",
        )
    return Encoded(group, features, roots, unknown)


def run_heads(parts: Sequence[Encoded], tasks: TaskRegistry, *, cut: bool, halved: bool) -> dict[str, TaskResult]:
    """Outputs and losses, in task order.

    Args:
        parts: the features of all samples.
        tasks: the registry.
        cut: whether every head reads leaves of its own.
        halved: whether the losses of even and odd samples are needed apart.
    """
    results: dict[str, TaskResult] = {}
    for part in parts:
        names = part.group.names
        copies: list[tuple[Any, list[Tensor] | None]] = [(part.features, None)] * len(names)
        if cut and part.roots:
            copies = [*leaves_per_head(part.features, len(names))]
        common: dict[int, tuple[Any, list[Tensor] | None]] = {}
        for name, (features, leaves) in zip(names, copies, strict=True):
            task = tasks[name]
            if isinstance(task, LabelTask):
                # The head that several labels share runs once.
                if id(task.head) not in common:
                    common[id(task.head)] = task.head(features), leaves
                every, leaves = common[id(task.head)]
                output = task.column_of(every)
            else:
                output = task(features)
            results[name] = _result(task, output, part, name, halved, leaves)
    return {name: results[name] for name in tasks if name in results}


def _result(task: Task, output: Any, part: Encoded, name: str, halved: bool, leaves: list[Tensor] | None) -> TaskResult:
    target, mask = task.pick(part.group.targets, part.group.inputs, name)
    means: list[Tensor] = []
    counts: list[Count] = []
    # For balancers that compare them, the even and the odd samples apart.
    for begin, step in ((0, 2), (1, 2)) if halved else ((0, 1),):

        def some(value: Any, begin: int = begin, step: int = step) -> Any:
            return value[begin::step] if isinstance(value, Tensor) else value

        given = mapped((output, target, mask), some) if halved else (output, target, mask)
        mean, count = task.mean_loss(given[0], given[1], name, given[2])
        # A subclass (with labels, with meta data) has no use for them in a sum of losses.
        means.append(as_plain(mean))
        counts.append(count)
    loss = sum(means[1:], start=means[0]) / len(means) if halved else means[0]
    trains = part.roots or part.unknown or any(parameter.requires_grad for parameter in task.parameters())
    constant = torch.is_grad_enabled() and not loss.requires_grad and bool(trains)
    if constant:
        task.say_constant(name)
        counts = [0] * len(counts)
    return TaskResult(loss, tuple(means), tuple(counts), output, target, mask, constant, part.roots, leaves)
