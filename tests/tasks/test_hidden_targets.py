"""What stands in the place of a missing label reaches neither the loss nor its gradient nor a metric."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_mtl.tasks import MultiLabelTask, RegressionTask, Task

B, C, H, W = 4, 3, 5, 2


class Seen(Metric):
    """Keeps what it is shown."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("pairs", [])

    def update(self, output: Tensor, target: Tensor) -> None:
        self.pairs.append((output, target))

    def compute(self) -> list[tuple[Tensor, Tensor]]:
        return self.pairs


def shown(task: Task, output: Any, target: Any, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    (metric,) = task.update_metrics("val", output, target, "a", mask).values()
    ((outputs, targets),) = metric.pairs
    return outputs, targets


# Losses that have no value at a target of 0, where torch would be asked for one behind a mask.
RELATIVE = {
    "relative": lambda a, b: (a - b).abs() / b,
    "logarithmic": lambda a, b: (a - b.log()).square(),
    "negative power": lambda a, b: a * b ** (-2),
}


@pytest.mark.parametrize("marked", ["nan", "mask"])
@pytest.mark.parametrize("name", RELATIVE)
def test_a_loss_need_not_have_a_value_at_0(name, marked):
    output = torch.randn(6, dtype=torch.float64, requires_grad=True)
    target, there = torch.rand(6).double() + 0.5, torch.tensor([False, True, True, False, True, True])
    hidden = target.masked_fill(~there, math.nan if marked == "nan" else 0.0)
    task = Task(nn.Identity(), RELATIVE[name], missing="nan") if marked == "nan" else None
    task = task or Task(nn.Identity(), RELATIVE[name], mask="m")
    loss, count = task.mean_loss(output, hidden, "a", None if marked == "nan" else there)
    wanted = RELATIVE[name](output[there], target[there]).mean()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, output)[0], torch.autograd.grad(wanted, output)[0])
    assert count == 4


def test_a_loss_need_not_know_class_0():
    """Classes 1 to 3, and -1 for no label: a loss of one's own that looks them up."""
    table = torch.tensor([math.nan, 1.0, 2.0, 3.0])
    output = torch.randn(4, requires_grad=True)
    task = Task(nn.Identity(), lambda a, b: (a - table[b]).square(), missing=-1)
    loss, _ = task.mean_loss(output, torch.tensor([3, -1, 1, -1]), "a")
    wanted = ((output[0] - 3) ** 2 + (output[2] - 1) ** 2) / 2
    torch.testing.assert_close(torch.autograd.grad(loss, output), torch.autograd.grad(wanted, output))


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, 0.0])
def test_a_mask_without_the_channels(rubbish):
    """Surface normals: the mask fits loss and pixels, while the target has channels in dimension 1."""
    output = torch.randn(B, C, H, W, dtype=torch.float64, requires_grad=True)
    target, mask = torch.randn(B, C, H, W, dtype=torch.float64), torch.rand(B, H, W) < 0.5
    dirty = target.masked_fill(~mask[:, None], rubbish)
    task = Task(nn.Identity(), lambda a, b: 1 - F.cosine_similarity(a, b, dim=1), {"seen": Seen()}, mask="m")
    loss, count = task.mean_loss(output, dirty, "a", mask)
    wanted = (1 - F.cosine_similarity(output, target, dim=1))[mask].mean()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, output)[0], torch.autograd.grad(wanted, output)[0])
    assert count == int(mask.sum())
    outputs, targets = shown(task, output, dirty, mask)
    assert torch.equal(outputs, torch.stack([output[b, :, h, w] for b, h, w in mask.nonzero().tolist()]))
    assert torch.equal(targets, torch.stack([target[b, :, h, w] for b, h, w in mask.nonzero().tolist()]))


