"""Whoever looks for the losses of training finds them, as if the module had logged them in every step."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset

from lightning_mtl import MultiTaskModule
from tests.nets import Samples, loader, mlp, module, samples, three_tasks, trainer
from tests.test_logs import NAMES, batches, by_hand, losses, rows_of, still


class Stream(IterableDataset):
    """The samples of a loader, without a length."""

    def __init__(self, num: int) -> None:
        self.samples = Samples(*samples(num))

    def __iter__(self) -> Any:
        return (self.samples[i] for i in range(len(self.samples)))


class Watch(L.Callback):
    """Keeps what there is to see after each batch and each epoch."""

    def __init__(self) -> None:
        self.bar: list[dict[str, float]] = []
        self.seen: list[dict[str, float]] = []
        self.epochs: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.bar.append(dict(trainer.progress_bar_metrics))
        self.seen.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.epochs.append({key: float(value) for key, value in trainer.callback_metrics.items()})


def of(model: MultiTaskModule, batch: Any) -> Any:
    found = {f"train/loss/{name}": loss.item() for name, loss in by_hand(model, batch).items()}
    return pytest.approx({**found, "train/loss": sum(found.values())}, rel=1e-5)


def only(found: dict[str, float]) -> dict[str, float]:
    return {key: found[key] for key in losses("train")}


@pytest.mark.parametrize("balancer", ["fixed", "pcgrad"])
@pytest.mark.parametrize(
    "last, data, options",
    [
        (7, loader(128), {}),
        (4, loader(128), {"limit_train_batches": 5}),
        (7, DataLoader(Stream(128), batch_size=16), {}),
        (2, DataLoader(Stream(128), batch_size=16), {"limit_train_batches": 3}),
        (7, loader(128), {"accumulate_grad_batches": 3}),
        (2, loader(128), {"max_steps": 3}),
        (3, loader(128), {"max_steps": 2, "accumulate_grad_batches": 2}),
        (7, loader(128), {"log_every_n_steps": 0}),
        (7, loader(128), {"log_every_n_steps": 3}),
    ],
)
def test_at_the_end_of_an_epoch_they_are_those_of_its_last_batch(last, data, options, balancer):
    watch, model = Watch(), module(balancer, optimizer=still)
    trainer(callbacks=[watch], **({"log_every_n_steps": 50} | options)).fit(model, data)
    assert [only(found) for found in watch.epochs] == [of(model, batches(128)[last])]


def test_the_progress_bar_has_them_from_the_first_batch_on():
    watch, model = Watch(), module(optimizer=still)
    trainer(callbacks=[watch], max_epochs=2).fit(model, loader())
    one, last = ({f"train/loss/{name}": by_hand(model, batches()[i])[name].item() for name in NAMES} for i in (0, -1))
    shown = [{key: value for key, value in found.items() if key in one} for found in watch.bar]
    assert shown[0] == {}
    assert shown[1:4] == [pytest.approx(one)] * 3
    assert shown[4] == pytest.approx(last)


def test_callbacks_that_watch_them_need_no_logged_step(tmp_path):
    stop, best = EarlyStopping("train/loss", patience=1), ModelCheckpoint(tmp_path, monitor="train/loss/size")
    runner = trainer(callbacks=[stop, best], max_epochs=5, enable_checkpointing=True)
    model = module(optimizer=still)
    runner.fit(model, loader())
    assert runner.current_epoch == 2  # nothing moves: the second epoch is no better
    assert float(best.best_model_score) == pytest.approx(by_hand(model, batches()[-1])["size"].item(), rel=1e-5)


def test_who_watches_them_in_a_step_sees_that_step(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="train/loss", every_n_train_steps=3, save_top_k=-1)
    model = module(optimizer=still)
    trainer(callbacks=[best], enable_checkpointing=True).fit(model, loader(128))
    wanted = [sum(loss.item() for loss in by_hand(model, batches(128)[i]).values()) for i in (2, 5)]
    assert sorted(float(score) for score in best.best_k_models.values()) == pytest.approx(sorted(wanted), rel=1e-5)


def test_and_so_does_a_scheduler():
    seen = []

    class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics: Any, epoch: Any = None) -> None:
            seen.append(float(metrics))

    class Scheduled(MultiTaskModule):
        def configure_optimizers(self) -> Any:
            optimizer = still(self.parameters())
            plateau = {"scheduler": Plateau(optimizer), "interval": "step", "monitor": "train/loss/kind"}
            return {"optimizer": optimizer, "lr_scheduler": plateau}

    model = Scheduled(mlp(), three_tasks())
    trainer().fit(model, loader(128))
    assert seen == pytest.approx([by_hand(model, batch)["kind"].item() for batch in batches(128)], rel=1e-5)


class TwoOptimizers(MultiTaskModule):
    def __init__(self) -> None:
        super().__init__(mlp(), three_tasks(), "pcgrad")
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return still(self.encoder.parameters()), still(self.tasks.parameters())


@pytest.mark.parametrize("every", [1, 2, 3, 4])
def test_two_optimizers_by_hand(every, tmp_path):
    log, model = CSVLogger(tmp_path), TwoOptimizers()
    trainer(logger=log, log_every_n_steps=every).fit(model, loader(128))
    logged, steps = rows_of(log), [step for step in range(8) if (step + 1) % every == 0]
    assert {tuple(logged[key]) for key in (*losses("train"), "balance/conflict", "balance/weight/kind")} == {
        tuple(steps)
    }
    for step in steps:
        assert {key: logged[key][step] for key in losses("train")} == of(model, batches(128)[step])


def test_after_a_resume_in_the_middle_of_an_epoch(tmp_path):
    def fit(*callbacks: L.Callback, **options: Any) -> None:
        saved = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        runner = trainer(callbacks=[saved, *callbacks], enable_checkpointing=True)
        runner.fit(module(), loader(128), **options)

    fit()
    watch = Watch()
    with pytest.warns(UserWarning, match="not resumable"):
        fit(watch, ckpt_path=tmp_path / "step=3.ckpt")
    assert losses("train") <= set(watch.seen[1])
    assert losses("train") <= {"train/loss", *watch.bar[1]}


def test_most_steps_log_nothing(monkeypatch):
    """Which takes half as long as the step of a small network."""
    steps, log = [], MultiTaskModule.log

    def counted(self: Any, name: str, *args: Any, **options: Any) -> None:
        steps.append(self.trainer.global_step)
        log(self, name, *args, **options)

    monkeypatch.setattr(MultiTaskModule, "log", counted)
    trainer(log_every_n_steps=20, max_epochs=2).fit(module(), loader(32 * 16))
    assert sorted(set(steps)) == [0, 19, 31, 32, 39, 59, 63]


def test_a_step_by_hand_after_a_fit_logs_nothing():
    model = module("pcgrad")
    trainer(log_every_n_steps=1).fit(model, loader())
    model.training_step(batches()[0], 0).backward()


def test_nor_does_one_in_validation():
    class Curious(MultiTaskModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/seen", self.training_step(batch, batch_idx))

    runner = trainer()
    model = Curious(mlp(), three_tasks(), optimizer=still)
    runner.validate(model, loader(), verbose=False)
    assert set(runner.callback_metrics) == {"val/seen"}
