"""Metrics see the labelled entries and nothing else."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_mtl.tasks import ClassificationTask, MultiLabelTask, ReconstructionTask, RegressionTask, Task


class Seen(Metric):
    """Keeps what it is shown, as metrics over all samples (AUROC, rank correlations) do."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("outputs", [])
        self.add_state("targets", [])

    def update(self, output: Tensor, target: Tensor) -> None:
        self.outputs.append(output)
        self.targets.append(target)

    def compute(self) -> tuple[Tensor, Tensor]:
        return torch.cat(self.outputs), torch.cat(self.targets)


def shown(task: Task, output: Tensor, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    (metric,) = task.update_metrics("val", output, target, "a", mask).values()
    return metric.compute()


SEEN = {"seen": Seen()}
NAN = math.nan
FIRST = torch.tensor([True, False, True, False])


def test_regression():
    output, target = torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([1.0, NAN, NAN, 0.0])
    outputs, targets = shown(RegressionTask(nn.Identity(), metrics=SEEN), output, target)
    assert outputs.tolist() == [1.0, 4.0]
    assert targets.tolist() == [1.0, 0.0]


def test_classification():
    output, target = torch.arange(12.0).reshape(4, 3), torch.tensor([2, -100, -100, 0])
    outputs, targets = shown(ClassificationTask(nn.Identity(), 3, SEEN), output, target)
    assert outputs.tolist() == [[0, 1, 2], [9, 10, 11]]
    assert targets.tolist() == [2, 0]


def test_segmentation_shows_one_vector_of_classes_per_pixel():
    output, target = torch.arange(12.0).reshape(1, 3, 2, 2), torch.tensor([[[2, 255], [255, 0]]])
    outputs, targets = shown(ClassificationTask(nn.Identity(), 3, SEEN, ignore_index=255), output, target)
    assert outputs.tolist() == [[0, 4, 8], [3, 7, 11]]
    assert targets.tolist() == [2, 0]


def test_labels_come_with_probabilities():
    """Logits that happen to lie in [0, 1] would be taken for probabilities."""
    output, target = torch.tensor([[0.3, 0.2], [math.log(3), 5.0]]), torch.tensor([[1.0, NAN], [0.0, NAN]])
    chances, targets = shown(MultiLabelTask(nn.Identity(), 2, SEEN), output, target)
    torch.testing.assert_close(chances, torch.tensor([0.5744425, 0.75]))
    assert targets.tolist() == [1, 0]


def test_reconstruction():
    images = torch.arange(16.0).reshape(4, 1, 2, 2)
    task = ReconstructionTask(nn.Identity(), metrics=SEEN, target="x", mask="m")
    outputs, targets = shown(task, -images.flatten(1), images, FIRST)
    assert outputs.tolist() == [[0, -1, -2, -3], [-8, -9, -10, -11]]
    assert torch.equal(targets, -outputs)


def test_a_mask_beside_the_gaps():
    output, target = torch.arange(4.0), torch.tensor([NAN, 1.0, 2.0, 3.0])
    task = RegressionTask(nn.Identity(), metrics=SEEN, mask="m")
    assert shown(task, output, target, FIRST)[1].flatten().tolist() == [2.0]


def test_without_gaps_shapes_are_kept():
    task = Task(nn.Identity(), F.cross_entropy, SEEN)
    outputs, targets = shown(task, torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long))
    assert outputs.shape == (2, 3, 4, 4)
    assert targets.shape == (2, 4, 4)


def test_what_is_kept_holds_no_graph():
    output = torch.ones(4, 1, requires_grad=True) * 2
    task = Task(nn.Identity(), F.mse_loss, SEEN)
    assert not shown(task, output, torch.zeros(4, 1))[0].requires_grad


def test_a_batch_without_labels_shows_nothing():
    task = RegressionTask(nn.Identity(), metrics=SEEN)
    (metric,) = task.update_metrics("val", torch.zeros(4), torch.full((4,), NAN), "a").values()
    assert metric.outputs == []


def test_stages_do_not_mix():
    task = RegressionTask(nn.Identity())
    task.update_metrics("val", torch.zeros(2), torch.ones(2), "a")
    test = task.update_metrics("test", torch.zeros(2), torch.full((2,), 3.0), "a")
    assert {name: metric.compute().item() for name, metric in test.items()} == {"mse": 9.0, "mae": 3.0}


def test_the_users_metric_is_not_the_one_updated():
    mine = Seen()
    RegressionTask(nn.Identity(), metrics={"seen": mine}).update_metrics("val", torch.zeros(2), torch.ones(2), "a")
    assert mine.outputs == []


# Defaults, over two batches: (task, outputs, targets, values by hand).
DEFAULTS = {
    "classification": (
        lambda: ClassificationTask(nn.Identity(), 3),
        [[[0, 1, 0], [5, 0, 0]], [[0, 0, 2], [1, 0, 0]]],
        [torch.tensor([1, 2]), torch.tensor([2, -100])],
        {"accuracy": 2 / 3},
    ),
    "regression": (
        lambda: RegressionTask(nn.Identity()),
        [[[1], [2]], [[3], [4]]],
        [torch.tensor([0.0, 4.0]), torch.tensor([NAN, 1.0])],
        {"mse": 14 / 3, "mae": 2.0},
    ),
    # Small positive logits are a yes: their probabilities are above one half.
    "multi-label": (
        lambda: MultiLabelTask(nn.Identity(), 2),
        [[[0.1, 0.2]], [[0.3, -1]]],
        [torch.tensor([[1.0, 0.0]]), torch.tensor([[NAN, 0.0]])],
        {"accuracy": 2 / 3, "f1": 2 / 3},
    ),
    "reconstruction": (
        lambda: ReconstructionTask(nn.Identity(), target="x"),
        [[[1, 2]], [[3, 5]]],
        [torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]])],
        {"mse": (1 + 4 + 9 + 25) / 4},
    ),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_default_metrics(name):
    make, outputs, targets, values = DEFAULTS[name]
    task = make()
    for output, target in zip(outputs, targets, strict=True):
        metrics = task.update_metrics("val", torch.tensor(output, dtype=torch.float32), target, "a")
    assert {key: metric.compute().item() for key, metric in metrics.items()} == pytest.approx(values)
    assert task.metric_names == list(values)


@pytest.mark.parametrize(
    "make, wanted",
    [
        (lambda: ClassificationTask(nn.Identity(), 3), {"accuracy": True}),
        (lambda: MultiLabelTask(nn.Identity(), 3), {"accuracy": True, "f1": True}),
        (lambda: RegressionTask(nn.Identity()), {"mse": False, "mae": False}),
        (lambda: ReconstructionTask(nn.Identity()), {"mse": False}),
        (lambda: Task(nn.Identity(), partial(F.mse_loss, reduction="none"), SEEN), {"seen": None}),
    ],
)
def test_which_metrics_are_better_when_higher(make, wanted):
    assert make().higher_is_better == wanted


def test_a_batch_without_labels_in_training_leaves_metrics_alone():
    task = RegressionTask(nn.Identity())
    for target in (torch.tensor([1.0, 1.0]), torch.tensor([NAN, NAN])):
        metrics = task.update_metrics("train", torch.zeros(2), target, "a")
    assert metrics["mse"].compute().item() == 1.0
