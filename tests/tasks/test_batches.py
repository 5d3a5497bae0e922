"""The forms of a batch, through a real Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mtl import MultiTaskModule
from lightning_mtl.tasks import ReconstructionTask, RegressionTask
from tests.nets import WIDTH, Pyramid, PyramidHead, Samples, mlp, module, network, samples, sgd, trainer

NAMES = ("kind", "size", "shape")
SIZES = {"kind": 32, "size": 24, "shape": 12}


class Listed:
    """A loader over batches that are already made."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


def form(name: str, num: int = 32, size: int = 8) -> Any:
    """The same samples in each form."""
    x, targets = samples(num)
    if name == "tuple":
        return DataLoader(Samples(x, targets), batch_size=size)
    if name == "list":
        return Listed(
            [[x[i : i + size], {k: t[i : i + size] for k, t in targets.items()}] for i in range(0, num, size)]
        )
    if name == "flat":
        rows = [{"input": x[i]} | {k: t[i] for k, t in targets.items()} for i in range(num)]
        return DataLoader(rows, batch_size=size)
    return {k: DataLoader(TensorDataset(x, t), batch_size=size) for k, t in targets.items()}


def fitted(balancer: Any, data: Any, **options: Any) -> Tensor:
    model = module(balancer, **options)
    trainer(max_epochs=2).fit(model, data)
    return network(model)


@pytest.mark.parametrize("balancer", ["fixed", "uncertainty", "pcgrad", "gradnorm"])
@pytest.mark.parametrize("name", ["list", "flat", "a loader per task"])
def test_all_forms_train_alike(name, balancer):
    torch.testing.assert_close(fitted(balancer, form(name)), fitted(balancer, form("tuple")), rtol=0, atol=1e-6)


def test_the_input_may_stand_under_another_key():
    x, targets = samples(8)
    data = Listed([{"image": x} | targets])
    same = fitted("pcgrad", data, input_key="image")
    assert torch.equal(same, fitted("pcgrad", Listed([(x, targets)])))


def test_targets_that_no_task_uses_may_be_allowed():
    x, targets = samples(8)
    more = fitted("fixed", Listed([(x, targets | {"more": x})]), strict_targets=False)
    assert torch.equal(more, fitted("fixed", Listed([(x, targets)])))


def test_two_tasks_may_read_one_target():
    torch.manual_seed(0)
    tasks = {
        name: RegressionTask(nn.Linear(WIDTH, 1), loss, target="y") for name, loss in {"a": "l1", "b": "mse"}.items()
    }
    model = MultiTaskModule(mlp(), tasks, optimizer=sgd)
    x, y = samples(8)[0], torch.randn(8)
    z = model.encoder(x)
    wanted = F.l1_loss(model.tasks["a"](z).squeeze(1), y) + F.mse_loss(model.tasks["b"](z).squeeze(1), y)
    torch.testing.assert_close(model.training_step((x, {"y": y}), 0), wanted)


def test_a_loader_per_task_may_bring_its_target_in_a_mapping():
    x, targets = samples(8)
    torch.manual_seed(0)
    tasks = {"a": RegressionTask(nn.Linear(WIDTH, 1), target="y", mask="m"), "b": RegressionTask(nn.Linear(WIDTH, 1))}
    model = MultiTaskModule(mlp(), tasks, optimizer=sgd)
    mask = torch.arange(8) < 3
    batch = {"a": (x, {"y": targets["size"], "m": mask}), "b": (-x, targets["size"])}
    wanted = F.mse_loss(model.tasks["a"](model.encoder(x[:3])).squeeze(1), targets["size"][:3])
    wanted = wanted + F.mse_loss(model.tasks["b"](model.encoder(-x)).squeeze(1), targets["size"])
    torch.testing.assert_close(model.training_step(batch, 0), wanted)


