"""The heatmap and the table where a logger takes neither: files in its folder; and TensorBoard's images."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import matplotlib.image
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_mtl.callbacks import ConflictHeatmap, FinalTable
from lightning_mtl.callbacks.conflict_heatmap import heatmap
from tests.nets import Samples, loader, module, samples, trainer


def table(path: Path) -> list[list[str]]:
    with path.open() as file:
        return list(csv.reader(file))


def test_the_table_is_a_csv_file(tmp_path):
    logger = CSVLogger(tmp_path)
    runner = trainer(logger=logger, callbacks=[FinalTable()], log_every_n_steps=1)
    model = module("pcgrad")
    runner.fit(model, loader(), loader(32, seed=1))
    val = {key: value.item() for key, value in runner.callback_metrics.items() if key.startswith("val/")}
    (test,) = runner.test(model, loader(32, seed=2), verbose=False)
    for stage, logged in {"val": val, "test": test}.items():
        head, *rows = table(Path(logger.log_dir, f"final_{stage}.csv"))
        assert head == ["stage", "task", "metric", "value"]
        assert [row[:3] for row in rows] == [
            [stage, "kind", "loss"],
            [stage, "kind", "accuracy"],
            [stage, "size", "loss"],
            [stage, "size", "mse"],
            [stage, "size", "mae"],
            [stage, "shape", "loss"],
            [stage, "shape", "mse"],
            [stage, "shape", "mae"],
        ]
        for _, task, metric, value in rows:
            key = f"{stage}/loss/{task}" if metric == "loss" else f"{stage}/{task}/{metric}"
            assert float(value) == pytest.approx(logged[key])


def test_without_validation_there_is_no_table(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(logger=logger, callbacks=[FinalTable()], log_every_n_steps=1).fit(module(), loader())
    assert not list(tmp_path.rglob("final*"))


def test_the_heatmap_is_a_png_file(tmp_path):
    logger = CSVLogger(tmp_path)
    callbacks = [ConflictHeatmap(key="balance/pairs"), FinalTable("end")]
    trainer(logger=logger, callbacks=callbacks, log_every_n_steps=1).fit(module("pcgrad"), loader(), loader(16))
    height, width, _ = matplotlib.image.imread(Path(logger.log_dir, "balance_pairs.png")).shape
    assert 300 <= height <= width <= 1500
    assert Path(logger.log_dir, "end_val.csv").is_file()


@pytest.mark.parametrize("every, steps", [(1, [4, 8, 12]), (2, [8, 12]), (5, [12])])
def test_the_heatmap_is_drawn_every_n_epochs_and_at_the_end(every, steps, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    options = {"logger": logger, "log_every_n_steps": 1, "max_epochs": 3}
    trainer(callbacks=[ConflictHeatmap(every)], **options).fit(module("pcgrad"), loader())
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert [image.step for image in events.Images("balance/conflict_heatmap")] == steps


def test_an_epoch_that_was_cut_short_is_drawn_too(tmp_path):
    logger = CSVLogger(tmp_path)
    options = {"logger": logger, "log_every_n_steps": 1, "max_epochs": 9, "max_steps": 6}
    trainer(callbacks=[ConflictHeatmap(every_n_epochs=4)], **options).fit(module("pcgrad"), loader())
    assert len(list(tmp_path.rglob("*.png"))) == 1


def test_a_loss_balancer_has_nothing_to_draw(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(logger=logger, callbacks=[ConflictHeatmap()], log_every_n_steps=1).fit(module("uncertainty"), loader())
    assert not list(tmp_path.rglob("*.png"))


def test_without_a_logger_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer(callbacks=[ConflictHeatmap(), FinalTable()]).fit(module("pcgrad"), loader(), loader(16))
    assert not list(tmp_path.iterdir())


def drawn(monkeypatch, data: DataLoader) -> torch.Tensor:
    """The cosines that a fit over ``data`` would draw."""
    callback, matrices = ConflictHeatmap(), []
    monkeypatch.setattr(callback, "_draw", lambda trainer, matrix, epoch: matrices.append(matrix))
    trainer(callbacks=[callback]).fit(module("pcgrad"), data)
    (matrix,) = matrices
    return matrix


def test_a_pair_counts_where_both_have_labels(monkeypatch):
    """In the first batch all have labels, in the second one has none: that pair's mean is the first batch's."""
    x, targets = samples(32)
    first = drawn(monkeypatch, DataLoader(Samples(x[:16], {k: t[:16] for k, t in targets.items()}), batch_size=16))
    gap = targets["size"].clone()
    gap[16:] = math.nan
    both = drawn(monkeypatch, DataLoader(Samples(x, targets | {"size": gap}), batch_size=16))
    torch.testing.assert_close(both[1], first[1])
    assert both[0, 2] != first[0, 2]


def test_a_pair_that_never_met_is_left_blank(monkeypatch):
    x, targets = samples(16)
    matrix = drawn(monkeypatch, DataLoader(Samples(x, targets | {"size": torch.full((16,), math.nan)}), batch_size=8))
    assert matrix.isnan().tolist() == [[False, True, False], [True, True, True], [False, True, False]]


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_the_numbers_stand_in_their_fields():
    matrix = torch.tensor([[1.0, -0.25, math.nan], [-0.25, 1.0, 0.5], [math.nan, 0.5, 1.0]])
    figure = heatmap(matrix, ("a", "b", "c"), "title")
    assert texts(figure) == ["-0.25", "-0.25", "+0.50", "+0.50"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["a", "b", "c"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b", "c"]
    assert figure.axes[0].get_title() == "title"


@pytest.mark.parametrize("num", [1, 2, 12, 13, 60])
def test_many_tasks_still_make_a_picture_of_a_sensible_size(num):
    figure = heatmap(torch.zeros(num, num), tuple(f"task_{i}" for i in range(num)), "title")
    FigureCanvasAgg(figure).draw()
    width, height = figure.get_size_inches() * figure.dpi
    assert 300 <= height <= width <= 2000
    assert len(texts(figure)) == (num * (num - 1) if num <= 12 else 0)
