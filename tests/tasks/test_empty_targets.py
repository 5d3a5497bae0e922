"""A target of length 0 (a detector that found no instance): the task is absent, as if its labels were missing."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn

from lightning_mtl import MultiTaskModule
from lightning_mtl.tasks import ClassificationTask, MultiLabelTask, ReconstructionTask, RegressionTask, Task
from tests.nets import WIDTH, Instances, samples, sgd, trainer


def scalar_classes(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def breaks_on_nothing(output: Tensor, target: Tensor) -> Tensor:
    """A loss that cannot be asked about no entry at all."""
    return (output.squeeze(1) - target).abs().max()


EACH = {"reduction": "none"}
# Task, width of its head's output, and the target of that many samples.
CASES: dict[str, tuple[Any, int, Any]] = {
    "classification": (lambda head, **o: ClassificationTask(head, 3, **o), 3, lambda n: torch.zeros(n).long()),
    "classification with weights": (
        lambda head, **o: ClassificationTask(head, 3, class_weights=[1, 2, 3], **o),
        3,
        lambda n: torch.zeros(n).long(),
    ),
    "classes, from an empty list": (lambda head, **o: ClassificationTask(head, 3, **o), 3, lambda n: torch.zeros(n)),
    "regression": (RegressionTask, 1, lambda n: torch.zeros(n)),
    "regression of several": (RegressionTask, 4, lambda n: torch.zeros(n, 4)),
    "multi-label": (lambda head, **o: MultiLabelTask(head, 2, **o), 2, lambda n: torch.ones(n, 2)),
    "multi-label with weights": (
        lambda head, **o: MultiLabelTask(head, 2, pos_weight=[1, 5], **o),
        2,
        lambda n: torch.ones(n, 2),
    ),
    "reconstruction": (partial(ReconstructionTask, target="y"), 5, lambda n: torch.zeros(n, 5)),
    "reconstruction, mean": (partial(ReconstructionTask, reduction="mean", target="y"), 5, lambda n: torch.zeros(n, 5)),
    "own, a mean": (partial(Task, loss=nn.MSELoss()), 1, lambda n: torch.zeros(n, 1)),
    "own, a sum": (partial(Task, loss=nn.MSELoss(reduction="sum")), 1, lambda n: torch.zeros(n, 1)),
    "own, each": (partial(Task, loss=partial(F.mse_loss, **EACH)), 1, lambda n: torch.zeros(n, 1)),
    "own, gaps": (partial(Task, loss=partial(F.mse_loss, **EACH), missing="nan"), 1, lambda n: torch.zeros(n)),
    "own, classes": (partial(Task, loss=scalar_classes), 3, lambda n: torch.zeros(n).long()),
    "own, that breaks on nothing": (partial(Task, loss=breaks_on_nothing), 1, lambda n: torch.zeros(n)),
    "own, nested": (
        partial(Task, loss=lambda out, y: (out - y["box"]).square().mean()),
        4,
        lambda n: {"box": torch.zeros(n, 4), "label": torch.zeros(n)},
    ),
}
MASKED = [name for name in CASES if name not in ("own, a mean", "own, a sum", "own, classes", "own, nested")]
MASKED.remove("own, that breaks on nothing")  # a scalar, as are the four above


def absent(task: Task, features: Tensor, target: Any, mask: Tensor | None = None) -> None:
    """Loss exactly 0, with a graph, and a gradient of zeros for all that the head and the features have."""
    loss, count = task.mean_loss(task(features), target, "a", mask)
    assert loss.shape == ()
    assert loss.item() == 0.0
    assert count == 0
    inputs = [features, *task.head.parameters()]
    assert all(g is not None and not g.any() for g in torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("name", CASES)
def test_the_task_is_absent(name):
    make, width, target = CASES[name]
    absent(make(nn.Linear(WIDTH, width)), torch.zeros(0, WIDTH, requires_grad=True), target(0))


@pytest.mark.parametrize("name", MASKED)
def test_the_task_is_absent_with_a_mask(name):
    make, width, target = CASES[name]
    task = make(nn.Linear(WIDTH, width), mask="m")
    absent(task, torch.zeros(0, WIDTH, requires_grad=True), target(0), torch.ones(0, dtype=torch.bool))


def test_each_label_of_a_head_is_absent():
    for name, task in MultiLabelTask(nn.Linear(WIDTH, 3), 3, mask="m").per_label("y").items():
        for empty in (torch.zeros(0, 3), torch.tensor([])):
            target, mask = task.pick({"y": empty, "m": torch.ones(0, dtype=torch.bool)}, None, name)
            absent(task, torch.zeros(0, WIDTH, requires_grad=True), target, mask)


def test_so_is_one_without_a_column():
    absent(RegressionTask(nn.Identity()), torch.zeros(4, 0, requires_grad=True), torch.zeros(4, 0))


def test_an_output_that_overflows_does_not_make_it_nan():
    """Whatever stands in the output: no label, so nothing is compared, and nothing comes back."""
    output = torch.full((2, 1), math.inf, requires_grad=True)
    loss, count = RegressionTask(nn.Identity()).mean_loss(output, torch.full((2,), math.nan), "a")
    assert loss.item() == count == 0
    assert not torch.autograd.grad(loss, output)[0].any()


def test_a_loss_of_outputs_without_any_target_counts_if_it_is_one():
    """A detector's background: something is predicted where nothing is to be found."""
    output = torch.ones(3, 1, requires_grad=True)
    background = Task(nn.Identity(), lambda out, boxes: out.square().sum() + boxes.sum())
    loss, count = background.mean_loss(output, torch.zeros(0, 4), "a")
    assert loss.item() == 3.0
    assert count == 3
    assert torch.autograd.grad(loss, output)[0].any()
    matched = Task(nn.Identity(), lambda out, boxes: (out[: len(boxes)] - boxes).square().mean())
    loss, count = matched.mean_loss(output, torch.zeros(0, 1), "a")
    assert loss.item() == count == 0
    assert not torch.autograd.grad(loss, output)[0].any()


