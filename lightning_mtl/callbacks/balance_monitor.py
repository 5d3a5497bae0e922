"""Log the balance of a step as scalars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import lightning.pytorch as pl
import torch

from lightning_mtl.callbacks.new_balance import NewBalance
from lightning_mtl.checks import check_integer
from lightning_mtl.compat import log_step, logs_now
from lightning_mtl.linalg import conflict, cosines
from lightning_mtl.types import Balance

MOST_WITH_PAIRS = 8


class BalanceMonitor(pl.Callback):
    """Log weights, gradient norms and conflicts to every logger of the Trainer, and to ``callback_metrics``.

    Modules built on ``Balanced`` add one by themselves; pass your own to the Trainer to change ``every_n_steps``.

    Args:
        every_n_steps: optimizer steps from one log to the next; by default the steps in which the Trainer logs.
        cosines: whether to log the cosine of every pair of tasks, ``T (T - 1) / 2`` scalars (8,128 for 128 tasks); by
            default for up to 8 tasks.

    Logs ``balance/weight/{task}``, and where the balancer has a gram ``balance/norm/{task}``,
    ``balance/cosine/{a}/{b}`` and ``balance/conflict``, the share of task pairs with a negative cosine. If a name has a
    slash, a bar parts the pairs: ``balance/cosine/{a} | {b}``.

    Each number is logged once: the weights of the newest balance since the last log, and what comes from a gram of the
    newest one that was solved since then (a balancer with ``every_n_steps`` does not solve in every step). Without a
    new balance, as with a frozen encoder, nothing is logged.
    Raises: ``ValueError`` if ``every_n_steps`` is not >= 1.
    """

    def __init__(self, every_n_steps: int | None = None, cosines: bool | None = None) -> None:
        if every_n_steps is not None:
            check_integer(every_n_steps, "every_n_steps", self, low=1)
        self.every_n_steps, self.cosines = every_n_steps, cosines
        self._last_step = 0
        self._balances = NewBalance()
        # Since the last log.
        self._newest: Balance | None = None
        self._solved: Balance | None = None
        self._shown: set[str] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from here: a resumed run does not start at 0."""
        self._last_step = trainer.global_step
        self._balances.start(pl_module)
        self._newest = self._solved = None

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look: of several backwards in a step another one may be the one that solved."""
        balance = self._balances.take(pl_module)
        if balance is not None:
            self._newest = balance
            if balance.gram is not None:
                self._solved = balance

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, in every n-th optimizer step."""
        self.on_after_backward(trainer, pl_module)  # who optimizes by hand may call backward past Lightning
        before, self._last_step = self._last_step, trainer.global_step
        # By hand, optimizers may step in none of the batches in which the Trainer logs.
        by_hand = self.every_n_steps is None and not pl_module.automatic_optimization
        if (trainer.global_step > before or by_hand) and self._due(trainer, before):
            self._log(trainer)

    def _due(self, trainer: pl.Trainer, before: int) -> bool:
        if not cast(Any, trainer).log_every_n_steps:
            return False
        if self.every_n_steps is None:
            return logs_now(trainer)
        # With several optimizers a batch is several steps.
        return trainer.global_step // self.every_n_steps > before // self.every_n_steps

    def _log(self, trainer: pl.Trainer) -> None:
        """Past ``self.log``, which would write a number again in every later step of the epoch in which it is old."""
        scalars: dict[str, float] = {}
        if self._newest is not None:
            balance = self._newest if self._solved is None else replace(self._newest, gram=self._solved.gram)
            pairs = len(balance.names) <= MOST_WITH_PAIRS if self.cosines is None else self.cosines
            scalars = balance_scalars(balance, with_cosines=pairs)
        shown = {key: torch.tensor(value) for key, value in scalars.items()}
        for metrics in (trainer.callback_metrics, trainer.logged_metrics):
            metrics.update(shown)
            if not scalars:  # nothing is balanced any more
                for key in self._shown & set(metrics):
                    del metrics[key]
        self._shown |= set(shown)
        self._newest = self._solved = None
        for logger in trainer.loggers if scalars else ():
            logger.log_metrics({**scalars, "epoch": trainer.current_epoch}, step=log_step(trainer))
            logger.save()


def balance_scalars(balance: Balance, *, with_cosines: bool = True) -> dict[str, float]:
    """The scalars of a balance by their log keys."""
    names = balance.names
    scalars: dict[str, float] = {}
    if not (balance.finite and bool(balance.weights.isnan().all())):  # a method without weights
        scalars.update(zip((f"balance/weight/{name}" for name in names), balance.weights.tolist(), strict=True))
    if balance.gram is not None:
        norms = balance.gram.diagonal().clamp(min=0).sqrt().tolist()
        scalars.update(zip((f"balance/norm/{name}" for name in names), norms, strict=True))
        scalars["balance/conflict"] = conflict(balance.gram)
        if with_cosines:
            matrix, bar = cosines(balance.gram).tolist(), _between(names)
            for i, a in enumerate(names):
                for j in range(i + 1, len(names)):
                    scalars[f"balance/cosine/{a}{bar}{names[j]}"] = matrix[i][j]
    return scalars


def _between(names: Sequence[str]) -> str:
    """What parts two names so that no two pairs have one key: a slash, or more bars than any name has in a row."""
    if not any("/" in name for name in names):
        return "/"
    bars = "|"
    while any(bars in name for name in names):
        bars += "|"
    return f" {bars} "
