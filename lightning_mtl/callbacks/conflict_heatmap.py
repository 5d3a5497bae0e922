"""Draw which tasks conflict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only

from lightning_mtl.linalg import cosines
from lightning_mtl.types import Balance

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ConflictHeatmap(pl.Callback):
    """Average the cosines between task gradients over an epoch and draw them as a heatmap.

    Goes to every logger that takes images (Weights & Biases, TensorBoard); for the others a PNG is saved in their
    log folder. A balancer without a gram (a loss balancer) leaves nothing to draw. Needs matplotlib.

    Args:
        every_n_epochs: draw after each n-th epoch; the last one is always drawn.
        key: name of the image.
    """

    def __init__(self, every_n_epochs: int = 1, key: str = "balance/conflict_heatmap") -> None:
        self.every_n_epochs, self.key = every_n_epochs, key
        self._sum: torch.Tensor | None = None
        self._count = 0
        self._names: tuple[str, ...] = ()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add this step's cosines to the mean."""
        balance: Balance | None = getattr(pl_module, "last_balance", None)
        if balance is not None and balance.gram is not None and bool(torch.isfinite(balance.gram).all()):
            matrix = cosines(balance.gram)
            self._sum = matrix if self._sum is None else self._sum + matrix
            self._count += 1
            self._names = balance.names

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw and start afresh."""
        epoch = trainer.current_epoch + 1
        if self._sum is not None and (epoch % self.every_n_epochs == 0 or epoch == trainer.max_epochs):
            self._draw(trainer, self._sum / self._count, epoch)
            self._sum, self._count = None, 0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what an epoch that was cut short has left."""
        if self._sum is not None:
            self._draw(trainer, self._sum / self._count, trainer.current_epoch + 1)
            self._sum, self._count = None, 0

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
                figure.savefig(path, dpi=150)


def heatmap(matrix: torch.Tensor, names: tuple[str, ...], title: str) -> Figure:
    """A labelled heatmap of cosines ``[T, T]``: red opposed, blue agreeing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = 2.4 + 0.55 * len(names)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(matrix.numpy(), vmin=-1, vmax=1, cmap="RdBu")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title(title)
    if len(names) <= 12:
        for i in range(len(names)):
            for j in range(len(names)):
                value = float(matrix[i, j])
                colour = "white" if abs(value) > 0.6 else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour)
    figure.colorbar(image, ax=axes, label="cosine")
    return figure
