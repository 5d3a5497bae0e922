"""Log the balance of a step as scalars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch

from lightning_mtl.checks import check_integer
from lightning_mtl.linalg import conflict, cosines
from lightning_mtl.types import Balance

MOST_WITH_PAIRS = 8


class BalanceMonitor(pl.Callback):
    """Log weights, gradient norms and conflicts through ``self.log``, so that any logger carries them.

    Modules built on ``Balanced`` add one by themselves; pass your own to the Trainer to change ``every_n_steps``.

    Args:
        every_n_steps: optimizer steps from one log to the next; by default the Trainer's ``log_every_n_steps``.
        cosines: whether to log the cosine of every pair of tasks, ``T (T - 1) / 2`` scalars (8,128 for 128 tasks); by
            default for up to 8 tasks.

    Logs ``balance/weight/{task}``, and where the balancer has a gram ``balance/norm/{task}``,
    ``balance/cosine/{a}/{b}`` and ``balance/conflict``, the share of task pairs with a negative cosine. If a name has a
    slash, a bar parts the pairs: ``balance/cosine/{a} | {b}``.
    Raises: ``ValueError`` if ``every_n_steps`` is not >= 1.
    """

    def __init__(self, every_n_steps: int | None = None, cosines: bool | None = None) -> None:
        if every_n_steps is not None:
            check_integer(every_n_steps, "every_n_steps", self, low=1)
        self.every_n_steps, self.cosines = every_n_steps, cosines
        self._last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from here: a resumed run does not start at 0."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, in every n-th optimizer step."""
        balance = getattr(pl_module, "last_balance", None)
        step = trainer.global_step
        stepped, self._last_step = step > self._last_step, step
        usual: int = cast(Any, trainer).log_every_n_steps
        every = self.every_n_steps or usual
        if not isinstance(balance, Balance) or not stepped or not every or step % every:
            return
        pairs = len(balance.names) <= MOST_WITH_PAIRS if self.cosines is None else self.cosines
        scalars = balance_scalars(balance, with_cosines=pairs)
        if every == usual:
            pl_module.log_dict(scalars, batch_size=1)
            return
        # Lightning would write these in the steps in which it logs only, and there again and again.
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in scalars.items()})
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=step - 1)


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
