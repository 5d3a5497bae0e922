"""A real W&B run, offline, read back from its own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.image
import numpy
import pytest
import torch
import torch.nn.functional as F
import wandb
from lightning.pytorch.loggers import WandbLogger

from lightning_mtl import MultiTaskModule
from lightning_mtl.balancers.registry import spelled_out
from lightning_mtl.callbacks import ConflictHeatmap, FinalTable
from tests.callbacks.wandb_reader import Run, read
from tests.nets import loader, module, samples, trainer

NAMES = ("kind", "size", "shape")
SPEC = {"class_path": "pcgrad", "init_args": {"seed": 3}}


class Grams(L.Callback):
    """Keeps the gram of every step, to compare with what was drawn."""

    def __init__(self) -> None:
        self.grams: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.grams.append(pl_module.last_balance.gram)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, MultiTaskModule, list[torch.Tensor]]:
    """Two epochs of four steps with validation, then a test; the run, the module as it ended, and the grams."""
    folder = tmp_path_factory.mktemp("wandb")
    logger = WandbLogger(project="lightning-mtl", save_dir=folder, offline=True)
    keep = Grams()
    runner = trainer(
        logger=logger, callbacks=[keep, ConflictHeatmap(), FinalTable()], log_every_n_steps=1, max_epochs=2
    )
    model = module(SPEC)
    runner.fit(model, loader(), loader(32, seed=1))
    runner.test(model, loader(32, seed=2), verbose=False)
    logger.experiment.finish()
    # Ends the service too: `finish` returns before the last records are in the file.
    wandb.teardown()
    return read(folder), model, keep.grams


def by_hand(model: MultiTaskModule, seed: int) -> dict[tuple[str, str], float]:
    """Losses and metrics of 32 samples, in the order of the table."""
    x, targets = samples(32, seed)
    with torch.no_grad():
        z = model.encoder(x)
        kind, size, shape = (model.tasks[name].head(z) for name in NAMES)
    off = {"size": size.squeeze(1) - targets["size"], "shape": shape - targets["shape"]}
    mse, mae = ({name: error.pow(p).abs().mean().item() for name, error in off.items()} for p in (2, 1))
    return {
        ("kind", "loss"): F.cross_entropy(kind, targets["kind"]).item(),
        ("kind", "accuracy"): (kind.argmax(1) == targets["kind"]).double().mean().item(),
        ("size", "loss"): mse["size"],
        ("size", "mse"): mse["size"],
        ("size", "mae"): mae["size"],
        ("shape", "loss"): mae["shape"],
        ("shape", "mse"): mse["shape"],
        ("shape", "mae"): mae["shape"],
    }


def test_scalars_are_there_for_every_step(finished):
    run, _, _ = finished
    keys = ["train/loss", "balance/conflict"]
    keys += [f"{kind}/{name}" for kind in ("train/loss", "balance/weight", "balance/norm") for name in NAMES]
    keys += [f"balance/cosine/{pair}" for pair in ("kind/size", "kind/shape", "size/shape")]
    assert all(list(run.scalars(key)) == list(range(8)) for key in keys)


def test_scalars_are_those_of_the_balance(finished):
    run, _, grams = finished
    for step, gram in enumerate(grams):
        assert run.scalars("balance/norm/size")[step] == pytest.approx(gram[1, 1].sqrt().item(), rel=1e-6)
        cosine = gram[0, 2] / (gram[0, 0] * gram[2, 2]).sqrt()
        assert run.scalars("balance/cosine/kind/shape")[step] == pytest.approx(cosine.item(), rel=1e-5)


def test_evaluation_is_there_after_every_epoch(finished):
    run, model, _ = finished
    assert list(run.scalars("val/loss")) == list(run.scalars("val/kind/accuracy")) == [3, 7]
    assert list(run.scalars("test/loss")) == [8]
    wanted = by_hand(model, seed=1)
    assert run.scalars("val/loss/size")[7] == pytest.approx(wanted["size", "loss"], rel=1e-5)
    assert run.summary["val/kind/accuracy"] == pytest.approx(wanted["kind", "accuracy"])


def test_hyper_parameters(finished):
    run, _, _ = finished
    assert run.config["level"] == "parameters"
    assert run.config["balancer"] == spelled_out(SPEC)


@pytest.mark.parametrize("stage, seed", [("val", 1), ("test", 2)])
def test_the_final_table(finished, stage, seed):
    run, model, _ = finished
    table = run.table(f"final/{stage}")
    assert table["columns"] == ["stage", "task", "metric", "value"]
    wanted = by_hand(model, seed)
    assert [tuple(row[:3]) for row in table["data"]] == [(stage, *key) for key in wanted]
    assert [row[3] for row in table["data"]] == pytest.approx(list(wanted.values()), rel=1e-5)


def images(run: Run) -> list[Path]:
    logged = [row["balance/conflict_heatmap"] for row in run.history if "balance/conflict_heatmap" in row]
    assert all(value["_type"] == "images/separated" and value["format"] == "png" for value in logged)
    return [path for value in logged for path in run.media(value)]


def test_the_heatmap_is_a_png_of_a_sensible_size(finished):
    first, second = images(finished[0])
    assert first.read_bytes() != second.read_bytes()
    for path in (first, second):
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        height, width, _ = matplotlib.image.imread(path).shape
        assert 300 <= height <= width <= 1500


def test_the_heatmap_shows_the_mean_cosines(finished):
    """Each of the nine fields has the colour of its pair: bluer where the gradients agree more."""
    run, _, grams = finished
    for path, epoch in zip(images(run), (grams[:4], grams[4:]), strict=True):
        cosines = [gram / (gram.diagonal()[:, None] * gram.diagonal()).sqrt() for gram in epoch]
        mean = torch.stack(cosines).mean(0)
        wanted = matplotlib.colormaps["RdBu"]((mean.numpy() + 1) / 2)[..., :3]
        pixels = matplotlib.image.imread(path)[..., :3].reshape(-1, 3)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            share = (numpy.abs(pixels - wanted[i, j]).max(1) < 0.02).mean()
            assert share > 0.04, f"{NAMES[i]}, {NAMES[j]}: {share:.3f} of the picture"