@pytest.mark.parametrize("size", [(B, C, H, W), (C, C, C), (B, C, C), (C, C, C, C)])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(reduction="none"), nn.NLLLoss(reduction="none")])
def test_metrics_see_the_classes_of_an_entry(loss, size):
    """Also where pixels are as many as classes, so that shapes alone would not tell which dimension is which."""
    output = torch.randn(size).log_softmax(1)
    target = torch.randint(size[1], (size[0], *size[2:]))
    target[torch.rand(target.shape) < 0.4] = -100
    task = Task(nn.Identity(), loss, {"seen": Seen()}, missing=-100)
    outputs, targets = shown(task, output, target)
    places = (target != -100).nonzero().tolist()
    assert torch.equal(outputs, torch.stack([output[(b, slice(None), *rest)] for b, *rest in places]))
    assert targets.tolist() == [int(target[tuple(place)]) for place in places]


def test_an_output_that_metrics_cannot_be_shown_is_refused():
    task = Task(nn.Identity(), lambda a, b: (a.sum(1) - b).square(), {"seen": Seen()}, missing="nan")
    target = torch.tensor([math.nan, 1.0])
    with pytest.raises(ValueError, match=r"^Task: `output` must have the dimensions of the labels, \[2\]"):
        task.update_metrics("val", torch.zeros(3, 2), target, "a")


@pytest.mark.parametrize(
    "dtype, missing, label", [(torch.uint8, -1, 255), (torch.int8, 255, -1), (torch.int16, 65535, -1)]
)
def test_an_integer_marks_nothing_that_wraps_around_to_it(dtype, missing, label):
    task = Task(nn.Identity(), lambda a, b: a * b, missing=missing)
    loss, count = task.mean_loss(torch.ones(2), torch.tensor([label, 1], dtype=dtype), "a")
    assert loss.item() == (label + 1) / 2
    assert count == 2


def test_a_target_that_cannot_be_filled_must_be_finite():
    """Nested targets: a masked NaN would give a NaN gradient, since 0 times NaN is NaN."""
    task = Task(nn.Identity(), lambda a, b: (a - b["y"]).square(), mask="m")
    mask, output = torch.tensor([True, False]), torch.ones(2, requires_grad=True)
    loss, _ = task.mean_loss(output, {"y": torch.tensor([3.0, 9.0])}, "a", mask)
    assert torch.autograd.grad(loss, output)[0].tolist() == [-4.0, 0.0]
    with pytest.raises(ValueError, match=r"`loss of 'a'` must be finite where a label is missing"):
        task.mean_loss(output, {"y": torch.tensor([3.0, math.nan])}, "a", mask)
    # Of a model that has diverged the loss says so itself.
    assert task.mean_loss(output * math.nan, {"y": torch.zeros(2)}, "a", mask)[0].isnan()


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_a_mask_of_other_labels_is_refused(columns):
    label = MultiLabelTask(nn.Identity(), 3, mask="m").per_label("y")["label0"]
    with pytest.raises(ValueError, match=rf"mask of 'a'` must have the leading .* got \[2, {columns}\]"):
        label.pick({"y": torch.zeros(2, 3), "m": torch.ones(2, columns, dtype=torch.bool)}, None, "a")


@pytest.mark.parametrize("mask", [torch.ones(3, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)])
def test_a_mask_of_another_shape_is_refused_even_if_nothing_is_missing(mask):
    with pytest.raises(ValueError, match="mask of 'a'` must have the leading dimensions"):
        RegressionTask(nn.Identity(), mask="m").mean_loss(torch.zeros(2), torch.zeros(2), "a", mask)
    with pytest.raises(ValueError, match="mask of 'a'` must have the leading dimensions"):
        Task(nn.Identity(), lambda a, b: (a - b).abs(), mask="m").mean_loss(torch.zeros(2), torch.zeros(2), "a", mask)


@pytest.mark.parametrize("target", [[1.0, 2.0], (1.0, 2.0), {"y": 3.0}, None, "text", torch.tensor(1.0)])
def test_metrics_take_whatever_the_loss_takes(target):
    task = Task(nn.Identity(), lambda a, b: a.mean(), {"seen": Seen()})
    task.update_metrics("val", torch.ones(2), target, "a")
    assert task.metrics.on("val")["seen"]._update_count == 1
