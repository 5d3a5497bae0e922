"""Main tasks and auxiliary tasks: who says it, and who listens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mtl import Balanced, MultiTaskModule
from lightning_mtl.balancers import Balancer, load, resolve
from lightning_mtl.tasks import (
    ClassificationTask,
    MultiLabelTask,
    ReconstructionTask,
    RegressionTask,
    Task,
    TaskRegistry,
)

MAKE = {
    Task: lambda **role: Task(nn.Linear(4, 1), nn.functional.mse_loss, **role),
    ClassificationTask: lambda **role: ClassificationTask(nn.Linear(4, 3), 3, **role),
    MultiLabelTask: lambda **role: MultiLabelTask(nn.Linear(4, 2), 2, **role),
    RegressionTask: lambda **role: RegressionTask(nn.Linear(4, 1), **role),
    ReconstructionTask: lambda **role: ReconstructionTask(nn.Linear(4, 8), **role),
}
FIRST = {"pcd": "primary", "metabalance": "main"}
ROWS = torch.tensor([[1.0, 0.0, 0.5], [0.0, 9.0, 1.0], [2.0, -1.0, 3.0]])
NAMES = ["a", "b", "c"]


@pytest.mark.parametrize("make", MAKE.values(), ids=[cls.__name__ for cls in MAKE])
def test_every_task_has_a_role(make):
    assert make().role == "main"
    assert make(role="auxiliary").role == "auxiliary"
    with pytest.raises(ValueError, match=r"`role` must be one of 'main', 'auxiliary', got 'helper'"):
        make(role="helper")


def test_labels_have_the_role_of_the_task_they_are_of():
    labels = MAKE[MultiLabelTask](role="auxiliary").per_label("y")
    assert [task.role for task in labels.values()] == ["auxiliary"] * 2


def module(balancer, *roles: str) -> MultiTaskModule:
    tasks = {name: MAKE[RegressionTask](role=role) for name, role in zip(NAMES, roles, strict=True)}
    return MultiTaskModule(nn.Linear(8, 4), tasks, balancer)


def update(balancer: Balancer) -> list[float]:
    return balancer.combine(ROWS, torch.ones(3)).tolist()


def test_the_registry_knows_the_main_tasks():
    tasks = {name: MAKE[Task](role=role) for name, role in zip(NAMES, ("auxiliary", "main", "main"), strict=True)}
    assert TaskRegistry(tasks).main == ("b", "c")


@pytest.mark.parametrize("key", FIRST)
def test_the_first_main_task_comes_first(key):
    update_of = {first: update(load(key, 3, **{FIRST[key]: first})) for first in range(3)}
    assert update_of[0] != update_of[1] != update_of[2]
    assert update(module(key, "main", "main", "main").balancer) == update_of[0]
    assert update(module(key, "auxiliary", "main", "main").balancer) == update_of[1]
    assert update(module(key, "auxiliary", "auxiliary", "main").balancer) == update_of[2]
    # Nobody is helped: as if nothing had been said.
    assert update(module(key, "auxiliary", "auxiliary", "auxiliary").balancer) == update_of[0]
    assert update(load(key, 3)) == update_of[0]


@pytest.mark.parametrize("key", FIRST)
@pytest.mark.parametrize("first", ["c", 2])
def test_an_explicit_choice_among_the_main_tasks_is_kept(key, first):
    spec = {"class_path": key, "init_args": {FIRST[key]: first}}
    assert update(module(spec, "auxiliary", "main", "main").balancer) == update(load(key, 3, **{FIRST[key]: 2}))


@pytest.mark.parametrize("key", FIRST)
@pytest.mark.parametrize("first", ["a", 0])
def test_an_explicit_choice_of_an_auxiliary_task_is_refused(key, first):
    spec = {"class_path": key, "init_args": {FIRST[key]: first}}
    with pytest.raises(ValueError, match=rf"`{FIRST[key]}` must be a main task \('b', 'c'\), got 'a', an auxil"):
        module(spec, "auxiliary", "main", "main")


@pytest.mark.parametrize("key", FIRST)
def test_an_unknown_name_is_refused_before_the_first_batch(key):
    with pytest.raises(ValueError, match=rf"`{FIRST[key]}` must be a task's name"):
        module({"class_path": key, "init_args": {FIRST[key]: "d"}}, "main", "main", "main")


def test_roles_reach_a_balancer_inside_another():
    inner = {"class_path": "pcd", "init_args": {"primary": "c"}}
    plain = update(resolve({"class_path": "chain", "init_args": {"first": "fixed", "then": inner}}, NAMES))
    told = module({"class_path": "chain", "init_args": {"first": "fixed", "then": "pcd"}}, *["auxiliary"] * 2, "main")
    assert update(told.balancer) == plain


def test_a_module_without_task_objects_names_its_main_tasks():
    class Mine(Balanced, nn.Module):
        pass

    mine = Mine(tasks=NAMES, balancer="pcd", main_tasks=["c"])
    assert update(mine.balancer) == update(load("pcd", 3, primary=2))
    with pytest.raises(ValueError, match=r"^PCD: `main` must name tasks among"):
        Mine(tasks=NAMES, balancer="pcd", main_tasks=["x"])


def test_new_names_forget_the_roles():
    balancer = resolve("pcd", NAMES, ["c"])
    balancer.bind(NAMES)
    assert update(balancer) == update(load("pcd", 3))
