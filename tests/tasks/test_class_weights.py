"""Class weights with missing labels, against torch's own weighted means."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mtl import MultiTaskModule
from lightning_mtl.tasks import ClassificationTask, MultiLabelTask, RegressionTask, Task
from tests.nets import WIDTH, Samples, mlp, samples, sgd, trainer

C, IGNORED = 4, -100
WEIGHTS = [0.1, 2.0, 0.0, 5.0]
EACH = {"weight": torch.tensor(WEIGHTS, dtype=torch.float64), "reduction": "none"}

TASKS = {
    "classification": lambda **o: ClassificationTask(nn.Identity(), C, class_weights=WEIGHTS, **o),
    "a tensor": lambda **o: ClassificationTask(nn.Identity(), C, class_weights=EACH["weight"], **o),
    "smoothed": lambda **o: ClassificationTask(nn.Identity(), C, class_weights=WEIGHTS, label_smoothing=0.2, **o),
    "own module": lambda **o: Task(nn.Identity(), nn.CrossEntropyLoss(**EACH), missing=IGNORED, **o),
    "own function": lambda **o: Task(nn.Identity(), partial(F.cross_entropy, **EACH), missing=IGNORED, **o),
}


def reference(name: str, output: Tensor, target: Tensor) -> Tensor:
    weights, smoothing = EACH["weight"], 0.2 if name == "smoothed" else 0.0
    return F.cross_entropy(output, target, weights, ignore_index=IGNORED, label_smoothing=smoothing)


def data(shape: tuple[int, ...], share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and classes, this share of which is missing."""
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn((shape[0], C, *shape[1:]), generator=generator, dtype=torch.float64)
    target = torch.randint(C, shape, generator=generator)
    return output, target.masked_fill(torch.rand(shape, generator=generator) < share, IGNORED)


def measured(task: Task, output: Tensor, target: Tensor, *mask: Tensor) -> tuple[Tensor, Tensor, Any]:
    output = output.clone().requires_grad_()
    loss, count = task.mean_loss(output, target, "a", *mask)
    return loss.detach(), torch.autograd.grad(loss, output)[0], count


@pytest.mark.parametrize("shape", [(9,), (5, 6), (2, 3, 4)])
@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("name", TASKS)
def test_the_loss_is_torchs_weighted_mean(name, share, shape):
    output, target = data(shape, share)
    loss, grad, count = measured(TASKS[name](), output, target)
    leaf = output.clone().requires_grad_()
    wanted = reference(name, leaf, target)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted, leaf)[0], rtol=1e-12, atol=1e-14)
    assert count == pytest.approx(sum(WEIGHTS[c] for c in target.flatten().tolist() if c != IGNORED))
    assert isinstance(count, float)


@pytest.mark.parametrize("name", TASKS)
def test_a_mask_is_as_good_as_the_ignored_class(name):
    output, target = data((9,), 0.0)
    mask = torch.tensor([True, False, True, True, False, True, True, True, False])
    loss, grad, count = measured(TASKS[name](mask="m"), output, target, mask)
    same, same_grad, same_count = measured(TASKS[name](), output, target.masked_fill(~mask, IGNORED))
    torch.testing.assert_close((loss, grad, count), (same, same_grad, same_count))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("classes", [[2, 2, 2], [IGNORED] * 3, [2, IGNORED, 2]])
def test_where_nothing_has_a_weight_the_task_is_absent(name, classes):
    """torch's mean is NaN there."""
    output, _ = data((3,), 0.0)
    loss, grad, count = measured(TASKS[name](), output, torch.tensor(classes))
    assert loss.item() == count == 0
    assert not grad.any()


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("cuts", [(4,), (1, 2), (3, 8)])
def test_the_means_of_parts_make_the_mean_of_all(name, cuts):
    """As two processes, or the batches of an evaluation, make it from losses and counts."""
    output, target = data((9,), 0.3)
    target[target == 2] = 1  # smoothing puts a loss on a class of weight 0, and a part of that alone is absent
    whole, grad, count = measured(TASKS[name](), output, target)
    parts = [measured(TASKS[name](), output[i:j], target[i:j]) for i, j in itertools.pairwise((0, *cuts, len(target)))]
    total = sum(part[2] for part in parts)
    assert total == pytest.approx(count)
    torch.testing.assert_close(sum(part[0] * part[2] for part in parts) / total, whole)
    torch.testing.assert_close(torch.cat([part[1] * part[2] for part in parts]) / total, grad)


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_does_not_round_the_weights(autocast):
    output, target = data((64,), 0.2)
    low = output.bfloat16().requires_grad_()
    task = ClassificationTask(nn.Identity(), C, class_weights=WEIGHTS)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss, _ = task.mean_loss(low, target, "a")
    assert loss.dtype == torch.float32
    wanted = reference("classification", low.detach().double(), target)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)


def test_equal_weights_are_none():
    output, target = data((9,), 0.3)
    plain, weighted = (ClassificationTask(nn.Identity(), C, class_weights=w) for w in (None, [3.0] * C))
    for a, b in zip(measured(plain, output, target)[:2], measured(weighted, output, target)[:2], strict=True):
        torch.testing.assert_close(a, b)


