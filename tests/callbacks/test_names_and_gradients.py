"""One run in three loggers: tasks with names of any kind, and the gradients that the optimizer gets."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import pytest
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanSquaredError

from lightning_mtl import MultiTaskModule
from lightning_mtl.callbacks import BalanceMonitor, ConflictHeatmap, FinalTable
from lightning_mtl.callbacks.final_table import final_rows
from lightning_mtl.tasks import RegressionTask
from tests.callbacks.wandb_reader import Run, read
from tests.nets import WIDTH, loader, mlp, sgd, trainer

PAGE = Path(__file__).parents[2] / "docs" / "logging.md"
METRICS = {name: ["mse"] for name in ["type", "a", "a/b", "a.b", "logP (o/w)", "x|y", "costs $m_2$", "%", "b/c"]}
METRICS["a"] = ["mse", "b/max", "best.mae (%)"]
NAMES = list(METRICS)


def gradients_of_the_docs(**options: Any) -> L.Callback:
    """The callback that docs/logging.md shows."""
    space: dict[str, Any] = {"L": L}
    (code,) = re.findall(r"^```python\n(import wandb\n.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    exec(code, space)
    return space["Gradients"](**options)


class Kept(L.Callback):
    """What the optimizer gets at one weight."""

    def __init__(self) -> None:
        self.grads: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.grads.append(pl_module.encoder[0].weight.grad.clone())


@dataclass
class Finished:
    csv: dict[str, list[float]]
    tensorboard: dict[str, list[float]]
    wandb: Run
    grads: list[Tensor]
    tables: list[list[list[str]]]
    images: list[Path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Four steps with validation before and after."""
    folder = tmp_path_factory.mktemp("names")
    torch.manual_seed(0)
    kinds = {"mse": MeanSquaredError, "b/max": MeanAbsoluteError, "best.mae (%)": MeanAbsoluteError}
    tasks = {
        name: RegressionTask(nn.Linear(WIDTH, 1), "l1", {key: kinds[key]() for key in keys}, target="size")
        for name, keys in METRICS.items()
    }
    model = MultiTaskModule(mlp(), tasks, "pcgrad", optimizer=sgd, strict_targets=False)
    loggers = [CSVLogger(folder / "csv"), TensorBoardLogger(folder / "tb"), WandbLogger(save_dir=folder, offline=True)]
    loggers[2].watch(model, log="gradients", log_freq=1)
    keep = Kept()
    gradients = gradients_of_the_docs(every_n_steps=2)
    # The callback looks at the first logger.
    callbacks = [keep, gradients, BalanceMonitor(cosines=True), FinalTable(), ConflictHeatmap()]
    trainer(logger=[loggers[2], *loggers[:2]], log_every_n_steps=1, callbacks=callbacks).fit(model, loader(), loader())
    for logger in loggers[:2]:
        logger.finalize("success")
    loggers[2].experiment.finish()
    wandb.teardown()
    rows = list(csv.DictReader((Path(loggers[0].log_dir) / "metrics.csv").read_text().splitlines()))
    events = EventAccumulator(loggers[1].log_dir)
    events.Reload()
    return Finished(
        {key: [float(row[key]) for row in rows if row[key]] for key in rows[0]},
        {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]},
        read(folder),
        keep.grads,
        [list(csv.reader(path.read_text().splitlines())) for path in folder.rglob("final_val.csv")],
        list((folder / "csv").rglob("*.png")),
    )


def wanted_keys() -> set[str]:
    keys = {f"{kind}/{name}" for kind in ("train/loss", "val/loss", "balance/weight", "balance/norm") for name in NAMES}
    keys |= {f"val/{name}/{metric}" for name, metrics in METRICS.items() for metric in metrics}
    # One bar stands in a name, so two part a pair.
    keys |= {f"balance/cosine/{a} || {b}" for i, a in enumerate(NAMES) for b in NAMES[i + 1 :]}
    return keys | {"train/loss", "val/loss", "balance/conflict"}


def test_every_logger_has_every_key_as_it_is(finished):
    assert set(finished.csv) - {"step", "epoch"} == wanted_keys()
    assert set(finished.tensorboard) - {"epoch", "hp_metric"} == wanted_keys()
    logged = {key for row in finished.wandb.history for key in row}
    assert wanted_keys() <= logged
    extra = {key for key in logged - wanted_keys() if not key.startswith(("_", "grad", "final", "balance/conflict_"))}
    assert extra == {"epoch", "trainer/global_step"}


def test_every_logger_has_the_same_values(finished):
    for key in wanted_keys():
        assert len(finished.csv[key]) == (1 if key.startswith("val/") else 4)
        assert finished.tensorboard[key] == pytest.approx(finished.csv[key], rel=1e-6)
        assert list(finished.wandb.scalars(key).values()) == pytest.approx(finished.csv[key], rel=1e-6)


def test_the_final_table_finds_the_task_of_each_metric(finished):
    rows = [[name, metric] for name, metrics in METRICS.items() for metric in ["loss", *metrics]]
    tables = [*finished.tables, [["stage", *"tmv"], *finished.wandb.table("final/val")["data"]]]
    assert len(tables) == 3
    for table in tables:
        assert [row[1:3] for row in table[1:]] == rows
        for stage, name, metric, value in table[1:]:
            key = f"{stage}/loss/{name}" if metric == "loss" else f"{stage}/{name}/{metric}"
            assert float(value) == pytest.approx(finished.csv[key][0])


def test_the_heatmap_is_drawn(finished):
    assert len(finished.images) == 1


def histogram(run: Run, prefix: str) -> dict[int, tuple[float, float, int]]:
    """Trainer step -> smallest and largest entry of the first weight's gradient, and their number."""
    found = {}
    for row in run.history:
        for key, value in row.items():
            if key.startswith(prefix) and key.endswith("encoder.0.weight"):
                ends = value["bins"][0], value["bins"][-1]
                found[int(row.get("trainer/global_step", len(found)))] = (*ends, sum(value["values"]))
    return found


def test_the_callback_of_the_docs_shows_what_the_optimizer_gets(finished):
    shown = histogram(finished.wandb, "grad/")
    assert list(shown) == [0, 2]
    for step, seen in shown.items():
        grad = finished.grads[step]
        assert seen == pytest.approx((grad.min().item(), grad.max().item(), grad.numel()), rel=1e-5)


def test_wandb_watch_shows_the_final_gradients_and_no_others(finished):
    shown = histogram(finished.wandb, "gradients/")
    assert len(shown) == len(finished.grads) == 4
    for step, seen in shown.items():
        grad = finished.grads[step]
        assert seen == pytest.approx((grad.min().item(), grad.max().item(), grad.numel()), rel=1e-5)


def test_a_module_of_ones_own_is_read_by_the_longest_name():
    keys = ["a/b/mse", "b/mse", "a/mse", "loss/a/b", "loss/a", "a/b/c/mse", "loss", "ab/mse"]
    logged = {f"val/{key}": torch.tensor(float(number)) for number, key in enumerate(keys)}
    rows = final_rows(
        cast(Any, SimpleNamespace(callback_metrics=logged)),
        cast(Any, SimpleNamespace(task_names=("a", "a/b", "b"))),
        "val",
    )
    assert rows == [
        ("val", "a", "loss", 4.0),
        ("val", "a", "mse", 2.0),
        ("val", "a/b", "loss", 3.0),
        ("val", "a/b", "mse", 0.0),
        ("val", "a/b", "c/mse", 5.0),
        ("val", "b", "mse", 1.0),
    ]
