"""Every task's loss and gradient against loops over single entries, for every way of marking a missing label."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mtl.tasks import (
    ClassificationTask,
    MultiLabelTask,
    ReconstructionTask,
    RegressionTask,
    Task,
    entries,
    task_loss,
)

B, C, K, H, W = 5, 4, 3, 2, 3
Entry = Callable[[Any, Any], Tensor]


# The reference: what one entry of a target costs, from the output at that entry, in elementary operations.


def cross_entropy(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    total = torch.stack([logit.exp() for logit in logits]).sum().log()
    smooth = torch.stack([total - logit for logit in logits]).sum() / len(logits)
    return (1 - smoothing) * (total - logits[int(target)]) + smoothing * smooth


def binary_cross_entropy(logit: Tensor, target: Tensor) -> Tensor:
    chance = 1 / (1 + (-logit).exp())
    return -(float(target) * chance.log() + (1 - float(target)) * (1 - chance).log())


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target) ** 2


def absolute(output: Tensor, target: Tensor) -> Tensor:
    return output - target if output > target else target - output


def smooth_absolute(output: Tensor, target: Tensor) -> Tensor:
    gap = absolute(output, target)
    return 0.5 * gap * gap if gap < 1 else gap - 0.5


def squared_of_sample(output: Tensor, target: Tensor, divide: bool) -> Tensor:
    errors = [squared(a, b) for a, b in zip(output.flatten(), target.flatten(), strict=True)]
    return torch.stack(errors).sum() / (len(errors) if divide else 1)


@dataclass
class Case:
    """One task, the shapes of its output and target, and the cost of an entry.

    Args:
        task: options -> task; the head is the identity.
        output: shape of the output.
        target: shape of the target, which decides what one label is: an entry.
        entry: output at that entry, target there -> cost.
        classes: the target holds class numbers below this; 0: it holds numbers; 2: it may be 0 or 1 as a float.
        gap: what marks a missing label in the target, if something does.
        channels: the output has them in dimension 1, one vector per entry.
        per_sample: a label is a whole sample.
    """

    task: Callable[..., Task]
    output: tuple[int, ...]
    target: tuple[int, ...]
    entry: Entry
    classes: int = 0
    gap: float | None = None
    channels: bool = False
    per_sample: bool = False


def head(kind: Callable[..., Task], *args: Any, **fixed: Any) -> Callable[..., Task]:
    return lambda **options: kind(nn.Identity(), *args, **(fixed | options))


NAN = math.nan
mse_each = partial(F.mse_loss, reduction="none")
ce_each = partial(F.cross_entropy, reduction="none")

CASES = {
    "classification": Case(head(ClassificationTask, C), (B, C), (B,), cross_entropy, C, -100, True),
    "classification, ignore 255": Case(
        head(ClassificationTask, C, ignore_index=255), (B, C), (B,), cross_entropy, C, 255, True
    ),
    "classification, ignore class 0": Case(
        head(ClassificationTask, C, ignore_index=0), (B, C), (B,), cross_entropy, C, 0, True
    ),
    "classification, smoothed": Case(
        head(ClassificationTask, C, label_smoothing=0.2),
        (B, C),
        (B,),
        partial(cross_entropy, smoothing=0.2),
        C,
        -100,
        True,
    ),
    "segmentation": Case(head(ClassificationTask, C), (B, C, H, W), (B, H, W), cross_entropy, C, -100, True),
    "regression [B, 1]": Case(head(RegressionTask), (B, 1), (B,), squared, 0, NAN),
    "regression [B]": Case(head(RegressionTask), (B,), (B,), squared, 0, NAN),
    "regression [B, K]": Case(head(RegressionTask), (B, K), (B, K), squared, 0, NAN),
    "regression, l1": Case(head(RegressionTask, loss="l1"), (B, K), (B, K), absolute, 0, NAN),
    "regression, smooth l1": Case(head(RegressionTask, loss="smooth_l1"), (B, K), (B, K), smooth_absolute, 0, NAN),
    "depth": Case(head(RegressionTask, loss="l1"), (B, 1, H, W), (B, 1, H, W), absolute, 0, NAN),
    "multi-label": Case(head(MultiLabelTask, K), (B, K), (B, K), binary_cross_entropy, 2, NAN),
    "one label [B, 1]": Case(head(MultiLabelTask, 1), (B, 1), (B,), binary_cross_entropy, 2, NAN),
    "reconstruction, sum": Case(
        head(ReconstructionTask, target="a"),
        (B, H * W),
        (B, 1, H, W),
        partial(squared_of_sample, divide=False),
        per_sample=True,
    ),
    "reconstruction, mean": Case(
        head(ReconstructionTask, "mean", target="a"),
        (B, 1, H, W),
        (B, 1, H, W),
        partial(squared_of_sample, divide=True),
        per_sample=True,
    ),
    "own elementwise loss": Case(head(Task, mse_each, missing="nan"), (B, 1), (B,), squared, 0, NAN),
    "own loss of classes": Case(head(Task, ce_each, missing=-1), (B, C), (B,), cross_entropy, C, -1, True),
    "own dense loss": Case(head(Task, ce_each, missing=255), (B, C, H, W), (B, H, W), cross_entropy, C, 255, True),
    "own loss without a gap": Case(head(Task, mse_each), (B, K), (B, K), squared),
}
GAPS = [name for name, case in CASES.items() if case.gap is not None]


def data(case: Case, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(case.output, generator=generator, dtype=torch.float64)
    if not case.classes:
        return output, torch.randn(case.target, generator=generator, dtype=torch.float64)
    low = 1 if case.gap == 0 else 0
    target = torch.randint(low, case.classes, case.target, generator=generator)
    return output, target.double() if case.classes == 2 else target


def labels(case: Case, which: str) -> Tensor:
    """True where there is a label, in the shape of the labels."""
    shape = case.target[:1] if case.per_sample else case.target
    if which == "some":
        return torch.rand(shape, generator=torch.Generator().manual_seed(7)) < 0.6
    return torch.full(shape, which == "all")


def reference(case: Case, output: Tensor, target: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cost of the entries with a label, and its gradient; 0 and zeros without any."""
    output = output.clone().requires_grad_()
    costs = []
    for index in itertools.product(*(range(size) for size in there.shape)):
        if there[index]:
            if case.channels:
                at = output[(index[0], slice(None), *index[1:])]
            elif case.output == (*case.target, 1):
                at = output[(*index, 0)]
            else:
                at = output[index]
            costs.append(case.entry(at, target[index]))
    if not costs:
        return torch.zeros((), dtype=torch.float64), torch.zeros_like(output)
    loss = sum(costs) / len(costs)
    return loss.detach(), torch.autograd.grad(loss, output)[0]


