"""Draw which tasks conflict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only

from lightning_mtl.callbacks.new_balance import NewBalance
from lightning_mtl.checks import check_integer
from lightning_mtl.linalg import cosines

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ConflictHeatmap(pl.Callback):
    """Average the cosines between task gradients and draw them as a heatmap at the end of an epoch.

    Goes to every logger that takes images (Weights & Biases, TensorBoard); for the others a PNG is saved in their
    log folder. A balancer without a gram (a loss balancer) leaves nothing to draw. Needs matplotlib.

    Args:
        every_n_epochs: draw after each n-th epoch, the mean since the last drawing; the last one is always drawn.
        key: name of the image.

    A pair of tasks counts in the steps that solve and in which both have a gradient; one that never has is left blank.
    Raises: ``ValueError`` if ``every_n_epochs`` is not an integer >= 1.
    """

    def __init__(self, every_n_epochs: int = 1, key: str = "balance/conflict_heatmap") -> None:
        check_integer(every_n_epochs, "every_n_epochs", self, low=1)
        self.every_n_epochs, self.key = every_n_epochs, key
        self._sum: torch.Tensor | None = None
        self._count = torch.zeros(())
        self._names: tuple[str, ...] = ()
        self._balances = NewBalance()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave out what another fit has left."""
        self._balances.start(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Who optimizes by hand may call backward past Lightning."""
        self.on_after_backward(trainer, pl_module)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the cosines of each balance to the mean, once."""
        balance = self._balances.take(pl_module)
        if balance is not None and balance.gram is not None and bool(torch.isfinite(balance.gram).all()):
            matrix, there = cosines(balance.gram), balance.gram.diagonal() > 0
            both = (there[:, None] & there[None, :]).to(matrix)
            self._sum = matrix if self._sum is None else self._sum + matrix
            self._count = self._count + both
            self._names = balance.names

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw and start afresh."""
        epoch = trainer.current_epoch + 1
        if self._sum is not None and (epoch % self.every_n_epochs == 0 or epoch == trainer.max_epochs):
            self._draw(trainer, self._mean(self._sum), epoch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what an epoch that was cut short has left."""
        if self._sum is not None:
            self._draw(trainer, self._mean(self._sum), trainer.current_epoch + 1)

    def _mean(self, total: torch.Tensor) -> torch.Tensor:
        """The mean cosines ``[T, T]``, NaN for a pair never seen; starts afresh."""
        mean = total / self._count
        self._sum, self._count = None, torch.zeros(())
        return mean

    @rank_zero_only
    def _draw(self, trainer: pl.Trainer, matrix: torch.Tensor, epoch: int) -> None:
        figure = heatmap(matrix, self._names, f"mean gradient cosine, epoch {epoch}")
        for logger in cast("list[Any]", trainer.loggers):
            if hasattr(logger, "log_image"):
                logger.log_image(self.key, [figure], step=trainer.global_step)
            elif hasattr(logger.experiment, "add_figure"):
                logger.experiment.add_figure(self.key, figure, trainer.global_step)
            elif logger.log_dir:
                path = Path(logger.log_dir) / f"{self.key.replace('/', '_')}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path)


def heatmap(matrix: torch.Tensor, names: tuple[str, ...], title: str) -> Figure:
    """A labelled heatmap of cosines ``[T, T]``: red opposed, blue agreeing, grey where there is nothing to compare."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num = len(names)
    side = min(2.4 + 0.55 * num, 12.0)
    figure = Figure(figsize=(side + 1, side), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # A task always agrees with itself: left out, so that the pairs are what one sees.
    pairs = matrix.clone().fill_diagonal_(float("nan"))
    axes.set_facecolor("0.88")
    image = axes.imshow(pairs.numpy(), vmin=-1, vmax=1, cmap="RdBu")
    small = 10 if num <= 12 else 7
    plain: dict[str, Any] = {"fontsize": small, "parse_math": False}  # a dollar sign in a name is one
    axes.set_xticks(range(num), names, rotation=45, ha="right", rotation_mode="anchor", **plain)
    axes.set_yticks(range(num), names, **plain)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for edge in range(1, num):
        axes.axhline(edge - 0.5, color="white", linewidth=1.5)
        axes.axvline(edge - 0.5, color="white", linewidth=1.5)
    axes.set_title(title, fontsize=11)
    if num <= 12:
        for i, row in enumerate(pairs.tolist()):
            for j, value in enumerate(row):
                if value == value:  # not NaN
                    colour = "white" if abs(value) > 0.5 else "black"
                    axes.text(j, i, f"{value:+.2f}", ha="center", va="center", color=colour, fontsize=9)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[-1, -0.5, 0, 0.5, 1], label="cosine")
    bar.outline.set_visible(False)
    return figure
