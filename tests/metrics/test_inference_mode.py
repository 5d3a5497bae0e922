"""Metrics go on after Lightning's inference mode: validate, test or predict before fit, and again after it."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import (
    ExplainedVariance,
    MeanAbsoluteError,
    MeanMetric,
    MeanSquaredError,
    Metric,
    PearsonCorrCoef,
    R2Score,
    SpearmanCorrCoef,
)
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassAUROC, MulticlassCalibrationError
from torchmetrics.wrappers import Running

from lightning_mtl import MultiTaskModule
from lightning_mtl.metrics.total_loss import TotalLoss
from lightning_mtl.tasks import ClassificationTask, MultiLabelTask, ReconstructionTask, RegressionTask, Task
from tests.nets import WIDTH, Samples, mlp, samples, sgd

pytestmark = pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save all targets")


class InPlace(Metric):
    """A metric of one's own: everything that it has is changed in place, a buffer and an attribute too."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(2), dist_reduce_fx="sum")
        self.register_buffer("seen", torch.zeros(()))
        self.more = torch.zeros(())

    def update(self, output: Tensor, target: Tensor) -> None:
        self.total[0] += (output - target).abs().sum()
        self.total[1] += target.numel()
        self.seen.add_(1)
        self.more.add_(1)

    def compute(self) -> Tensor:
        return self.total[0] / self.total[1] + 0 * self.seen + 0 * self.more

    def reset(self) -> None:
        super().reset()
        self.seen, self.more = torch.zeros(()), torch.zeros(())


class Holding(Metric):
    """A metric that holds others."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([InPlace(), MeanSquaredError()])

    def update(self, output: Tensor, target: Tensor) -> None:
        for metric in self.inner:
            metric.update(output, target)

    def compute(self) -> Tensor:
        return torch.stack([metric.compute() for metric in self.inner]).sum()

    def reset(self) -> None:
        super().reset()
        for metric in self.inner:
            metric.reset()


class OfErrors(MeanMetric):
    def update(self, output: Tensor, target: Tensor) -> None:
        super().update((output - target).abs())


def model() -> MultiTaskModule:
    torch.manual_seed(0)
    numbers = {
        "mse": MeanSquaredError(),
        "pearson": PearsonCorrCoef(),
        "spearman": SpearmanCorrCoef(),
        "r2": R2Score(),
        "variance": ExplainedVariance(),
        "sum": MeanSquaredError() + 2 * MeanAbsoluteError(),
        "running": Running(MeanAbsoluteError(), window=2),
        "errors": OfErrors(),
        "mine": InPlace(),
        "holding": Holding(),
    }
    classes = {
        "macro": MulticlassAccuracy(3, average="macro"),
        "auroc": MulticlassAUROC(3),
        "binned": MulticlassAUROC(3, thresholds=5),
        "calibration": MulticlassCalibrationError(3),
    }
    tasks: dict[str, Task] = {
        "kind": ClassificationTask(nn.Linear(WIDTH, 3), 3, classes),
        "size": RegressionTask(nn.Linear(WIDTH, 1), metrics=numbers),
        "back": ReconstructionTask(nn.Linear(WIDTH, 8)),
        "marks": MultiLabelTask(nn.Linear(WIDTH, 2), 2),
        "auroc": MultiLabelTask(nn.Linear(WIDTH, 2), 2, {"auroc": BinaryAUROC(thresholds=7)}, target="marks"),
        "own": Task(nn.Linear(WIDTH, 2), nn.MSELoss(), {"mae": MeanAbsoluteError()}, target="shape"),
    }
    return MultiTaskModule(mlp(), tasks, "pcgrad", optimizer=sgd, train_metrics=True)


def data(seed: int) -> torch.utils.data.DataLoader:
    x, targets = samples(16, seed)
    return torch.utils.data.DataLoader(Samples(x, targets | {"marks": (x[:, :2] > 0).float()}), batch_size=8)


def trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(max_epochs=1, enable_model_summary=False, num_sanity_val_steps=0, **(quiet | options))


def fitted(before: tuple[str, ...], **options: Any) -> list[dict[str, float]]:
    """What is logged by each fit of one module, which does other things before each."""
    net, found = model(), []
    for _ in range(2):
        for verb in before:
            (extra,) = ({"verbose": False},) if verb != "predict" else ({},)
            getattr(trainer(**options), verb)(net, data(9), **extra)
        runner = trainer(**options)
        runner.fit(net, data(0), data(1))
        found.append({key: value.item() for key, value in runner.callback_metrics.items()})
    return found


@pytest.fixture(scope="module")
def plain() -> list[dict[str, float]]:
    torch.manual_seed(0)
    return fitted(())


@pytest.mark.parametrize(
    "before, inference_mode",
    [(("validate",), True), (("test",), True), (("predict",), True), (("test", "validate", "predict"), False)],
    ids=str,
)
def test_a_fit_finds_the_same_metrics_whatever_came_before(plain, before, inference_mode):
    found = fitted(before, inference_mode=inference_mode)
    assert len(found[0]) > 40
    assert found == [pytest.approx(logged, nan_ok=True) for logged in plain]


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_an_evaluation_finds_the_same_outside_the_mode_as_in_it(verb):
    net, seen = model(), []
    for mode in (True, False, False, True, True):
        (logged,) = getattr(trainer(inference_mode=mode), verb)(net, data(1), verbose=False)
        seen.append(logged)
    assert all(logged == pytest.approx(seen[0], nan_ok=True) for logged in seen)


def test_metrics_that_were_used_before_start_afresh():
    used = MeanSquaredError()
    used.update(torch.ones(3), torch.zeros(3))
    task = RegressionTask(nn.Identity(), metrics={"mse": used})
    (metric,) = task.update_metrics("val", torch.zeros(1), torch.full((1,), 2.0), "a").values()
    assert metric.compute().item() == 4.0
    assert used.compute().item() == 1.0


def test_the_total_of_losses_takes_any_count():
    """Sums of class weights may be small, and counts may be tensors; a task without any is left out."""
    total = TotalLoss(3)
    with torch.inference_mode():
        total.update(0, torch.tensor(4.0), 0.25)
        total.reset()
    total.update(0, torch.tensor(4.0), 0.25)
    total.update(0, torch.tensor(1.0), torch.tensor(0.5))
    total.update(1, torch.tensor(3.0), 7)
    total.update(2, torch.tensor(5.0), 0)
    assert total.compute().item() == pytest.approx((4 * 0.25 + 1 * 0.5) / 0.75 + 3)
