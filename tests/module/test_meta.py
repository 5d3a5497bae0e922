"""A module that is built without memory does what the one does from whose state dict it is filled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError

from lightning_mtl import MultiTaskModule
from lightning_mtl.tasks import RegressionTask
from tests.nets import WIDTH, loader, mlp, module, three_tasks, trainer


@pytest.fixture
def dirty(monkeypatch):
    """Memory that nobody has written to is seldom zero."""
    empty_like = torch.empty_like

    def filled(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        made = empty_like(tensor, **options)
        return made if made.is_meta else made.fill_(7)

    monkeypatch.setattr(torch, "empty_like", filled)


def from_meta(balancer: str, **options: Any) -> Any:
    with torch.device("meta"):
        model = module(balancer, **options)
    model.to_empty(device="cpu")
    model.load_state_dict(module(balancer, **options).state_dict())
    return model


@pytest.mark.parametrize("balancer", ["fixed", "uncertainty", "pcgrad", "gradnorm"])
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation(stage, balancer, dirty):
    model, found = from_meta(balancer), []
    for each in (model, module(balancer)):
        for _ in range(2):
            found += getattr(trainer(), stage)(each, loader(), verbose=False)
    assert {key for key in found[0] if "loss" in key}
    assert found[1:] == found[:-1]


@pytest.mark.parametrize("balancer", ["fixed", "uncertainty", "pcgrad", "gradnorm"])
def test_training(balancer, dirty):
    found = []
    for model in (from_meta(balancer, train_metrics=True), module(balancer, train_metrics=True)):
        runner = trainer(log_every_n_steps=1)
        runner.fit(model, loader(), loader(seed=1))
        found.append({key: float(value) for key, value in runner.callback_metrics.items()})
    assert found[0] == found[1]


def test_metrics_moved_to_the_meta_device_and_back(dirty):
    model = module()
    wanted = trainer().validate(model, loader(), verbose=False)
    model.to("meta")
    model.to_empty(device="cpu")
    model.load_state_dict(module().state_dict())
    assert trainer().validate(model, loader(), verbose=False) == wanted


def test_metrics_keep_what_they_have_seen_when_they_move():
    task = three_tasks()["size"]
    task.update_metrics("val", torch.ones(4, 1), torch.zeros(4), "size")
    assert float(task.to("cpu").double()._metrics_on("val")["mse"].compute()) == 1.0


def test_a_metric_of_ones_own_that_lost_what_it_starts_from_is_refused(dirty):
    with torch.device("meta"):
        tasks = {"size": RegressionTask(torch.nn.Linear(WIDTH, 1), metrics={"error": MeanAbsoluteError()})}
        model = MultiTaskModule(mlp(), tasks)
    model.to_empty(device="cpu")
    torch.nn.init.ones_(model.encoder[0].weight)
    data = [{"input": x, "size": x[:, 0]} for x in torch.randn(2, 4, 8)]
    message = (
        r"RegressionTask: `metrics\['error'\]` must know the numbers that it starts from, got one that was made on"
    )
    with pytest.raises(ValueError, match=message):
        trainer().validate(model, DataLoader(data, batch_size=None), verbose=False)