def measured(task: Task, output: Tensor, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Any]:
    output = output.clone().requires_grad_()
    loss, count = task.mean_loss(output, target, "a", mask)
    return loss.detach(), torch.autograd.grad(loss, output)[0], count


def check(case: Case, task: Task, given: tuple[Any, ...], clean: tuple[Tensor, Tensor], there: Tensor) -> None:
    loss, grad, count = measured(task, *given)
    wanted, wanted_grad = reference(case, *clean, there)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-12, atol=1e-14)
    assert int(count) == int(there.sum())


@pytest.mark.parametrize("name", CASES)
def test_complete_labels(name):
    case = CASES[name]
    loss, grad, count = measured(case.task(), *data(case))
    wanted, wanted_grad = reference(case, *data(case), labels(case, "all"))
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-12, atol=1e-14)
    assert count == labels(case, "all").numel()


@pytest.mark.parametrize("which", ["all", "some", "none"])
@pytest.mark.parametrize("name", GAPS)
def test_gaps_marked_in_the_target(name, which):
    case = CASES[name]
    output, target = data(case)
    there = labels(case, which)
    marked = target.masked_fill(~there, case.gap)
    check(case, case.task(), (output, marked), (output, target), there)


@pytest.mark.parametrize("which", ["all", "some", "none"])
@pytest.mark.parametrize("name", CASES)
def test_gaps_marked_by_a_mask(name, which):
    case = CASES[name]
    output, target = data(case)
    there = labels(case, which)
    check(case, case.task(mask="m"), (output, target, there), (output, target), there)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].target != (B,)])
