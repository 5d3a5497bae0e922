"""What is logged: every key, at the right steps, with values found by hand, through two of Lightning's loggers."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mtl import Balanced, MultiTaskModule
from lightning_mtl.balancers import Fixed
from lightning_mtl.callbacks import BalanceMonitor
from lightning_mtl.tasks import RegressionTask
from tests.nets import WIDTH, Samples, loader, mlp, module, samples, trainer

NAMES = ("kind", "size", "shape")
PAIRS = ("kind/size", "kind/shape", "size/shape")
METRICS = ("kind/accuracy", "size/mse", "size/mae", "shape/mse", "shape/mae")


def losses(stage: str) -> set[str]:
    return {f"{stage}/loss", *(f"{stage}/loss/{name}" for name in NAMES)}


def metrics(stage: str) -> set[str]:
    return {f"{stage}/{key}" for key in METRICS}


WEIGHTS = {f"balance/weight/{name}" for name in NAMES}
FROM_GRAM = {f"balance/norm/{name}" for name in NAMES} | {f"balance/cosine/{pair}" for pair in PAIRS}
FROM_GRAM |= {"balance/conflict"}


def still(parameters: Any) -> torch.optim.Optimizer:
    """An optimizer that moves nothing, so that every step's losses and gradients can be found again."""
    return torch.optim.SGD(parameters, lr=0.0)


def rows_of(logger: CSVLogger) -> dict[str, dict[int, float]]:
    """Key -> step -> value, from the CSV file."""
    found: dict[str, dict[int, float]] = {}
    with Path(logger.log_dir, "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value and key not in ("step", "epoch"):
                    found.setdefault(key, {})[int(row["step"])] = float(value)
    return found


def events_of(logger: TensorBoardLogger) -> dict[str, dict[int, float]]:
    """Key -> step -> value, from the event file."""
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag not in ("epoch", "hp_metric")]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


LOGGERS = {"csv": (CSVLogger, rows_of), "tensorboard": (TensorBoardLogger, events_of)}


def fitted(model: L.LightningModule, folder: Path, data: Any, val: Any = None, **options: Any) -> dict[str, Any]:
    """Fit one epoch with a CSV logger and read it back."""
    logger = CSVLogger(folder)
    quiet = {"logger": logger, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    trainer(**(quiet | options)).fit(model, data, val)
    return rows_of(logger)


def batches(num: int = 64, size: int = 16) -> list[Any]:
    return list(loader(num, size))


def by_hand(model: MultiTaskModule, batch: Any) -> dict[str, Tensor]:
    """The three losses of a batch, in plain PyTorch."""
    x, targets = batch
    z = model.encoder(x)
    out = {name: model.tasks[name].head(z) for name in NAMES}
    return {
        "kind": F.cross_entropy(out["kind"], targets["kind"]),
        "size": F.mse_loss(out["size"].squeeze(1), targets["size"]),
        "shape": F.l1_loss(out["shape"], targets["shape"]),
    }


def gram_by_hand(model: MultiTaskModule, batch: Any) -> Tensor:
    """Inner products of the task gradients at the encoder, one backward each."""
    shared = list(model.encoder.parameters())
    rows = []
    for loss in by_hand(model, batch).values():
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)]))
    return torch.stack(rows).double() @ torch.stack(rows).double().T


# --- Keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logger", LOGGERS)
@pytest.mark.parametrize("balancer, own", [("fixed", set()), ("uncertainty", set()), ("pcgrad", FROM_GRAM)])
def test_every_key_of_every_stage(logger, balancer, own, tmp_path):
    make, read = LOGGERS[logger]
    log = make(tmp_path)
    runner = trainer(logger=log, log_every_n_steps=1)
    model = module(balancer)
    runner.fit(model, loader(), loader(32, seed=1))
    runner.test(model, loader(32, seed=2), verbose=False)
    log.finalize("success")
    wanted = losses("train") | losses("val") | losses("test") | metrics("val") | metrics("test") | WEIGHTS | own
    assert set(read(log)) == wanted


def test_both_loggers_say_the_same(tmp_path):
    logs = [make(tmp_path / name) for name, (make, _) in LOGGERS.items()]
    trainer(logger=logs, log_every_n_steps=1).fit(module("gradnorm"), loader(), loader(32, seed=1))
    for log in logs:
        log.finalize("success")
    one, other = (read(log) for (_, read), log in zip(LOGGERS.values(), logs, strict=True))
    assert one.keys() == other.keys()
    for key, values in one.items():
        assert other[key] == pytest.approx(values), key


def test_metrics_of_the_training_on_demand(tmp_path):
    logged = fitted(module(train_metrics=True), tmp_path, loader())
    assert set(logged) == losses("train") | metrics("train") | WEIGHTS