@pytest.mark.parametrize("name", CASES)
def test_metrics_do_not_see_it(name):
    make, width, target = CASES[name]
    task = make(nn.Linear(WIDTH, width))
    for metric in task.update_metrics("val", task(torch.zeros(0, WIDTH)), target(0), "a").values():
        assert metric._update_count == 0


def test_an_output_without_its_target_is_refused_as_before():
    with pytest.raises(ValueError, match=r"target of 'a'` must have the shape of the output, \[2, 1\], got \[0\]"):
        RegressionTask(nn.Identity()).mean_loss(torch.zeros(2, 1), torch.zeros(0), "a")


class Of(nn.Module):
    def __init__(self, which: str, head: nn.Module) -> None:
        super().__init__()
        self.which, self.head = which, head

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.head(features[self.which])


def detector(balancer: Any, **options: Any) -> MultiTaskModule:
    torch.manual_seed(0)
    tasks = {
        "depth": RegressionTask(Of("images", nn.Linear(WIDTH, 1))),
        "kind": ClassificationTask(Of("instances", nn.Linear(WIDTH, 3)), 3),
        "size": Task(Of("instances", nn.Linear(WIDTH, 1)), nn.MSELoss()),
    }
    return MultiTaskModule(Instances(), tasks, balancer, optimizer=sgd, **options)


def found(*instances: int) -> list[Any]:
    """A batch of four images for each number of instances."""
    x, targets = samples(64)
    return [
        (
            {"images": x[4 * i : 4 * i + 4], "instances": x[:n]},
            {
                "depth": targets["size"][4 * i : 4 * i + 4],
                "kind": targets["kind"][:n],
                "size": targets["size"][:n, None],
            },
        )
        for i, n in enumerate(instances)
    ]


@pytest.mark.parametrize("balancer", ["fixed", "uncertainty", "pcgrad", "gradnorm", "mgda", "modo"])
def test_a_run_goes_on_without_instances(balancer):
    model = detector(balancer)
    stop = EarlyStopping("val/loss", patience=5, check_finite=True)
    runner = trainer(max_epochs=2, callbacks=[stop], log_every_n_steps=1, num_sanity_val_steps=2)
    data = torch.utils.data.DataLoader(found(3, 0, 2), batch_size=None)
    runner.fit(model, data, torch.utils.data.DataLoader(found(0, 2, 0), batch_size=None))
    assert runner.current_epoch == 2
    logged = {key: value.item() for key, value in runner.callback_metrics.items()}
    assert all(math.isfinite(value) for key, value in logged.items() if not key.startswith("balance/"))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("balancer", ["fixed", "pcgrad"])
def test_gradients_without_instances_are_those_of_the_other_task(balancer):
    model = detector(balancer)
    (batch,) = found(0)
    loss = model.training_step(batch, 0)
    loss.backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.encoder.parameters()]
    plain = F.mse_loss(model.tasks["depth"](model.encoder(batch[0])).squeeze(1), batch[1]["depth"])
    assert loss.item() == pytest.approx(plain.item())
    for grad, wanted in zip(grads, torch.autograd.grad(plain, list(model.encoder.parameters())), strict=True):
        torch.testing.assert_close(grad, wanted)


def test_an_evaluation_is_over_the_instances_that_there_are():
    model, batches = detector("fixed"), found(2, 0, 5)
    (logged,) = trainer().validate(model, torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)
    with torch.no_grad():
        outputs = [model(x) for x, _ in batches]
    for name, loss in {"kind": F.cross_entropy, "size": F.mse_loss}.items():
        output, target = torch.cat([out[name] for out in outputs]), torch.cat([y[name] for _, y in batches])
        assert logged[f"val/loss/{name}"] == pytest.approx(loss(output, target).item(), rel=1e-5)
    assert logged["val/loss"] == pytest.approx(sum(logged[f"val/loss/{name}"] for name in model.task_names), rel=1e-5)
