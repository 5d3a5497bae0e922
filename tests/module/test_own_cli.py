"""A command line of one's own: what it saves, in its configuration and in checkpoints, it can load again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_mtl import Balanced, MultiTaskModule, to_plain_checkpoint
from lightning_mtl.balancers import BalancerSpec, PCGrad
from tests.module.written import Net, Step
from tests.nets import Samples, mlp, samples, three_tasks
from tests.versions import needs


class Typed(Net):
    def __init__(self, width: int = 4, rate: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder, self.lr = nn.Linear(5, 4), rate


class NoInit(Step, Balanced, Typed):
    """Its arguments are those of ``Balanced`` and of ``Typed``."""


class OwnInit(Step, Balanced, Typed):
    def __init__(self, balancer: str | dict[str, Any] = "fixed", **options: Any) -> None:
        super().__init__(tasks=["a", "b"], balancer=balancer, **options)


class Declared(MultiTaskModule):
    def __init__(self, balancer: BalancerSpec = "fixed", rate: float = 0.05) -> None:
        super().__init__(mlp(), three_tasks(), balancer)
        self.save_hyperparameters()
        self.lr = rate

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(Samples(*samples(16)), batch_size=8)


WORDS = {
    "short name": ["--model.balancer", "pcgrad"],
    "class path": ["--model.balancer", "lightning_mtl.balancers.PCGrad", "--model.balancer.seed", "3"],
    "class name": ["--model.balancer.class_path=PCGrad", "--model.balancer.init_args.seed=3"],
    "mapping": ['--model.balancer={"class_path": "pcgrad", "init_args": {"seed": 3}}'],
    "mapping of a class name": ['--model.balancer={"class_path": "PCGrad", "init_args": {"seed": 3}}'],
}
OF_JSONARGPARSE = (
    ".*Unable to serialize instance",  # options beside a name that it does not know
    "(?s).*Instantiating a subclass spec given as value for a type that accepts any value",
)
NESTED = '{"class_path": "chain", "init_args": {"then": {"class_path": "pcgrad", "init_args": {"seed": 3}}}}'
CASES = [
    *((NoInit, words) for words in WORDS),
    *((cls, words) for cls in (OwnInit, Declared) for words in ("short name", "mapping", "mapping of a class name")),
]


def line(cls: Any, args: list[str], folder: Path, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    defaults = {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": str(folder), "log_every_n_steps": 1} | quiet
    config = {"overwrite": True}
    return LightningCLI(
        cls, args=args, trainer_defaults=defaults, seed_everything_default=0, save_config_kwargs=config, **options
    ).model


def check(model: Any, words: str) -> None:
    assert type(model.balancer) is PCGrad
    assert model.balancer.seed == (0 if words == "short name" else 3)
    assert model.lr == 0.02


@pytest.mark.parametrize("cls, words", CASES)
def test_configuration_and_checkpoint_load_again(cls, words, tmp_path):
    tasks = ["--model.tasks=[a, b]"] if cls is NoInit else []
    check(line(cls, ["fit", *tasks, *WORDS[words], "--model.rate=0.02"], tmp_path), words)
    config, checkpoint = tmp_path / "config.yaml", next(tmp_path.rglob("*.ckpt"))
    assert "Unable to serialize" not in config.read_text()
    check(line(cls, ["fit", "--config", str(config)], tmp_path / "again"), words)
    check(cls.load_from_checkpoint(checkpoint), words)
    if cls is not Declared:
        plain = to_plain_checkpoint(checkpoint, tmp_path / "plain.ckpt")
        assert set(plain["hyper_parameters"]) == {"width", "rate", "_instantiator"}
        assert Typed.load_from_checkpoint(tmp_path / "plain.ckpt").lr == 0.02


@pytest.mark.parametrize("cls, words", CASES)
def test_configuration_and_checkpoint_load_together(cls, words, tmp_path):
    """Lightning merges the two, and jsonargparse then wants whole class paths of the checkpoint."""
    tasks = ["--model.tasks=[a, b]"] if cls is NoInit else []
    line(cls, ["fit", *tasks, *WORDS[words], "--model.rate=0.02"], tmp_path)
    files = ["--config", str(tmp_path / "config.yaml"), "--ckpt_path", str(next(tmp_path.rglob("*.ckpt")))]
    check(line(cls, ["fit", *files], tmp_path), words)


@pytest.mark.filterwarnings(*(f"ignore:{text}" for text in OF_JSONARGPARSE))
@pytest.mark.parametrize("cls", [NoInit, OwnInit, Declared])
def test_and_so_does_a_balancer_inside_another(cls, tmp_path):
    tasks = ["--model.tasks=[a, b]"] if cls is NoInit else []
    line(cls, ["fit", *tasks, f"--model.balancer={NESTED}", "--model.rate=0.02"], tmp_path)
    files = ["--config", str(tmp_path / "config.yaml"), "--ckpt_path", str(next(tmp_path.rglob("*.ckpt")))]
    (inner,) = (part for part in line(cls, ["fit", *files], tmp_path).balancer.modules() if isinstance(part, PCGrad))
    assert inner.seed == 3


@pytest.mark.filterwarnings(*(f"ignore:{text}" for text in OF_JSONARGPARSE))
@pytest.mark.parametrize("cls", [NoInit, OwnInit, Declared])
def test_options_after_a_short_name_reach_the_balancer_and_the_checkpoint(cls, tmp_path):
    needs("lightning", "2.5.5", "a command line that reads the checkpoint's settings")
    tasks = ["--model.tasks=[a, b]"] if cls is NoInit else []
    words = ["--model.balancer.class_path=pcgrad", "--model.balancer.init_args.seed=3", "--model.rate=0.02"]
    check(line(cls, ["fit", *tasks, *words], tmp_path), "mapping")
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    check(cls.load_from_checkpoint(checkpoint), "mapping")
    check(line(cls, ["fit", *tasks, "--ckpt_path", str(checkpoint)], tmp_path), "mapping")


def test_options_after_a_name_that_jsonargparse_forgets(tmp_path):
    with pytest.raises(ValueError, match="balancer: `balancer` must have a class_path beside its options, got 'seed'"):
        line(NoInit, ["fit", "--model.tasks=[a, b]", "--model.balancer=pcgrad", "--model.balancer.seed=3"], tmp_path)


def test_a_class_chosen_on_the_command_line(tmp_path):
    name = f"{NoInit.__module__}.NoInit"
    args = ["fit", f"--model={name}", "--model.tasks=[a, b]", "--model.balancer=pcgrad", "--model.rate=0.02"]
    check(line(L.LightningModule, args, tmp_path, subclass_mode_model=True), "short name")
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    check(NoInit.load_from_checkpoint(checkpoint), "short name")
    to_plain_checkpoint(checkpoint, tmp_path / "plain.ckpt")
    assert Typed.load_from_checkpoint(tmp_path / "plain.ckpt").lr == 0.02
