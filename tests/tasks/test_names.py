"""Any string is a name, in batches, logs, errors and checkpoints, whatever torch can hold."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from torch import nn
from torchmetrics import MeanAbsoluteError, MeanSquaredError

from lightning_mtl import MultiTaskModule
from lightning_mtl.sharing import Encoders, OwnFeatures
from lightning_mtl.tasks import MultiLabelTask, RegressionTask, TaskRegistry
from lightning_mtl.tasks.names import key_of, name_of
from tests.nets import WIDTH, mlp, sgd

HARD = [
    "type", "train", "forward", "keys", "training", "to", "half", "_modules", "T_destination",
    "logP (o/w)", "a", "a/b", "a.b", "a b", "val", "%", "%25", "%2E", "%a%2Eb", "a%2Eb", ".", "..", " ", "µ|5 %", "0",
    "\n",
]  # fmt: skip
PLAIN = ["kind", "0", "left-digit", "Straße", "5_o_Clock_Shadow", "_x", "logP (o/w)", "a b", "a/b"]

OWN = {"type": "of type", "a/b": "a/b"}


def task(**options) -> RegressionTask:
    return RegressionTask(nn.Linear(WIDTH, 1), **options)


@pytest.mark.parametrize("name", HARD)
def test_a_key_is_one_that_torch_holds(name):
    holder = nn.ModuleDict()
    holder[key_of(name)] = nn.Identity()
    assert name_of(key_of(name)) == name


def test_no_two_names_have_one_key():
    draw = random.Random(0)
    names = {"".join(draw.choices("a.%25E/", k=draw.randint(1, 6))) for _ in range(20_000)} | set(HARD)
    keys = {name: key_of(name) for name in names}
    assert len(set(keys.values())) == len(names) > 5_000
    assert all(name_of(key) == name for name, key in keys.items())


@pytest.mark.parametrize("name", PLAIN)
def test_what_torch_can_hold_is_its_own_key(name):
    assert next(iter(TaskRegistry({name: task()}).state_dict())) == f"_tasks.{name}.head.weight"


def test_a_registry_is_a_mapping_of_the_names():
    registry = TaskRegistry({name: task() for name in HARD})
    assert registry.names == tuple(registry) == tuple(HARD)
    assert [name for name, _ in registry.items()] == HARD
    assert all(name in registry and registry[name] is known for name, known in registry.items())
    assert "b" not in registry
    assert key_of("type") not in registry
    assert registry.main == tuple(HARD)
    registry.freeze("a.b")
    assert [name for name, known in registry.items() if not known.head.weight.requires_grad] == ["a.b"]
    kept = registry["type"]
    assert registry.remove("type") is kept
    assert "type" not in registry
    with pytest.raises(ValueError, match=r"`name` must be one of 'train', .*, got 'type'"):
        registry["type"]
    registry.add("type", kept)
    assert registry.names == (*HARD[1:], "type")
    with pytest.raises(ValueError, match="must be a new, non-empty string"):
        registry.add("a.b", task())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_has_the_names(copied):
    registry = TaskRegistry({name: task() for name in HARD})
    other = copied(registry)
    assert other.names == registry.names
    assert other["a/b"] is not registry["a/b"]


def test_a_state_dict_is_loaded_by_name():
    one, other = (TaskRegistry({name: task() for name in HARD}) for _ in range(2))
    other.load_state_dict(one.state_dict(), strict=True)
    for name in HARD:
        assert torch.equal(one[name].head.weight, other[name].head.weight)


def test_metrics_have_any_name_too():
    metrics = {name: MeanSquaredError() for name in [*HARD, "loss"]}
    shown = RegressionTask(nn.Identity(), metrics=metrics)
    assert shown.metric_names == list(metrics)
    assert list(shown.higher_is_better) == list(metrics)
    assert list(shown.update_metrics("val", torch.ones(2), torch.zeros(2), "a")) == list(metrics)


def test_labels_have_any_name_too():
    tasks = TaskRegistry(MultiLabelTask(nn.Linear(WIDTH, len(HARD)), HARD).per_label("y"))
    assert tasks.names == tuple(HARD)


@pytest.mark.parametrize("name", ["", 3, None, "loss", "loss/a", "loss/loss", "dataloader_idx_0", "a/dataloader_idx_1"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=r"^TaskRegistry: `name` must be a new, "):
        TaskRegistry({name: task()})


@pytest.mark.parametrize("name", ["losses", "loss a", "my loss", "a/loss", "Loss"])
def test_names_beside_loss_are_taken(name):
    assert TaskRegistry({name: task()}).names == (name,)


@pytest.mark.parametrize("order", [("a", "a/b"), ("a/b", "a")])
def test_two_meanings_of_a_log_key_are_refused(order):
    metrics = {"a": {"b/mse": MeanSquaredError()}, "a/b": {"mae": MeanAbsoluteError(), "mse": MeanSquaredError()}}
    with pytest.raises(ValueError, match=r"got 'a(/b)?', of which 'a/b/mse' is also a metric of 'a(/b)?'. Rename"):
        TaskRegistry({name: task(metrics=metrics[name]) for name in order})
    metrics["a"] = {"b/max": MeanSquaredError()}
    assert TaskRegistry({name: task(metrics=metrics[name]) for name in order}).names == order


@pytest.mark.parametrize("balancer", ["fixed", "pcgrad"])
def test_batches_errors_and_predictions_have_the_users_names(balancer):
    torch.manual_seed(0)
    model = MultiTaskModule(mlp(), {name: task() for name in HARD}, balancer, optimizer=sgd)
    x = torch.randn(4, 8)
    targets = {name: torch.randn(4) for name in HARD}
    assert model.task_names == tuple(HARD)
    model.training_step((x, targets), 0).backward()
    assert model.last_balance.names == tuple(HARD)
    assert list(model(x)) == list(model.predict_step((x, targets), 0)) == HARD
    flat = model.training_step({"input": x} | targets, 0)
    torch.testing.assert_close(flat, model.training_step((x, targets), 0))
    with pytest.raises(ValueError, match=r"`target of 'logP \(o/w\)'` must stand in the batch under the key"):
        model.training_step((x, {name: t for name, t in targets.items() if name != "logP (o/w)"}), 0)
    other = MultiTaskModule(mlp(), {name: task() for name in HARD}, balancer, optimizer=sgd)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x)["type"], model(x)["type"])


def test_an_encoder_of_its_own_need_not_have_the_tasks_name():
    encoders = Encoders({"of type": mlp(), "a/b": mlp()})
    tasks = {name: RegressionTask(OwnFeatures(key, nn.Linear(WIDTH, 1))) for name, key in OWN.items()}
    model = MultiTaskModule(encoders, tasks, optimizer=sgd)
    x = torch.randn(4, 8)
    assert torch.equal(model(x)["type"], tasks["type"].head.head(encoders["of type"](x)))
