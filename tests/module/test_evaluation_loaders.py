"""Several evaluation loaders that are not one per task: keys as Lightning names them, losses and metrics apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader

from lightning_mtl import MultiTaskModule
from tests.nets import Samples, module, samples, trainer

NAMES = ("kind", "size", "shape")
LENGTHS = (20, 12, 7)


def loaders() -> list[DataLoader]:
    return [DataLoader(Samples(*samples(num, seed)), batch_size=8) for seed, num in enumerate(LENGTHS)]


def by_hand(model: MultiTaskModule, stage: str = "val") -> dict[str, float]:
    """Means over all samples of each loader."""
    found = {}
    for seed, num in enumerate(LENGTHS):
        x, targets = samples(num, seed)
        with torch.no_grad():
            z = model.encoder(x)
            kind, size, shape = (model.tasks[name].head(z) for name in NAMES)
        losses = {
            "kind": F.cross_entropy(kind, targets["kind"]),
            "size": F.mse_loss(size.squeeze(1), targets["size"]),
            "shape": F.l1_loss(shape, targets["shape"]),
        }
        keys = {f"loss/{name}": loss for name, loss in losses.items()} | {"loss": sum(losses.values())}
        keys["kind/accuracy"] = (kind.argmax(1) == targets["kind"]).float().mean()
        for name, output in {"size": size.squeeze(1), "shape": shape}.items():
            keys[f"{name}/mse"] = F.mse_loss(output, targets[name])
            keys[f"{name}/mae"] = F.l1_loss(output, targets[name])
        found |= {f"{stage}/{key}/dataloader_idx_{seed}": value.item() for key, value in keys.items()}
    return found


def together(rows: Any) -> dict[str, float]:
    return {key: value for row in rows for key, value in row.items()}


@pytest.mark.parametrize("form", ["list", "names that are no tasks"])
@pytest.mark.parametrize("stage", ["val", "test"])
def test_each_loader_has_its_own(stage, form):
    model, runner = module("pcgrad"), trainer()
    data: Any = loaders() if form == "list" else dict(zip(("clean", "noisy", "old"), loaders(), strict=True))
    run = runner.validate if stage == "val" else runner.test
    for _ in range(2):  # nothing is left of the run before
        assert together(run(model, data, verbose=False)) == pytest.approx(by_hand(model, stage), rel=1e-5)


def test_within_a_fit():
    model, runner = module("pcgrad", optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0)), trainer(max_epochs=2)
    stop = EarlyStopping("val/loss/dataloader_idx_1", patience=5)
    runner.callbacks.append(stop)
    runner.fit(model, loaders()[0], loaders())
    logged = {key: value.item() for key, value in runner.callback_metrics.items() if key.startswith("val/")}
    assert logged == pytest.approx(by_hand(model), rel=1e-5)
    assert stop.best_score.item() == pytest.approx(by_hand(model)["val/loss/dataloader_idx_1"], rel=1e-5)


def test_a_balancer_sees_the_metrics_of_the_first():
    balancer = {"class_path": "dtp", "init_args": {"metric": "mse", "smoothing": 1.0}}
    model, runner = module(balancer, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0)), trainer(max_epochs=1)
    model.balancer.observe_metrics = Seen()
    runner.fit(model, loaders()[0], loaders())
    (values,) = model.balancer.observe_metrics.calls
    wanted = by_hand(model)
    assert values[1:].tolist() == pytest.approx([wanted[f"val/{name}/mse/dataloader_idx_0"] for name in NAMES[1:]])
    assert values[0].isnan()


class Seen:
    """Keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[torch.Tensor] = []

    def __call__(self, values: torch.Tensor) -> None:
        self.calls.append(values)


def test_one_loader_has_plain_keys():
    model, data = module(), loaders()[0]
    (alone,) = trainer().validate(model, [data], verbose=False)
    assert alone == pytest.approx(
        {k.removesuffix("/dataloader_idx_0"): v for k, v in by_hand(model).items() if "_0" in k}
    )


def test_loaders_of_tasks_are_named_by_their_tasks():
    model, x, targets = module(), *samples(8)
    data = {name: DataLoader([(x, targets[name])], batch_size=None) for name in NAMES}
    keys = together(trainer().validate(model, data, verbose=False))
    assert {"val/loss", "val/loss/size", "val/kind/accuracy"} <= set(keys)
    assert not any("dataloader_idx" in key for key in keys)


def test_a_summary_of_the_model_shows_no_part_of_ours():
    """Nor does a checkpoint: what logs is no submodule."""
    assert [name for name, _ in module().named_children()] == ["balancer", "encoder", "tasks"]