def test_cosines_may_be_left_out(tmp_path):
    logged = fitted(module("pcgrad"), tmp_path, loader(), callbacks=[BalanceMonitor(cosines=False)])
    assert set(logged) == losses("train") | WEIGHTS | {key for key in FROM_GRAM if "cosine" not in key}


class Own(Balanced, L.LightningModule):
    """Somebody's own module: it logs what it likes, the balance comes by itself."""

    def __init__(self, balancer: str, **options: Any) -> None:
        super().__init__(tasks=["a", "b"], balancer=balancer, **options)
        self.encoder, self.a, self.b = mlp(), nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 1)

    def pair(self, x: Tensor) -> dict[str, Tensor]:
        z = self.encoder(x)
        return {"a": self.a(z).square().mean(), "b": (self.b(z) - 3 * self.a(z).detach() - 1).square().mean()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.balance(self.pair(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return still(self.parameters())


def test_a_module_of_ones_own_logs_its_balance(tmp_path):
    logged = fitted(Own("pcgrad"), tmp_path, loader())
    kinds = {"balance/weight/a", "balance/weight/b", "balance/norm/a", "balance/norm/b"}
    assert set(logged) == kinds | {"balance/cosine/a/b", "balance/conflict"}


# --- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balancer", ["fixed", "pcgrad"])
def test_losses_of_the_training(balancer, tmp_path):
    model = module(balancer, optimizer=still)
    logged = fitted(model, tmp_path, loader())
    for step, batch in enumerate(batches()):
        wanted = {name: loss.item() for name, loss in by_hand(model, batch).items()}
        assert {name: logged[f"train/loss/{name}"][step] for name in NAMES} == pytest.approx(wanted, rel=1e-5)
        assert logged["train/loss"][step] == pytest.approx(sum(wanted.values()), rel=1e-5)


def test_the_logged_loss_is_unweighted(tmp_path):
    weighted = module(Fixed(3, weights=[1.0, 0.01, 100.0]), optimizer=still)
    plain = module(optimizer=still)
    one, other = fitted(weighted, tmp_path / "a", loader()), fitted(plain, tmp_path / "b", loader())
    assert {key: one[key] for key in losses("train")} == {key: other[key] for key in losses("train")}


def test_norms_cosines_and_conflict(tmp_path):
    model = module("pcgrad", optimizer=still)
    logged = fitted(model, tmp_path, loader(32, batch_size=2))
    seen = set()
    for step, batch in enumerate(batches(32, size=2)):
        gram = gram_by_hand(model, batch)
        norms = gram.diagonal().sqrt()
        for i, a in enumerate(NAMES):
            assert logged[f"balance/norm/{a}"][step] == pytest.approx(norms[i].item(), rel=1e-5)
            for j in range(i + 1, 3):
                cosine = (gram[i, j] / norms[i] / norms[j]).item()
                assert logged[f"balance/cosine/{a}/{NAMES[j]}"][step] == pytest.approx(cosine, rel=1e-4, abs=1e-6)
        negative = sum(bool(gram[i, j] < 0) for i, j in ((0, 1), (0, 2), (1, 2))) / 3
        assert logged["balance/conflict"][step] == pytest.approx(negative)
        seen.add(negative)
    assert len(seen) > 1  # else the last assertion says little


@pytest.mark.parametrize("balancer, wanted", [("fixed", [1.0] * 3), ("uncertainty", [0.5] * 3)])
def test_weights_of_a_loss_balancer(balancer, wanted, tmp_path):
    logged = fitted(module(balancer, optimizer=still), tmp_path, loader())
    for step in range(4):
        assert [logged[f"balance/weight/{name}"][step] for name in NAMES] == pytest.approx(wanted)


def test_weights_given_by_name(tmp_path):
    logged = fitted(module(Fixed(3, weights={"size": 0.25, "kind": -2})), tmp_path, loader())
    assert [logged[f"balance/weight/{name}"][0] for name in NAMES] == [-2.0, 0.25, 1.0]


def test_weights_of_pcgrad_for_two_tasks(tmp_path):
    """For two tasks there is no random order: each loses its component along the other if they conflict."""
    torch.manual_seed(3)
    model = Own("pcgrad")
    data = [torch.randn(16, 8) * scale for scale in (0.1, 1.0, 3.0, 10.0)]
    logged = fitted(model, tmp_path, DataLoader([(x,) for x in data], batch_size=None))
    shared = list(model.encoder.parameters())
    kinds = set()
    for step, x in enumerate(data):
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)]).double()
            for loss in model.pair(x).values()
        ]
        dot = min((rows[0] @ rows[1]).item(), 0.0)
        wanted = [1 - dot / (row @ row).item() for row in rows]
        assert [logged[f"balance/weight/{name}"][step] for name in "ab"] == pytest.approx(wanted, rel=1e-4)
        kinds.add(dot < 0)
    assert True in kinds


