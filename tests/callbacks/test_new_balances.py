"""A balance is shown once: neither missed, because logged steps are not those that solve, nor shown when it is old."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_mtl import Balanced
from lightning_mtl.callbacks import BalanceMonitor, ConflictHeatmap
from tests.nets import WIDTH, loader, mlp, trainer
from tests.test_logs import batches, rows_of, still

NAMES = ("a", "b")


class Own(Balanced, L.LightningModule):
    """Two tasks, and an optimizer that moves nothing: every gram can be found again."""

    def __init__(self, every_n_steps: int = 1) -> None:
        torch.manual_seed(0)
        balancer = {"class_path": "pcgrad", "init_args": {"every_n_steps": every_n_steps}}
        super().__init__(tasks=NAMES, balancer=balancer)
        self.encoder, self.a, self.b = mlp(), nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 1)

    def losses(self, batch: Any) -> dict[str, Tensor]:
        z = self.encoder(batch[0])
        return {"a": self.a(z).square().mean(), "b": (self.b(z) - 1).abs().mean()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return self.balance(self.losses(batch))

    def configure_optimizers(self) -> Any:
        return still(self.parameters())


class ByHand(Own):
    """Several backwards per batch, several optimizers, of which one steps in every ``often``-th batch."""

    def __init__(self, every_n_steps: int = 1, backwards: int = 1, often: int = 1) -> None:
        super().__init__(every_n_steps)
        self.backwards, self.often, self.automatic_optimization = backwards, often, False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(self.backwards):
            self.manual_backward(self.balance(self.losses(batch)))
        if batch_idx % self.often == 0:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return still(self.encoder.parameters()), still([*self.a.parameters(), *self.b.parameters()])


class Alternate(Own):
    """Balances in every second batch only."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(self.losses(batch).values()) if batch_idx % 2 else super().training_step(batch, batch_idx)


class Freeze(L.Callback):
    """Freezes the encoder before a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch * trainer.num_training_batches + batch_idx == self.batch:
            pl_module.encoder.requires_grad_(False)


def run(model: L.LightningModule, folder: Path, size: int = 256, **options: Any) -> dict[str, dict[int, float]]:
    log = CSVLogger(folder)
    trainer(logger=log, **({"log_every_n_steps": 4} | options)).fit(model, loader(size))
    return rows_of(log)


def norm(model: Own, batch: Any, name: str = "a") -> float:
    grads = torch.autograd.grad(model.losses(batch)[name], list(model.encoder.parameters()))
    return torch.cat([grad.flatten() for grad in grads]).norm().item()


def of_solved(model: Own, solved: dict[int, int], size: int = 256) -> Any:
    """Step of the log -> the norm at the batch that was solved."""
    data = batches(size)
    return pytest.approx({step: norm(model, data[batch]) for step, batch in solved.items()}, rel=1e-5)


@pytest.mark.parametrize(
    "every, solved",
    [
        (1, {3: 3, 7: 7, 11: 11, 15: 15}),
        (2, {3: 2, 7: 6, 11: 10, 15: 14}),
        (3, {3: 3, 7: 6, 11: 9, 15: 15}),
        (4, {3: 0, 7: 4, 11: 8, 15: 12}),
        (8, {3: 0, 11: 8}),  # and not again in steps 7 and 15
        (16, {3: 0}),
    ],
)
def test_steps_that_are_logged_need_not_solve(every, solved, tmp_path):
    model = Own(every)
    logged = run(model, tmp_path)
    assert logged["balance/norm/a"] == of_solved(model, solved)
    assert list(logged["balance/cosine/a/b"]) == list(logged["balance/conflict"]) == list(solved)
    assert list(logged["balance/weight/a"]) == [3, 7, 11, 15]


def test_nor_those_of_a_pace_of_its_own(tmp_path):
    model = Own(4)
    logged = run(model, tmp_path, callbacks=[BalanceMonitor(every_n_steps=3)])
    assert logged["balance/norm/a"] == of_solved(model, {2: 0, 5: 4, 8: 8, 14: 12})


def test_nor_those_that_balance(tmp_path):
    model = Alternate()
    logged = run(model, tmp_path)
    assert logged["balance/norm/a"] == of_solved(model, {3: 2, 7: 6, 11: 10, 15: 14})


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("every, before", [(1, range(5)), (2, [1, 3, 5])])
def test_what_is_old_is_not_shown_again(every, before, accumulate, tmp_path):
    """In the middle of an epoch and in later ones; one that was not shown yet is, once."""
    options = {"log_every_n_steps": every, "accumulate_grad_batches": accumulate, "max_epochs": 3}
    heatmap = ConflictHeatmap(every_n_epochs=9)
    added = []
    heatmap._draw = lambda trainer, matrix, epoch: None
    heatmap._mean = lambda total: added.append(int(heatmap._count[0, 1])) or total
    callbacks = [Freeze(5 * accumulate), heatmap]
    logged = run(Own(), tmp_path, size=128 * accumulate, callbacks=callbacks, **options)
    for key in ("weight/a", "norm/b", "cosine/a/b", "conflict"):
        assert list(logged[f"balance/{key}"]) == list(before)
    assert set(added) == {5 * accumulate}


def test_callbacks_find_nothing_old():
    runner = trainer(log_every_n_steps=1, callbacks=[Freeze(2)])
    runner.fit(Own(), loader())
    assert not [key for key in {*runner.callback_metrics, *runner.logged_metrics} if key.startswith("balance/")]


def test_what_an_earlier_fit_left_is_old():
    model = Own()
    trainer().fit(model, loader())
    model.encoder.requires_grad_(False)
    runner = trainer(log_every_n_steps=1)
    runner.fit(model, loader())
    assert model.last_balance is not None
    assert runner.callback_metrics == {}


@pytest.mark.parametrize("often", [1, 4])
@pytest.mark.parametrize("backwards", [1, 2, 3])
def test_by_hand(backwards, often, tmp_path):
    """A step is a batch, as for all that Lightning logs; the backward that solved need not be the last one."""
    model = ByHand(2 * backwards, backwards, often)
    logged = run(model, tmp_path)
    assert logged["balance/norm/a"] == of_solved(model, {3: 2, 7: 6, 11: 10, 15: 14})


@pytest.mark.parametrize(
    "every, steps", [(2, range(16)), (4, range(1, 16, 2)), (3, [1, 2, 4, 5, 7, 8, 10, 11, 13, 14])]
)
def test_a_pace_of_its_own_counts_optimizer_steps(every, steps, tmp_path):
    logged = run(ByHand(), tmp_path, callbacks=[BalanceMonitor(every_n_steps=every)])
    assert list(logged["balance/norm/a"]) == list(steps)


def test_a_heatmap_sees_every_backward():
    heatmap = ConflictHeatmap(every_n_epochs=9)
    counts = []
    heatmap._draw = lambda trainer, matrix, epoch: None
    heatmap._mean = lambda total: counts.append(int(heatmap._count[0, 1])) or total
    trainer(callbacks=[heatmap]).fit(ByHand(every_n_steps=2, backwards=3), loader(256))
    assert set(counts) == {3 * 16 // 2}