def test_weights_are_no_state():
    task = ClassificationTask(nn.Linear(2, C), C, class_weights=WEIGHTS)
    assert list(task.state_dict()) == ["head.weight", "head.bias"]
    assert copy.deepcopy(task).class_weights == tuple(WEIGHTS)
    with torch.inference_mode():
        task.mean_loss(task(torch.ones(1, 2)), torch.tensor([1]), "a")
    loss, _ = task.mean_loss(task(torch.ones(1, 2)), torch.tensor([1]), "a")
    loss.backward()


@pytest.mark.parametrize("weights", [[1.0, 2.0], [1.0] * 5, [-1, 1, 1, 1], [0] * 4, [math.inf, 1, 1, 1], 3.0, "abcd"])
def test_other_weights_are_refused(weights):
    with pytest.raises(ValueError, match=r"^ClassificationTask: `class_weights` must be 4 finite numbers >= 0, not"):
        ClassificationTask(nn.Identity(), C, class_weights=weights)


def test_metrics_do_not_look_at_them():
    task = ClassificationTask(nn.Identity(), 2, class_weights=[1.0, 9.0])
    metrics = task.update_metrics("val", torch.eye(2)[[0, 0, 0]], torch.tensor([0, 1, 1]), "a")
    assert metrics["accuracy"].compute().item() == pytest.approx(1 / 3)


def weighted(balancer: str = "fixed") -> MultiTaskModule:
    torch.manual_seed(0)
    kind = ClassificationTask(nn.Linear(WIDTH, 3), 3, class_weights=[0.01, 0.2, 3.0])
    return MultiTaskModule(mlp(), {"kind": kind, "size": RegressionTask(nn.Linear(WIDTH, 1))}, balancer, optimizer=sgd)


def gappy(num: int) -> tuple[Tensor, dict[str, Tensor]]:
    x, targets = samples(num)
    targets["kind"][::3] = IGNORED
    return x, {name: targets[name] for name in ("kind", "size")}


@pytest.mark.parametrize("size", [5, 16])
def test_an_evaluation_is_one_weighted_mean(size):
    model, (x, targets) = weighted(), gappy(32)
    (logged,) = trainer().validate(model, DataLoader(Samples(x, targets), batch_size=size), verbose=False)
    with torch.no_grad():
        kind = F.cross_entropy(model(x)["kind"], targets["kind"], torch.tensor([0.01, 0.2, 3.0])).item()
        mse = F.mse_loss(model(x)["size"].squeeze(1), targets["size"]).item()
    assert logged["val/loss/kind"] == pytest.approx(kind, rel=1e-5)
    assert logged["val/loss"] == pytest.approx(kind + mse, rel=1e-5)


@pytest.mark.parametrize("balancer", ["fixed", "pcgrad"])
def test_training_has_torchs_gradient(balancer):
    model, (x, targets) = weighted(balancer), gappy(16)
    model.training_step((x, targets), 0).backward()
    head = model.tasks["kind"].head
    wanted = F.cross_entropy(head(model.encoder(x)), targets["kind"], torch.tensor([0.01, 0.2, 3.0]))
    torch.testing.assert_close(head.weight.grad, torch.autograd.grad(wanted, head.weight)[0])


# --- Labels that are rarely a yes -------------------------------------------------------------------------------------

POSITIVE = [3.0, 0.5, 1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pos_weight_is_torchs(dtype):
    torch.manual_seed(0)
    output, target = torch.randn(6, 3).to(dtype), torch.randint(2, (6, 3)).float()
    there = torch.rand(6, 3) < 0.7
    task = MultiLabelTask(nn.Identity(), 3, pos_weight=POSITIVE)
    loss, count = task.mean_loss(output, target.masked_fill(~there, math.nan), "a")
    each = F.binary_cross_entropy_with_logits(
        output.double(), target.double(), pos_weight=torch.tensor(POSITIVE).double(), reduction="none"
    )
    torch.testing.assert_close(loss.double(), each[there].mean(), rtol=1e-6, atol=0)
    assert count == int(there.sum())
    for column, (name, label) in enumerate(task.per_label("y").items()):
        loss, _ = label.mean_loss(output[:, column : column + 1], target[:, column : column + 1], name)
        torch.testing.assert_close(loss.double(), each[:, column].mean(), rtol=1e-6, atol=0)


def test_pos_weight_of_one_label_without_a_column():
    task = MultiLabelTask(nn.Identity(), 1, pos_weight=torch.tensor([4.0]))
    output, target = torch.randn(5, 1), torch.ones(5)
    wanted = F.binary_cross_entropy_with_logits(output[:, 0], target, pos_weight=torch.tensor(4.0))
    torch.testing.assert_close(task.mean_loss(output, target, "a")[0], wanted)


@pytest.mark.parametrize("weights", [[1.0, 2.0], 2.0, [1, 2, math.nan], [1, 2, -3]])
def test_other_pos_weights_are_refused(weights):
    with pytest.raises(ValueError, match=r"^MultiLabelTask: `pos_weight` must be 3 finite numbers >= 0, got"):
        MultiLabelTask(nn.Identity(), 3, pos_weight=weights)