def test_a_reconstruction_needs_no_target():
    torch.manual_seed(0)
    tasks = {"size": RegressionTask(nn.Linear(WIDTH, 1)), "back": ReconstructionTask(nn.Linear(WIDTH, 8))}
    model = MultiTaskModule(mlp(), tasks, "pcgrad", optimizer=sgd)
    x, targets = samples(8)
    z = model.encoder(x)
    wanted = F.mse_loss(model.tasks["size"](z).squeeze(1), targets["size"])
    wanted = wanted + (model.tasks["back"](z) - x).square().sum() / 8
    torch.testing.assert_close(model.training_step((x, {"size": targets["size"]}), 0), wanted)


def test_inputs_and_features_may_be_nested():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pyramid = Pyramid()

        def forward(self, inputs: dict[str, Any]) -> Any:
            return self.pyramid(torch.cat([inputs["left"], *inputs["right"]], dim=1))

    x, targets = samples(8)
    torch.manual_seed(0)
    model = MultiTaskModule(Two(), {"size": RegressionTask(PyramidHead(1))}, optimizer=sgd)
    wanted = F.mse_loss(model.tasks["size"](model.encoder.pyramid(x)).squeeze(1), targets["size"])
    batch = {"left": x[:, :3], "right": (x[:, 3:5], x[:, 5:])}, {"size": targets["size"]}
    torch.testing.assert_close(model.training_step(batch, 0), wanted)


# --- One loader per task ---------------------------------------------------------------------------------------------


def own(size: int = 8) -> dict[str, DataLoader]:
    """A loader per task, of different lengths: 4, 3 and 2 batches, the last of which is not full."""
    return {
        name: DataLoader(TensorDataset(*(t[: SIZES[name]] for t in (x, targets[name]))), batch_size=size)
        for x, targets in [samples(32)]
        for name in NAMES
    }


# Which batch of its own each task gets in each step; a dash is none.
TURNS = {
    "min_size": {"kind": "01", "size": "01", "shape": "01"},
    "max_size": {"kind": "0123", "size": "012-", "shape": "01--"},
    "max_size_cycle": {"kind": "0123", "size": "0120", "shape": "0101"},
}


def by_hand(turns: dict[str, str]) -> Tensor:
    """Plain PyTorch: in every step the losses of the tasks that have a batch, summed."""
    model = module()
    optimizer = sgd(model.parameters())
    batches = {name: list(loader) for name, loader in own().items()}
    costs = {"kind": F.cross_entropy, "size": lambda a, b: F.mse_loss(a.squeeze(1), b), "shape": F.l1_loss}
    for step in range(len(turns["kind"])):
        optimizer.zero_grad()
        losses = []
        for name in NAMES:
            if turns[name][step] != "-":
                x, target = batches[name][int(turns[name][step])]
                losses.append(costs[name](model.tasks[name].head(model.encoder(x)), target))
        sum(losses).backward()
        optimizer.step()
    return network(model)


@pytest.mark.parametrize("mode", TURNS)
def test_a_loader_per_task_in_every_mode(mode):
    model, runner = module(), trainer()
    runner.fit(model, CombinedLoader(own(), mode))
    assert runner.global_step == len(TURNS[mode]["kind"])
    torch.testing.assert_close(network(model), by_hand(TURNS[mode]), rtol=0, atol=1e-6)


