"""A recipe as small as one can be, for the command line and the comparison."""

from pathlib import Path

import pytest

RECIPE = '''"""The smallest recipe."""

from collections.abc import Callable

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_mtl import MultiTaskModule
from lightning_mtl.balancers import Balancer
from lightning_mtl.cli.comparison import Comparison, Curves
from lightning_mtl.cli.recipe_cli import RecipeCLI
from lightning_mtl.tasks import RegressionTask


class Small(MultiTaskModule):
    """Two regressions."""

    def __init__(
        self,
        balancer: Callable[[int], Balancer] | str = "fixed",
        tasks: list[str] = ["a", "b"],
        level: str = "parameters",
        lr: float = 0.1,
    ) -> None:
        every_task = {name: RegressionTask(nn.Linear(3, 1)) for name in ("a", "b")}
        super().__init__(nn.Linear(4, 3), {name: every_task[name] for name in tasks}, balancer, level)
        self.save_hyperparameters()


class Noise(L.LightningDataModule):
    def __init__(self, rows: int = 16, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, 4, generator=generator)
        self.seed = seed
        self.data = [{"input": row, "a": row[0], "b": -row[0]} for row in x]

    def loader(self) -> DataLoader:
        return DataLoader(self.data, batch_size=8)

    train_dataloader = val_dataloader = test_dataloader = loader


def main(args=None):
    return RecipeCLI(__file__, Small, Noise, trainer_defaults={"max_epochs": 2, "log_every_n_steps": 1}, args=args)


COMPARE = Comparison(
    arms={
        "alone": ["--model.tasks=[a]", "--model.tasks=[b]"],
        "equal": [""],
        "pcgrad": ["--config=small_pcgrad"],
    },
    scores={"a/mae": False, "b/mae": False},
    base="alone",
    reading=lambda results: [f"Equal has {results.of('equal', 'delta_m')[0]:.1f} percent."],
    curves=[Curves("Conflict", "cosine", "pcgrad", {"balance/cosine/a/b": "a and b"})],
)


if __name__ == "__main__":
    main()
'''


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a small recipe with one config, in the working directory."""
    path = tmp_path / "small.py"
    path.write_text(RECIPE)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small_pcgrad.yaml").write_text("model:\n  balancer: pcgrad\n")
    monkeypatch.chdir(tmp_path)
    return path