def test_metrics_of_an_epoch_of_training(tmp_path):
    model = module(train_metrics=True, optimizer=still)
    logged = fitted(model, tmp_path, loader())
    x, targets = samples(64)
    out = model(x)
    wanted = {
        "kind/accuracy": (out["kind"].argmax(1) == targets["kind"]).double().mean(),
        "size/mae": (out["size"].squeeze(1) - targets["size"]).abs().mean(),
        "shape/mse": (out["shape"] - targets["shape"]).square().mean(),
    }
    for key, value in wanted.items():
        assert list(logged[f"train/{key}"].values()) == [pytest.approx(value.item(), rel=1e-5)]


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_is_over_all_samples(stage):
    """48 samples in batches of 20: the last is smaller, and counts for less."""
    model, data = module(), loader(48, batch_size=20, seed=1)
    (found,) = getattr(trainer(), {"val": "validate", "test": "test"}[stage])(model, data, verbose=False)
    x, targets = samples(48, seed=1)
    with torch.no_grad():
        wanted = {f"{stage}/loss/{name}": loss.item() for name, loss in by_hand(model, (x, targets)).items()}
        accuracy = (model(x)["kind"].argmax(1) == targets["kind"]).double().mean().item()
    wanted[f"{stage}/loss"] = sum(wanted.values())
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-5)
    assert found[f"{stage}/kind/accuracy"] == pytest.approx(accuracy)


# --- Missing labels --------------------------------------------------------------------------------------------------


def gappy(there: Mapping[str, list[int]], size: int = 4) -> tuple[Any, dict[str, Tensor]]:
    """Batches of ``size`` samples in which each task has labels for the first so many only."""
    x, targets = samples(size * len(there["size"]))
    row = torch.arange(len(x))
    number = {name: torch.tensor(counts).repeat_interleave(size) for name, counts in there.items()}
    labelled = {name: row % size < number[name] for name in NAMES}
    targets = dict(targets)
    targets["kind"] = targets["kind"].masked_fill(~labelled["kind"], -100)
    targets["size"] = targets["size"].masked_fill(~labelled["size"], math.nan)
    targets["shape"] = targets["shape"].masked_fill(~labelled["shape"][:, None], math.nan)
    return DataLoader(Samples(x, targets), batch_size=size), labelled


PATTERN = {"kind": [4, 1, 2], "size": [1, 0, 4], "shape": [0, 0, 3]}


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_with_missing_labels_is_over_the_labels(stage):
    data, labelled = gappy(PATTERN)
    model = module("pcgrad")
    (found,) = getattr(trainer(), {"val": "validate", "test": "test"}[stage])(model, data, verbose=False)
    x, targets = samples(12)
    with torch.no_grad():
        wanted = {
            f"{stage}/loss/{name}": by_hand(model, (x[there], {k: t[there] for k, t in targets.items()}))[name].item()
            for name, there in labelled.items()
        }
    wanted[f"{stage}/loss"] = sum(wanted.values())
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-5)


def test_a_task_without_any_label_has_no_loss_and_no_part_in_the_sum():
    tasks = {name: RegressionTask(nn.Linear(WIDTH, 1), metrics={}) for name in ("a", "b")}
    model = MultiTaskModule(mlp(), tasks)
    x, _ = samples(8)
    data = DataLoader(Samples(x, {"a": x[:, 0], "b": torch.full((8,), math.nan)}), batch_size=4)
    (found,) = trainer().validate(model, data, verbose=False)
    with torch.no_grad():
        wanted = F.mse_loss(model(x)["a"].squeeze(1), x[:, 0]).item()
    assert found["val/loss"] == found["val/loss/a"] == pytest.approx(wanted)
    assert math.isnan(found["val/loss/b"])


