"""The registry: an ordered mapping that knows which heads train."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_mtl import MultiTaskModule, Task, TaskRegistry
from lightning_mtl.tasks import ClassificationTask, MultiLabelTask, ReconstructionTask, RegressionTask
from tests.nets import WIDTH, loader, mlp, module, samples, sgd, three_tasks, trainer


def test_the_order_is_that_of_the_mapping():
    registry = TaskRegistry({"b": RegressionTask(nn.Identity()), "a": RegressionTask(nn.Identity())})
    assert list(registry) == ["b", "a"]
    assert registry.names == ("b", "a")
    assert [name for name, _ in registry.items()] == ["b", "a"]
    assert len(registry) == 2


def test_a_task_is_added_at_the_end():
    registry, task = TaskRegistry(three_tasks()), RegressionTask(nn.Linear(WIDTH, 1))
    registry.add("more", task)
    assert list(registry) == ["kind", "size", "shape", "more"]
    assert registry["more"] is task


def test_a_task_is_removed_and_handed_back():
    tasks = three_tasks()
    registry = TaskRegistry(tasks)
    assert registry.remove("size") is tasks["size"]
    assert list(registry) == ["kind", "shape"]
    assert "size" not in registry
    registry.add("size", tasks["size"])
    assert list(registry) == ["kind", "shape", "size"]


def test_an_empty_registry_can_be_filled():
    registry = TaskRegistry()
    registry.add("kind", three_tasks()["kind"])
    assert "kind" in registry
    assert len(registry) == 1


@pytest.mark.parametrize("name", ["0", "semseg", "left-digit", "Straße", "5_o_Clock_Shadow", "_x"])
def test_other_names_are_taken(name):
    assert list(TaskRegistry({name: RegressionTask(nn.Identity())})) == [name]


def test_heads_without_parameters_may_be_one_object():
    nothing = nn.Identity()
    assert len(TaskRegistry({"a": RegressionTask(nothing), "b": RegressionTask(nothing)})) == 2


def test_freezing_concerns_one_head():
    registry = TaskRegistry(three_tasks())
    registry.freeze("size")
    assert {name: task.head.weight.requires_grad for name, task in registry.items()} == {
        "kind": True,
        "size": False,
        "shape": True,
    }
    registry.unfreeze("size")
    assert registry["size"].head.weight.requires_grad


@pytest.mark.parametrize("balancer", ["fixed", "uncertainty", "pcgrad", "gradnorm"])
def test_a_frozen_head_stays_and_its_task_still_trains_the_encoder(balancer):
    model = module(balancer)
    for name in model.tasks:
        model.tasks.freeze(name)
    heads = [parameter.clone() for parameter in model.tasks.parameters()]
    encoder = [parameter.clone() for parameter in model.encoder.parameters()]
    trainer(max_steps=2).fit(model, loader())
    assert all(torch.equal(a, b) for a, b in zip(heads, model.tasks.parameters(), strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(encoder, model.encoder.parameters(), strict=True))


def test_a_registry_makes_the_same_module_as_a_mapping():
    x, targets = samples(4)
    torch.manual_seed(0)
    one = MultiTaskModule(mlp(), three_tasks(), optimizer=sgd)
    torch.manual_seed(0)
    other = MultiTaskModule(mlp(), TaskRegistry(three_tasks()), optimizer=sgd)
    assert torch.equal(one.training_step((x, targets), 0), other.training_step((x, targets), 0))
    assert list(one.state_dict()) == list(other.state_dict())


KINDS = {
    "classification": (lambda: ClassificationTask(nn.Linear(WIDTH, 3), 3), torch.tensor([0, 2, -100, 1])),
    "regression": (lambda: RegressionTask(nn.Linear(WIDTH, 1), "l1"), torch.tensor([0.0, 1.0, torch.nan, 2.0])),
    "multi-label": (lambda: MultiLabelTask(nn.Linear(WIDTH, 2), ["x", "y"]), torch.ones(4, 2)),
    "one label": (
        lambda: MultiLabelTask(nn.Linear(WIDTH, 2), ["x", "y"]).per_label("t")["y"],
        torch.tensor([[0.0], [1.0], [1.0], [torch.nan]]),
    ),
    "reconstruction": (lambda: ReconstructionTask(nn.Linear(WIDTH, 5), "mean"), torch.ones(4, 5)),
    "own": (lambda: Task(nn.Linear(WIDTH, 1), F.mse_loss), torch.ones(4, 1)),
    "own, with a loss module": (lambda: Task(nn.Linear(WIDTH, 1), nn.HuberLoss()), torch.ones(4, 1)),
}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda task: pickle.loads(pickle.dumps(task))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_equal_and_independent(kind, copied):
    make, target = KINDS[kind]
    task = make()
    other = copied(task)
    features = torch.randn(4, WIDTH)
    task.update_metrics("val", task(features), target, "a")

    def loss(of: Task) -> float:
        return of.mean_loss(of(features), target, "a")[0].item()

    before = loss(task)
    assert loss(other) == before
    assert all(metric._update_count == 0 for metric in other._metrics_on("val").values())
    with torch.no_grad():
        other.head.weight.add_(1)
    assert loss(other) != before
    assert loss(task) == before


@pytest.mark.parametrize(
    "make, output, wanted",
    [
        (lambda: ClassificationTask(nn.Identity(), 3), torch.tensor([[0, 2, 1], [5, 0, 0]]), torch.tensor([1, 0])),
        (
            lambda: ClassificationTask(nn.Identity(), 2),
            torch.tensor([[[[0, 2]], [[1, 1]]]]),
            torch.tensor([[[1, 0]]]),
        ),
        (lambda: MultiLabelTask(nn.Identity(), 1), torch.tensor([[0.0], [3.0]]), torch.tensor([[0.5], [0.9525741]])),
        (lambda: RegressionTask(nn.Identity()), torch.tensor([[2.5]]), torch.tensor([[2.5]])),
        (lambda: Task(nn.Identity(), F.mse_loss), torch.tensor([[2.5]]), torch.tensor([[2.5]])),
    ],
)
def test_predictions(make, output, wanted):
    torch.testing.assert_close(make().predict(output.float() if output.ndim else output), wanted)
