"""A head whose labels correct each other."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_mtl import MultiTaskModule
from lightning_mtl.tasks import CorNet, MultiLabelTask
from tests.nets import WIDTH, mlp, sgd

LABELS = ["smiles", "hat", "young"]


def used(num_blocks: int = 1) -> CorNet:
    """A CorNet whose blocks have left their zeros."""
    head = CorNet(nn.Linear(WIDTH, 3), 3, width=5, num_blocks=num_blocks)
    for parameter in head.blocks.parameters():
        nn.init.normal_(parameter)
    return head


def test_it_starts_as_the_head_alone_and_does_not_stay_there():
    inner, features = nn.Linear(WIDTH, 3), torch.randn(7, WIDTH)
    head = CorNet(inner, 3, num_blocks=2)
    assert torch.equal(head(features), inner(features))
    F.binary_cross_entropy_with_logits(head(features), torch.ones(7, 3)).backward()
    assert inner.weight.grad.any()
    assert all(block[2].weight.grad.any() for block in head.blocks)
    assert all(parameter.grad is not None for parameter in head.parameters())  # DDP waits for every one


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_it_is_the_formula(num_blocks):
    head, features = used(num_blocks), torch.randn(7, WIDTH)
    wanted = head.head(features)
    for block in head.blocks:
        first, last = block[0], block[2]
        between = wanted.sigmoid() @ first.weight.T + first.bias
        between = torch.where(between > 0, between, between.exp() - 1)
        wanted = wanted + between @ last.weight.T + last.bias
    torch.testing.assert_close(head(features), wanted)


def test_a_label_moves_the_others_and_a_missing_one_is_trained_by_them():
    task, features = MultiLabelTask(used(), LABELS), torch.randn(9, WIDTH)
    target = torch.randint(2, (9, 3)).float()
    target[:, 1] = math.nan
    loss, count = task.mean_loss(task(features), target, "marks")
    wanted = F.binary_cross_entropy_with_logits(task(features)[:, [0, 2]], target[:, [0, 2]])
    torch.testing.assert_close(loss, wanted)
    assert int(count) == 18
    loss.backward()
    gradient = task.head.head.weight.grad
    assert gradient.isfinite().all()
    assert gradient[1].any()  # through the other two, which see its probability
    plain = MultiLabelTask(nn.Linear(WIDTH, 3), LABELS)
    plain.mean_loss(plain(features), target, "marks")[0].backward()
    assert not plain.head.weight.grad[1].any()


def test_missing_labels_alone_give_zero():
    task = MultiLabelTask(used(), LABELS)
    loss, count = task.mean_loss(task(torch.randn(4, WIDTH)), torch.full((4, 3), math.nan), "marks")
    loss.backward()
    assert loss.item() == int(count) == 0
    assert not any(parameter.grad.any() for parameter in task.parameters())


def test_each_label_can_be_a_task():
    head = used()
    tasks = MultiLabelTask(head, LABELS).per_label("y")
    model = MultiTaskModule(mlp(), tasks, "pcgrad", optimizer=sgd)
    x = torch.randn(12, 8)
    target = (x[:, :3] > 0).float()
    model.training_step((x, {"y": target}), 0).backward()
    losses = F.binary_cross_entropy_with_logits(head(model.encoder(x)), target, reduction="none").mean(0)
    at = [*model.encoder.parameters(), *head.parameters()]
    rows = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(loss, at, retain_graph=True)]) for loss in losses]
    ).double()
    torch.testing.assert_close(model.last_balance.gram, rows @ rows.T, rtol=1e-5, atol=1e-8)


def test_it_sees_a_label_in_the_others():
    """The third label is the exclusive-or of two that a linear head reads off the features."""
    x = torch.randn(400, 2)
    first, second = (x > 0).float().unbind(1)
    target = torch.stack([first, second, (first != second).float()], 1)
    right = {}
    for name, head in {"plain": nn.Linear(2, 3), "CorNet": CorNet(nn.Linear(2, 3), 3)}.items():
        optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(head(x), target).backward()
            optimizer.step()
        right[name] = ((head(x) > 0) == target.bool()).float().mean(0)
    assert right["plain"][2] < 0.7
    assert right["CorNet"][2] > 0.9
    assert all(found[:2].min() > 0.95 for found in right.values())


@pytest.mark.parametrize(
    "arguments, kind, text",
    [
        ((len, 3), TypeError, r"CorNet: `head` must be an nn.Module, got builtin_function_or_method"),
        ((nn.Identity(), 0), ValueError, r"CorNet: `num_labels` must be an integer >= 1, got 0"),
        ((nn.Identity(), True), ValueError, r"CorNet: `num_labels` must be an integer >= 1, got True"),
        ((nn.Identity(), 3, 0), ValueError, r"CorNet: `width` must be an integer >= 1, got 0"),
        ((nn.Identity(), 3, 4, 1.5), ValueError, r"CorNet: `num_blocks` must be an integer >= 1, got 1.5"),
    ],
)
def test_a_wrong_argument(arguments, kind, text):
    with pytest.raises(kind, match=text):
        CorNet(*arguments)


def test_a_task_of_another_number_of_labels_is_refused_when_built():
    with pytest.raises(ValueError, match="MultiLabelTask: `head` must have as many labels as the task, 2, got 3"):
        MultiLabelTask(used(), LABELS[:2])


@pytest.mark.parametrize("output", [torch.ones(5, 4), torch.ones(5), torch.ones(5, 2, 3), "logits"])
def test_a_head_of_another_shape(output):
    class Fixed(nn.Module):
        def forward(self, features):
            return output

    with pytest.raises(ValueError, match=r"CorNet: `head` must return logits of shape \[B, K\] with K = 3, got"):
        CorNet(Fixed(), 3)(torch.ones(5, 2))
