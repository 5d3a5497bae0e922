"""One task per label, from one head."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.classification import BinaryRecall

from lightning_mtl import MultiTaskModule
from lightning_mtl.tasks import MultiLabelTask, RegressionTask
from tests.nets import WIDTH, Samples, mlp, sgd, trainer

LABELS = ["smiles", "hat", "young"]
NAN = math.nan


def joint(**options) -> MultiLabelTask:
    torch.manual_seed(0)
    return MultiLabelTask(nn.Linear(WIDTH, 3), LABELS, **options)


def batch(num: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(num, 8)
    return x, (x[:, :3] + 0.3 * torch.randn(num, 3) > 0).float()


def split_loss(tasks, features, target, mask=None) -> dict[str, torch.Tensor]:
    losses = {}
    for name, task in tasks.items():
        picked = task.pick({"y": target, "m": mask}, features, name)
        losses[name] = task.mean_loss(task(features), picked[0], name, picked[1])[0]
    return losses


def test_names_and_order():
    assert list(joint().per_label("y")) == LABELS
    assert list(MultiLabelTask(nn.Linear(WIDTH, 2), 2).per_label("y")) == ["label0", "label1"]


def test_each_loss_is_that_of_its_column():
    task, features, (_, target) = joint(), torch.randn(12, WIDTH), batch()
    logits = task.head(features)
    for column, (name, loss) in enumerate(split_loss(task.per_label("y"), features, target).items()):
        wanted = F.binary_cross_entropy_with_logits(logits[:, column], target[:, column])
        torch.testing.assert_close(loss, wanted, msg=name)


@pytest.mark.parametrize("missing", ["nan", "mask per label", "mask per sample"])
def test_each_loss_is_the_mean_over_the_labels_of_its_column(missing):
    task = joint(mask="m" if "mask" in missing else None)
    features, (_, target) = torch.randn(12, WIDTH), batch()
    there = torch.rand(12, 3) < 0.6
    if missing == "mask per sample":
        there = there[:, :1].expand(12, 3)
    mask = {"nan": None, "mask per label": there, "mask per sample": there[:, 0]}[missing]
    marked = target.masked_fill(~there, NAN) if mask is None else target
    logits = task.head(features)
    for column, loss in enumerate(split_loss(task.per_label("y"), features, marked, mask).values()):
        rows = there[:, column]
        wanted = F.binary_cross_entropy_with_logits(logits[rows, column], target[rows, column])
        torch.testing.assert_close(loss, wanted)


def test_metrics_of_the_joint_task_are_kept():
    tasks = joint(metrics={"recall": BinaryRecall()}).per_label("y")
    assert {name: task.metric_names for name, task in tasks.items()} == {name: ["recall"] for name in LABELS}
    for task in tasks.values():
        assert task.metric_names == ["recall"]
    hat, young = tasks["hat"], tasks["young"]
    hat.update_metrics("val", torch.tensor([[5.0]]), torch.tensor([[1.0]]), "hat")
    young.update_metrics("val", torch.tensor([[-5.0]]), torch.tensor([[1.0]]), "young")
    assert [task._metrics_on("val")["recall"].compute().item() for task in (hat, young)] == [1.0, 0.0]


@pytest.mark.parametrize("level", ["parameters", "features"])
def test_the_head_belongs_to_the_rows(level):
    """At level parameters the gram counts the head's gradients too; at level features it cannot."""
    tasks = joint().per_label("y")
    torch.manual_seed(1)
    model = MultiTaskModule(mlp(), tasks, "pcgrad", level, optimizer=sgd)
    x, target = batch()
    model.training_step((x, {"y": target}), 0).backward()
    features = model.encoder(x)
    losses = F.binary_cross_entropy_with_logits(tasks["hat"].head(features), target, reduction="none").mean(0)
    at = [*model.encoder.parameters(), *tasks["hat"].head.parameters()] if level == "parameters" else [features]
    rows = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(loss, at, retain_graph=True)]) for loss in losses]
    ).double()
    torch.testing.assert_close(model.last_balance.gram, rows @ rows.T, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("balancer", ["fixed", "uncertainty", "pcgrad", "gradnorm"])
def test_it_trains_beside_another_task(balancer):
    tasks = joint().per_label("y") | {"depth": RegressionTask(nn.Linear(WIDTH, 1))}
    model = MultiTaskModule(mlp(), tasks, balancer, optimizer=sgd)
    x, target = batch(32)
    data = torch.utils.data.DataLoader(Samples(x, {"y": target, "depth": x[:, 4]}), batch_size=8)
    runner = trainer(max_epochs=2, num_sanity_val_steps=0)
    runner.fit(model, data, data)
    logged = runner.callback_metrics
    assert {f"val/{name}/f1" for name in LABELS} < logged.keys()
    assert all(value.isfinite() for value in logged.values())
