"""The command line of a recipe: defaults, short forms, and mistakes."""

import csv
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from lightning_mtl.balancers import Fixed, GradNorm, PCGrad
from lightning_mtl.cli.compare import load
from tests.versions import needs

QUICK = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
DRY = [*QUICK, "--trainer.fast_dev_run=1"]


def test_defaults(recipe):
    cli = load(recipe).main(QUICK)
    assert cli.subcommand == "fit"
    assert cli.trainer.global_step == 4
    assert cli.datamodule.seed == 0
    assert torch.get_num_threads() == 1
    folder = Path("logs/small/version_0")
    assert Path(cli.trainer.logger.log_dir) == folder
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["lr"] == 0.1
    with (folder / "metrics.csv").open() as file:
        assert {"train/loss", "val/a/mae", "balance/weight/b"} <= set(next(csv.reader(file)))


def test_one_seed_reaches_the_data(recipe):
    first, again, other = (load(recipe).main([*DRY, f"--seed_everything={seed}"]) for seed in (1, 1, 2))
    assert first.datamodule.seed == 1
    inputs = [torch.stack([row["input"] for row in cli.datamodule.data]) for cli in (first, again, other)]
    assert torch.equal(inputs[0], inputs[1])
    assert not torch.equal(inputs[0], inputs[2])
    assert torch.equal(first.model.encoder.weight, again.model.encoder.weight)


def test_threads(recipe):
    try:
        load(recipe).main([*DRY, "--threads=2"])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test"])
def test_subcommands(recipe, subcommand):
    cli = load(recipe).main([subcommand, *DRY])
    stage = {"fit": "train", "validate": "val", "test": "test"}[subcommand]
    assert f"{stage}/loss/a" in cli.trainer.callback_metrics


@pytest.mark.parametrize(
    "arguments, kind, option",
    [
        (["--model.balancer", "gradnorm"], GradNorm, {"alpha": 0.0}),
        (["--model.balancer=gradnorm", "--model.balancer.alpha=0.5"], GradNorm, {"alpha": 0.5}),
        (["--model.balancer=GradNorm", "--model.balancer.alpha=0.5"], GradNorm, {"alpha": 0.5}),
        (["--model.balancer.class_path=lightning_mtl.balancers.PCGrad"], PCGrad, {}),
        (["--model.balancer", "fixed", "--model.balancer.weights", '{"a": 0.5}'], Fixed, {}),
        (["--config", "small_pcgrad"], PCGrad, {}),
        (["--config=small_pcgrad.yaml"], PCGrad, {}),
        (["-c", "configs/small_pcgrad.yaml"], PCGrad, {}),
    ],
)
def test_a_balancer_can_be_named_in_every_form(recipe, arguments, kind, option):
    balancer = load(recipe).main([*DRY, *arguments]).model.balancer
    assert type(balancer) is kind
    assert {name: getattr(balancer, name) for name in option} == option
    if kind is Fixed:
        assert balancer.task_weights.tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    "arguments, texts",
    [
        (["--model.balancr=pcgrad"], ["Did you mean model.balancer?", "Valid keys: model.balancer", "model.lr"]),
        (["--trainer.max_epoch=3"], ["Did you mean trainer.max_epochs?"]),
        (["--sed=3"], ["Valid keys:", "seed_everything"]),
        (["--config=typo.yaml"], ["does not accept option 'model.balancr'", "Did you mean model.balancer?"]),
        (["--config=absent"], ["absent"]),
        (["--model.balancer=pcgard"], ["'mgda', 'moco', 'modo'", "got 'pcgard'", "perhaps 'pcgrad' was meant"]),
        (["--config=unknown.yaml"], ["'mgda', 'moco', 'modo'", "got 'pcgard'", "perhaps 'pcgrad' was meant"]),
        (["--model.balancer=gradnorm", "--model.balancer.alhpa=1"], ["GradNorm: `alhpa`", "'alpha', 'lr'"]),
        (["--model.balancer=gradnorm", "--model.balancer.alpha=high"], ["Got value: high"]),
        (
            ["--model.balancer=gradnorm", "--model.balancer.alpha=-1"],
            ["GradNorm: `alpha` must be a finite number >= 0"],
        ),
        (["--model.lr=fast"], ['"model.lr"', "fast"]),
        (["fti"], ["invalid choice: 'fti'", "fit"]),
    ],
)
def test_a_mistake_names_the_choices_and_exits_with_2(recipe, capsys, arguments, texts):
    Path("typo.yaml").write_text("model:\n  balancr: pcgrad\n")
    Path("unknown.yaml").write_text("model:\n  balancer: pcgard\n")
    with pytest.raises(SystemExit, match="2"):
        load(recipe).main([*arguments, *DRY] if "fti" in arguments else [*DRY, *arguments])
    printed = capsys.readouterr().err
    assert "small.py: error: " in printed
    assert "Traceback" not in printed
    assert all(text in printed for text in texts), printed


def test_an_error_of_the_recipe_itself_keeps_its_traceback(recipe):
    with pytest.raises(KeyError, match="nothing"):
        load(recipe).main([*DRY, "--model.tasks=[nothing]"])


def test_help_lists_the_subcommands(recipe, capsys):
    with pytest.raises(SystemExit, match="0"):
        load(recipe).main(["--help"])
    assert "{fit,validate,test,predict}" in capsys.readouterr().out


def test_a_checkpoint_brings_its_balancer_and_tasks(recipe):
    needs("lightning", "2.5.5", "a command line that reads the checkpoint's settings")
    module = load(recipe)
    module.main([*QUICK, "--model.balancer=gradnorm", "--model.balancer.alpha=0.5", "--model.tasks=[b]"])
    (checkpoint,) = Path("logs/small/version_0/checkpoints").iterdir()
    with warnings.catch_warnings():
        # Lightning tells that the new run has a folder of its own.
        warnings.filterwarnings("ignore", "The dirpath has changed")
        cli = module.main(["test", *QUICK, f"--ckpt_path={checkpoint}"])
    assert cli.model.balancer.alpha == 0.5
    assert cli.model.task_names == ("b",)
    assert "test/b/mae" in cli.trainer.callback_metrics
