"""Batches in which no task has a label, or no loss a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_mtl import MultiTaskModule
from lightning_mtl.tasks import ReconstructionTask, RegressionTask, Task
from tests.nets import WIDTH, mlp, samples, sgd, trainer

X, TARGETS = samples(8)


def model(balancer: Any, **options: Any) -> MultiTaskModule:
    torch.manual_seed(0)
    tasks = {
        "a": Task(nn.Linear(WIDTH, 1), F.mse_loss, target="size"),
        "b": RegressionTask(nn.Linear(WIDTH, 1), target="size"),
    }
    return MultiTaskModule(mlp(), tasks, balancer, optimizer=sgd, **options)


def batch(num: int) -> Any:
    return X[:num], {"size": TARGETS["size"][:num]}


@pytest.mark.parametrize("level", ["parameters", "features"])
@pytest.mark.parametrize("balancer", ["fixed", "uncertainty", "pcgrad", "gradnorm", "famo"])
def test_a_batch_without_any_label_is_a_step_of_zeros(balancer, level):
    module = model(balancer, level=level)
    loss = module.training_step(batch(0), 0)
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())
    assert all(not p.grad.any() for p in module.own_parameters())


@pytest.mark.parametrize("balancer", ["fixed", "uncertainty", "pcgrad", "gradnorm", "modo"])
def test_a_run_goes_over_it(balancer):
    module, runner = model(balancer), trainer(max_epochs=2, log_every_n_steps=1)
    data = DataLoader([batch(4), batch(0), batch(8)], batch_size=None)
    runner.fit(module, data, data)
    assert runner.global_step == 6
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    with torch.no_grad():
        outputs = torch.cat([module(batch(num)[0])["a"] for num in (4, 8)]).squeeze(1)
    wanted = F.mse_loss(outputs, torch.cat([batch(num)[1]["size"] for num in (4, 8)]))
    assert runner.callback_metrics["val/loss/a"].item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("balancer", ["fixed", "pcgrad"])
@pytest.mark.filterwarnings("ignore:.*has no gradient in this batch")
def test_constants_alone_are_refused(balancer):
    tasks = {name: Task(nn.Linear(WIDTH, 1), lambda output, target: 0.5, target="size") for name in ("a", "b")}
    module = MultiTaskModule(mlp(), tasks, balancer)
    with pytest.raises(
        ValueError, match="`losses` must hold a loss with a gradient of at least one task, got constants"
    ):
        module.training_step(batch(8), 0)
    with torch.no_grad():
        assert module.training_step(batch(8), 0).item() == 1.0


def test_where_nothing_can_be_trained_nothing_is_asked():
    module = model("pcgrad")
    module.requires_grad_(False)
    assert not module.training_step(batch(8), 0).requires_grad


@pytest.mark.parametrize("halves", [1, 2, 3])
def test_halves_of_few_samples(halves):
    tasks = {"a": RegressionTask(nn.Linear(WIDTH, 1), target="size"), "back": ReconstructionTask(nn.Linear(WIDTH, 8))}
    module = MultiTaskModule(mlp(), tasks, "modo")
    module.training_step(batch(halves), 0).backward()
    assert all(p.grad.isfinite().all() for p in module.own_parameters())