def test_a_mask_of_samples_serves_all_their_entries(name):
    case = CASES[name]
    output, target = data(case)
    samples = torch.tensor([True, False, True, True, False])
    shape = case.target[:1] if case.per_sample else case.target
    there = samples.reshape(B, *(1 for _ in shape[1:])).expand(shape)
    check(case, case.task(mask="m"), (output, target, samples), (output, target), there)


@pytest.mark.parametrize("name", GAPS)
def test_gaps_and_a_mask_add_up(name):
    case = CASES[name]
    output, target = data(case)
    gaps, mask = labels(case, "some"), torch.rand(case.target, generator=torch.Generator().manual_seed(3)) < 0.6
    marked = target.masked_fill(~gaps, case.gap)
    check(case, case.task(mask="m"), (output, marked, mask), (output, target), gaps & mask)


@pytest.mark.parametrize("name", CASES)
def test_what_stands_where_there_is_no_label_does_not_matter(name):
    case = CASES[name]
    output, target = data(case)
    there = labels(case, "some")
    away = ~there.reshape(*there.shape, *(1 for _ in target.shape[there.ndim :])).expand(target.shape)
    for rubbish in [math.nan, math.inf, -1e300] if target.is_floating_point() else [-1, 1000]:
        dirty = target.masked_fill(away, rubbish)
        check(case, case.task(mask="m"), (output, dirty, there), (output, target), there)


@pytest.mark.parametrize("name", CASES)
def test_without_any_label_the_loss_is_exactly_zero(name):
    case = CASES[name]
    output, target = data(case)
    fill = math.nan if target.is_floating_point() else -1
    loss, grad, count = measured(case.task(mask="m"), output, torch.full_like(target, fill), labels(case, "none"))
    assert loss.item() == 0.0
    assert not grad.any()
    assert int(count) == 0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mask", [False, True])
def test_losses_under_bf16_autocast_are_float32(name, mask):
    case = CASES[name]
    output, target = data(case)
    target = target.float() if target.is_floating_point() else target
    task = case.task(mask="m") if mask else case.task()
    weight = torch.eye(case.output[-1], requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = output.float() @ weight
        assert low.dtype == torch.bfloat16
        loss, _ = task.mean_loss(low, target, "a", labels(case, "some") if mask else None)
    assert loss.dtype == torch.float32
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8, torch.int64])
def test_yes_and_no_may_come_in_any_dtype(dtype):
    output = torch.randn(B, K, dtype=torch.float64)
    target = torch.randint(2, (B, K))
    loss, _ = MultiLabelTask(nn.Identity(), K).mean_loss(output, target.to(dtype), "a")
    wanted, _ = reference(CASES["multi-label"], output, target, torch.ones(B, K, dtype=torch.bool))
    torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_classes_may_come_in_any_integer_dtype(dtype):
    output, target = data(CASES["classification"])
    loss, _ = ClassificationTask(nn.Identity(), C).mean_loss(output, target.to(dtype), "a")
    wanted, _ = reference(CASES["classification"], output, target, torch.ones(B, dtype=torch.bool))
    torch.testing.assert_close(loss, wanted)


def test_a_loss_that_is_a_scalar_stays_as_it_is():
    output, target = torch.randn(B, K), torch.randn(B, K)
    loss, count = Task(nn.Identity(), lambda a, b: (a * b).sum()).mean_loss(output, target, "a")
    assert loss == (output * target).sum()
    assert count == B


def test_a_target_need_not_be_a_tensor():
    target = {"one": torch.ones(B, 1), "two": torch.zeros(B, 1)}
    task = Task(nn.Identity(), lambda a, b: (a - b["one"] + b["two"]).square().mean())
    loss, _ = task.mean_loss(torch.zeros(B, 1), target, "a")
    assert loss == 1.0


