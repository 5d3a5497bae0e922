"""A loss without a gradient: a task that is switched off, or one that is detached by mistake."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mtl import MultiTaskModule
from lightning_mtl.tasks import MultiLabelTask, RegressionTask, Task
from tests.nets import WIDTH, loader, mlp, samples, sgd, trainer

SAID = r"Task: The loss of 'off' has no gradient in this batch.*remove detach\(\), no_grad\(\) or item\(\)"


def off(value: Any, **options: Any) -> Task:
    return Task(nn.Linear(WIDTH, 1), lambda output, target: value, **options)


NUMBERS = {
    "float": 0.75,
    "int": 2,
    "zero": 0.0,
    "numpy float64": numpy.float64(0.75),
    "numpy float32": numpy.float32(0.75),
    "numpy int": numpy.int64(2),
    "fraction": Fraction(3, 4),
    "tensor": torch.tensor(0.75),
    "one per sample": torch.full((4, 1), 0.75),
    "zero tensor": torch.zeros(()),
}


@pytest.mark.parametrize("value", NUMBERS)
def test_the_task_is_absent_with_its_value_kept(value):
    task = off(NUMBERS[value])
    with pytest.warns(UserWarning, match=SAID):
        loss, count = task.mean_loss(task(torch.randn(4, WIDTH)), torch.zeros(4, 1), "off")
    assert loss.shape == ()
    assert loss.is_floating_point()
    assert loss.item() == float(NUMBERS[value] if not isinstance(NUMBERS[value], Tensor) else NUMBERS[value].mean())
    assert count == 0
    loss, count = task.mean_loss(task(torch.randn(4, WIDTH)), torch.zeros(4, 1), "off")  # said once
    assert count == 0


@pytest.mark.parametrize("value", ["float", "zero", "one per sample", "zero tensor"])
def test_a_number_stands_for_every_label(value):
    given = NUMBERS[value]
    task = off(given, missing="nan", mask="m")
    target, mask = torch.tensor([[math.nan], [1.0], [2.0], [3.0]]), torch.tensor([True, True, True, False])
    with torch.no_grad():
        loss, count = task.mean_loss(task(torch.randn(4, WIDTH)), target, "off", mask)
        assert loss.item() == float(given if not isinstance(given, Tensor) else given.mean())
        assert count == 2
        loss, count = task.mean_loss(task(torch.randn(4, WIDTH)), target, "off", torch.zeros(4, dtype=torch.bool))
        assert loss.item() == count == 0


def test_in_evaluation_it_is_a_loss_like_any_other():
    task = off(0.75)
    with torch.no_grad():
        loss, count = task.mean_loss(task(torch.randn(4, WIDTH)), torch.zeros(4, 1), "off")
    assert loss.item() == 0.75
    assert count == 4


def test_where_nothing_can_be_trained_nothing_is_said():
    task = RegressionTask(nn.Linear(WIDTH, 1).requires_grad_(False))
    loss, count = task.mean_loss(task(torch.randn(4, WIDTH)), torch.zeros(4), "off")
    assert not loss.requires_grad
    assert count == 4


@pytest.mark.parametrize("value", [True, None, "0", torch.tensor(0), torch.tensor(True)])
def test_what_is_no_number_is_refused(value):
    task = off(value)
    with pytest.raises(TypeError, match=r"loss of 'off'` must be a number or a floating-point tensor"):
        task.mean_loss(task(torch.randn(4, WIDTH)), torch.zeros(4, 1), "off")


def test_a_scalar_that_is_not_0_is_no_mean_over_labels():
    task = off(torch.tensor(0.5), missing="nan")
    with pytest.raises(ValueError, match="have one entry per label"):
        task.mean_loss(task(torch.randn(4, WIDTH)), torch.zeros(4, 1), "off")


class Detached(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features).detach()


DETACHED = {
    "head": lambda: Task(Detached(nn.Linear(WIDTH, 1)), F.mse_loss),
    "head without parameters": lambda: Task(nn.Sequential(Detached(nn.Flatten()), nn.AvgPool1d(WIDTH)), F.mse_loss),
    "loss": lambda: Task(nn.Linear(WIDTH, 1), lambda output, target: F.mse_loss(output.detach(), target)),
    "number": lambda: Task(nn.Linear(WIDTH, 1), lambda output, target: F.mse_loss(output, target).item()),
}


@pytest.mark.parametrize("balancer", ["fixed", "uncertainty", "pcgrad", "gradnorm", "modo"])
@pytest.mark.parametrize("what", DETACHED)
def test_a_model_trains_without_the_task_and_says_so_once(what, balancer):
    torch.manual_seed(0)
    tasks = {"size": RegressionTask(nn.Linear(WIDTH, 1)), "off": DETACHED[what]()}
    model = MultiTaskModule(mlp(), tasks, balancer, optimizer=sgd)
    x, targets = samples(8)
    batch = x, {"size": targets["size"], "off": targets["size"][:, None]}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            model.zero_grad()
            model.training_step(batch, 0).backward()
    assert [str(warning.message) for warning in said if "'off'" in str(warning.message)] == [
        "Task: The loss of 'off' has no gradient in this batch (a number, or a constant tensor), so the task is left "
        "out of the step. If it should train, remove detach(), no_grad() or item() from its head and its loss."
    ]
    assert model.last_balance.present.tolist() == [True, False]
    assert model.last_balance.weights[1] == 0
    if balancer in ("fixed", "pcgrad"):
        alone = F.mse_loss(model.tasks["size"](model.encoder(x)).squeeze(1), targets["size"])
        wanted = torch.autograd.grad(alone, list(model.encoder.parameters()))
        for p, grad in zip(model.encoder.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, grad)


def test_a_task_that_is_switched_off_for_a_while_is_logged_with_its_value(tmp_path):
    """On in the first and the third of four steps, else the number 0.25."""
    calls = iter([True, False, True, False])

    def loss(output: Tensor, target: Tensor) -> Any:
        return F.l1_loss(output, target) if next(calls) else 0.25

    torch.manual_seed(0)
    tasks = {"size": RegressionTask(nn.Linear(WIDTH, 1)), "off": Task(nn.Linear(WIDTH, 2), loss, target="shape")}
    model = MultiTaskModule(mlp(), tasks, "pcgrad", optimizer=sgd, strict_targets=False)
    rows: list[dict[str, float]] = []
    model.on_train_batch_end = lambda *_: rows.append({k: v.item() for k, v in model.trainer.callback_metrics.items()})
    with pytest.warns(UserWarning, match=SAID):
        trainer(log_every_n_steps=1).fit(model, loader(64))
    assert [row["train/loss/off"] == 0.25 for row in rows] == [False, True, False, True]
    for row in rows:
        assert row["train/loss"] == pytest.approx(row["train/loss/size"] + row["train/loss/off"])


def test_labels_of_one_head_may_be_switched_off_apart():
    tasks = MultiLabelTask(nn.Linear(WIDTH, 2), ["on", "off"]).per_label("y")
    tasks["off"].loss = lambda output, target: 0.5
    output, target = torch.randn(4, 1, requires_grad=True), torch.ones(4, 1)
    with pytest.warns(UserWarning, match="LabelTask: The loss of 'off' has no gradient"):
        loss, count = tasks["off"].mean_loss(output, target, "off")
    assert (loss.item(), count) == (0.5, 0)
    assert tasks["on"].mean_loss(output, target, "on")[1] == 4