def test_training_with_missing_labels(tmp_path):
    data, labelled = gappy(PATTERN)
    model = module("pcgrad", optimizer=still)
    logged = fitted(model, tmp_path, data)
    x, targets = samples(12)
    for step in range(3):
        total = 0.0
        for name in NAMES:
            rows = labelled[name] & (torch.arange(12) // 4 == step)
            found = logged[f"train/loss/{name}"][step]
            if rows.any():
                loss = by_hand(model, (x[rows], {k: t[rows] for k, t in targets.items()}))[name].item()
                assert found == pytest.approx(loss, rel=1e-5)
                total += loss
            else:
                assert math.isnan(found)
                assert logged[f"balance/weight/{name}"][step] == 0.0
        assert logged["train/loss"][step] == pytest.approx(total, rel=1e-5)


# --- When ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every, steps", [(1, range(8)), (3, [2, 5]), (8, [7]), (50, [])])
@pytest.mark.parametrize("balancer", ["fixed", "gradnorm"])
def test_in_every_nth_step(balancer, every, steps, tmp_path):
    model = module(balancer, optimizer=still)
    logged = fitted(model, tmp_path, loader(128), loader(16), log_every_n_steps=every)
    keys = losses("train") | WEIGHTS | (FROM_GRAM if balancer == "gradnorm" else set())
    assert {key for key in logged if not key.startswith("val/")} == (keys if steps else set())
    assert all(list(logged[key]) == list(steps) for key in keys if steps)
    data = batches(128)
    for step in steps:  # of this very step, not of the one before
        assert logged["train/loss/size"][step] == pytest.approx(by_hand(model, data[step])["size"].item(), rel=1e-5)


@pytest.mark.parametrize("every, steps", [(1, range(4)), (2, [1, 3])])
def test_steps_are_those_of_the_optimizer(every, steps, tmp_path):
    logged = fitted(module("pcgrad"), tmp_path, loader(128), log_every_n_steps=every, accumulate_grad_batches=2)
    assert all(list(values) == list(steps) for values in logged.values())
    assert set(logged) == losses("train") | WEIGHTS | FROM_GRAM


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("every, steps", [(2, [1, 3, 5, 7]), (3, [2, 5]), (5, [4]), (1, range(8))])
def test_a_monitor_has_its_own_pace(every, steps, accumulate, tmp_path):
    """Whatever the Trainer's: neither late nor repeated, and always of the step it stands at."""
    model = module("pcgrad", optimizer=still)
    options = {"log_every_n_steps": 4, "accumulate_grad_batches": accumulate}
    data = loader(128 * accumulate)
    logged = fitted(model, tmp_path, data, callbacks=[BalanceMonitor(every_n_steps=every)], **options)
    last = list(data)[accumulate - 1 :: accumulate]  # the gram of a step is that of its last batch
    for i, name in enumerate(NAMES):
        norms = {step: gram_by_hand(model, last[step])[i, i].sqrt().item() for step in steps}
        assert logged[f"balance/norm/{name}"] == pytest.approx(norms, rel=1e-5)
    assert list(logged["train/loss"]) == [3, 7]


def test_the_pace_goes_on_after_a_resume(tmp_path):
    first = trainer(accumulate_grad_batches=2)
    first.fit(module("pcgrad"), loader(64))
    first.save_checkpoint(tmp_path / "half.ckpt")
    logger = CSVLogger(tmp_path)
    options = {"logger": logger, "log_every_n_steps": 100, "callbacks": [BalanceMonitor(every_n_steps=2)]}
    second = trainer(max_epochs=3, accumulate_grad_batches=2, **options)
    second.fit(module("pcgrad"), loader(64), ckpt_path=tmp_path / "half.ckpt")
    assert list(rows_of(logger)["balance/conflict"]) == [3, 5]


def test_a_monitor_of_ones_own_is_kept():
    mine = BalanceMonitor(every_n_steps=7)
    runner = trainer(callbacks=[mine])
    runner.fit(module("pcgrad"), loader(32))
    assert [callback for callback in runner.callbacks if isinstance(callback, BalanceMonitor)] == [mine]


def test_without_one_the_module_brings_it():
    runner = trainer()
    runner.fit(module("pcgrad"), loader(32))
    assert sum(isinstance(callback, BalanceMonitor) for callback in runner.callbacks) == 1


def test_the_progress_bar_shows_the_task_losses():
    runner = trainer(log_every_n_steps=1)
    model = module("pcgrad", optimizer=still)
    runner.fit(model, loader())
    shown = {key: value for key, value in runner.progress_bar_metrics.items() if key.startswith("train")}
    wanted = {f"train/loss/{name}": loss.item() for name, loss in by_hand(model, batches()[-1]).items()}
    assert shown == pytest.approx(wanted, rel=1e-5)


def test_callbacks_can_watch_every_key():
    runner = trainer(log_every_n_steps=1)
    runner.fit(module("pcgrad"), loader(), loader(32, seed=1))
    wanted = losses("train") | losses("val") | metrics("val") | WEIGHTS | FROM_GRAM
    assert wanted <= set(runner.callback_metrics)


def test_a_barebones_trainer_logs_nothing():
    runner = L.Trainer(accelerator="cpu", barebones=True, max_steps=2)
    runner.fit(module("pcgrad"), loader())
    assert runner.callback_metrics == {}