def test_a_plain_mapping_of_loaders_cycles_the_short_ones():
    model, runner = module(), trainer()
    runner.fit(model, own())
    torch.testing.assert_close(network(model), by_hand(TURNS["max_size_cycle"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", TURNS)
@pytest.mark.parametrize("balancer", ["uncertainty", "pcgrad", "gradnorm"])
def test_an_exhausted_loader_leaves_its_task_out(balancer, mode):
    model = module(balancer)
    trainer().fit(model, CombinedLoader(own(), mode))
    balance, last = model.last_balance, [turns[-1] != "-" for turns in TURNS[mode].values()]
    assert balance.finite
    assert (balance.present is None and all(last)) or balance.present.tolist() == last
    assert [weight != 0 for weight in balance.weights.tolist()] == last


def test_the_head_of_an_exhausted_loader_stands_still():
    """Of a task without a batch nothing moves, not even by the optimizer's momentum: its gradient is None."""
    model = module("pcgrad")
    heads = {}

    def keep(*_: Any) -> None:
        heads[len(heads)] = {name: task.head.weight.detach().clone() for name, task in model.tasks.items()}

    model.on_train_batch_end = keep
    trainer().fit(model, CombinedLoader(own(), "max_size"))
    still = {name: [torch.equal(heads[i][name], heads[i + 1][name]) for i in range(3)] for name in NAMES}
    assert still == {"kind": [False] * 3, "size": [False, False, True], "shape": [False, True, True]}


# --- Evaluation ------------------------------------------------------------------------------------------------------


def means(model: MultiTaskModule, turns: dict[str, str]) -> dict[str, float]:
    """What evaluation should find: per task the means over all samples of its batches."""
    wanted = {}
    batches = {name: list(loader) for name, loader in own().items()}
    with torch.no_grad():
        for name in NAMES:
            mine = [batches[name][int(turn)] for turn in turns[name] if turn != "-"]
            x, target = (torch.cat(parts) for parts in zip(*mine, strict=True))
            output = model.tasks[name].head(model.encoder(x))
            if name == "kind":
                wanted["val/loss/kind"] = F.cross_entropy(output, target).item()
                wanted["val/kind/accuracy"] = (output.argmax(1) == target).double().mean().item()
            else:
                error = output.reshape(target.shape) - target
                mse, mae = error.square().mean().item(), error.abs().mean().item()
                wanted[f"val/loss/{name}"] = mse if name == "size" else mae
                wanted |= {f"val/{name}/mse": mse, f"val/{name}/mae": mae}
    wanted["val/loss"] = sum(wanted[f"val/loss/{name}"] for name in NAMES)
    return wanted


EVERY = {name: "0123"[: -(-size // 8)] for name, size in SIZES.items()}


@pytest.mark.parametrize(
    "loaders, turns",
    [
        pytest.param(lambda: own(), EVERY, id="mapping"),
        pytest.param(lambda: CombinedLoader(own(), "sequential"), EVERY, id="sequential"),
        pytest.param(lambda: CombinedLoader(own(), "max_size"), TURNS["max_size"], id="max_size"),
        pytest.param(lambda: CombinedLoader(own(), "max_size_cycle"), TURNS["max_size_cycle"], id="max_size_cycle"),
        pytest.param(lambda: CombinedLoader(own(), "min_size"), TURNS["min_size"], id="min_size"),
    ],
)
def test_validation_on_a_loader_per_task(loaders, turns):
    model = module("pcgrad")
    (found,) = [trainer().validate(model, loaders(), verbose=False)]
    logged = {key: value for loader in found for key, value in loader.items()}
    assert logged == pytest.approx(means(model, turns), rel=1e-5)


def test_test_on_a_loader_per_task():
    model = module()
    found = trainer().test(model, own(), verbose=False)
    logged = {key.replace("test/", "val/"): value for loader in found for key, value in loader.items()}
    assert logged == pytest.approx(means(model, EVERY), rel=1e-5)


def test_validation_in_a_fit_on_loaders_per_task():
    model, runner = module("gradnorm", optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0)), trainer()
    runner.fit(model, own(), own())
    wanted = means(model, EVERY)
    logged = {key: value.item() for key, value in runner.callback_metrics.items() if key.startswith("val/")}
    assert logged == pytest.approx(wanted, rel=1e-5)


def test_a_single_loader_may_be_named_like_a_task():
    x, targets = samples(8)
    model = module()
    (named,) = trainer().validate(model, {"kind": Listed([(x, targets)])}, verbose=False)
    (plain,) = trainer().validate(model, Listed([(x, targets)]), verbose=False)
    assert named == plain


# --- Prediction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["input", "tuple", "flat"])
def test_predictions_come_by_task_from_every_form(name):
    x, targets = samples(8)
    model = module()
    batch = {"input": x, "tuple": (x, targets), "flat": {"input": x} | targets}[name]
    (found,) = trainer().predict(model, Listed([batch]))
    with torch.no_grad():
        z = model.encoder(x)
        wanted = {task: model.tasks[task].head(z) for task in NAMES}
    wanted["kind"] = wanted["kind"].argmax(1)
    assert list(found) == list(NAMES)
    assert all(torch.equal(found[task], wanted[task]) for task in NAMES)
