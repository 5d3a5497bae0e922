"""The toy's functions are what the header says, and the balancers rank on it as published."""

import pytest
import torch

from lightning_mtl.cli.compare import load
from lightning_mtl.cli.comparison import Results, Row
from lightning_mtl.cli.folder import find

recipe = load(find("gradnorm_toy").path)
QUIET = [f"--trainer.enable_{what}=false" for what in ("progress_bar", "checkpointing", "model_summary")]
QUIET += ["--trainer.logger=false", "--trainer.accelerator=cpu", "--trainer.limit_val_batches=0"]


def test_the_functions_share_a_matrix_and_differ_in_scale():
    functions = recipe.Functions(seed=0)
    batch = functions.draw(500, torch.Generator().manual_seed(1))
    assert batch["input"].shape == (500, 250)
    assert batch["input"].square().sum(1).mean() == pytest.approx(1, abs=0.05)
    assert all(batch[name].shape == (500, 100) for name in recipe.NAMES)
    for name, scale in zip(recipe.NAMES, recipe.SCALES, strict=True):
        assert 0.9 * scale < batch[name].abs().max() <= scale
    matrices = functions.matrices.view(250, 10, 100).permute(1, 0, 2).flatten(1)
    # Variances 10 and 3.5: two tasks agree in 10 of 13.5 parts.
    assert torch.corrcoef(matrices)[0, 1:].mean() == pytest.approx(10 / 13.5, abs=0.02)
    assert matrices.var() == pytest.approx(13.5, rel=0.02)
    assert (recipe.SCALES[0], recipe.SCALES[-1]) == (1, 100)


def test_samples_are_fresh_and_follow_the_seed():
    data, again, other = recipe.ToyData(batches=3), recipe.ToyData(batches=3), recipe.ToyData(batches=3, seed=1)
    batches = [batch["input"] for batch in data.train_dataloader()]
    assert len(batches) == 3
    assert not torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], next(iter(again.train_dataloader()))["input"])
    assert not torch.equal(batches[0], next(iter(other.train_dataloader()))["input"])
    assert not torch.equal(data.functions.matrices, other.functions.matrices)


def left(seed, *words):
    cli = recipe.main(["fit", f"--seed_everything={seed}", "--trainer.max_steps=120", *QUIET, *words])
    (scores,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    return scores["test/progress"], cli.model


@pytest.mark.slow
def test_gradnorm_lies_between_equal_and_the_right_weights(monkeypatch, tmp_path):
    """The recipe's claim on one seed and 120 of its 600 steps."""
    monkeypatch.chdir(tmp_path)
    lines = {arm: line for arm, (line,) in recipe.COMPARE.arms.items()}
    equal, _ = left(0, *lines["equal"].split())
    gradnorm, model = left(0, *lines["gradnorm"].split())
    static, _ = left(0, *lines["static 1/scale²"].split())
    assert static < gradnorm < equal < 1.1
    weights = model.balancer.task_weights
    assert torch.equal(weights, weights.sort(descending=True).values)
    assert weights.sum() == pytest.approx(10)


def test_progress_starts_at_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cli = recipe.main(["fit", "--trainer.max_steps=1", "--trainer.log_every_n_steps=1", "--model.lr=0", *QUIET])
    assert cli.trainer.callback_metrics["train/progress"] == pytest.approx(1, abs=0.05)  # other samples
    (scores,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    assert scores["test/progress"] == pytest.approx(1)


def test_the_reading_follows_the_numbers():
    values = {"equal": 0.9, "uncertainty": 0.8, "gradnorm": 0.7, "static 1/scale²": 0.6}
    assert list(values) == list(recipe.COMPARE.arms)
    rows = [Row(arm, seed, {"progress": v + seed / 10}, 0.0, 1.0) for arm, v in values.items() for seed in (0, 1)]
    told = recipe.reading(Results(rows))
    assert told[0] == "gradnorm against equal: -0.200 ± 0.000, lower in 2 of 2 seeds."
    assert told[-1] == "From best to worst: static 1/scale², gradnorm, uncertainty, equal."