def test_a_mask_may_fit_the_loss_instead_of_the_target():
    """Surface normals ``[B, 3, H, W]``: the angle has no channels any more, and neither has the mask."""
    output, target = torch.randn(B, 3, H, W), torch.randn(B, 3, H, W)
    mask = torch.rand(B, H, W) < 0.5
    task = Task(nn.Identity(), lambda a, b: 1 - F.cosine_similarity(a, b, dim=1), mask="m")
    loss, count = task.mean_loss(output, target, "a", mask)
    angles = 1 - F.cosine_similarity(output, target, dim=1)
    torch.testing.assert_close(loss, angles[mask].mean())
    assert int(count) == int(mask.sum())


SHAPES = [(1,), (B,), (1, 1), (1, B), (B, 1), (B, B), (B, 1, 1), (1, B, 1), (B, B, 1)]
ELEMENTWISE = {
    "regression": lambda: RegressionTask(nn.Identity()),
    "function": lambda: Task(nn.Identity(), F.mse_loss),
    "module": lambda: Task(nn.Identity(), nn.SmoothL1Loss()),
    "partial": lambda: Task(nn.Identity(), partial(F.l1_loss, reduction="sum")),
    "function, gaps": lambda: Task(nn.Identity(), partial(F.huber_loss, reduction="none"), missing="nan"),
    "lambda, gaps": lambda: Task(nn.Identity(), lambda a, b: (a.squeeze(-1) - b).abs(), missing="nan"),
}


@pytest.mark.parametrize("output", SHAPES, ids=str)
@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if not name.startswith("lambda")])
def test_shapes_meet_or_are_refused(name, output):
    task = ELEMENTWISE[name]()
    for target in SHAPES:
        if output in (target, (*target, 1)):
            assert task.mean_loss(torch.zeros(output), torch.zeros(target), "a")[0].shape == ()
        else:
            with pytest.raises(ValueError, match="must have the shape of the output"):
                task.mean_loss(torch.zeros(output), torch.zeros(target), "a")


def test_a_loss_of_ones_own_that_grows_is_refused():
    with pytest.raises(ValueError, match="never broadcast"):
        ELEMENTWISE["lambda, gaps"]().mean_loss(torch.zeros(B, 1), torch.zeros(B, 1), "a")


@pytest.fixture
def elsewhere(monkeypatch):
    """As on a device whose numbers the host would have to wait for: what is known there, is known from shapes."""
    for file in (entries, task_loss):
        monkeypatch.setattr(file, "readable", lambda tensor: False)


@pytest.mark.parametrize("which", ["all", "some", "none"])
@pytest.mark.parametrize("name", CASES)
def test_where_the_host_would_have_to_wait(elsewhere, name, which):
    case = CASES[name]
    output, target = data(case)
    there = labels(case, which)
    check(case, case.task(mask="m"), (output, target, there), (output, target), there)
    away = ~there.reshape(*there.shape, *(1 for _ in target.shape[there.ndim :])).expand(target.shape)
    dirty = target.masked_fill(away, math.nan) if target.is_floating_point() else target.masked_fill(away, -1)
    check(case, case.task(mask="m"), (output, dirty, there), (output, target), there)
    _, count = case.task(mask="m").mean_loss(output, dirty, "a", there)
    assert isinstance(count, Tensor)


@pytest.mark.parametrize("classes", [[0, 2, 1], [2, -100, 2], [-100] * 3])
def test_class_weights_where_the_host_would_have_to_wait(elsewhere, classes):
    output, target = torch.randn(3, 3, dtype=torch.float64, requires_grad=True), torch.tensor(classes)
    weights = [0.1, 4.0, 0.0]
    loss, count = ClassificationTask(nn.Identity(), 3, class_weights=weights).mean_loss(output, target, "a")
    wanted = F.cross_entropy(output, target, torch.tensor(weights).double())
    if wanted.isnan():
        wanted = (output * 0).sum()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, output), torch.autograd.grad(wanted, output), rtol=1e-6, atol=0
    )
    assert float(count) == pytest.approx(sum(weights[c] for c in classes if c >= 0))
