"""Every recipe and every config trains, on one process and on two, and its header says how."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import lightning_mtl
from lightning_mtl.cli.compare import load
from lightning_mtl.cli.folder import find, recipes

RECIPES = recipes()
DEFAULT = find("multidigits")
CONFIGS = [(recipe, path) for recipe in RECIPES for path in recipe.configs]
HEADER = ("Run:", "Override:", "Expect:")
TWO_STEPS = ["--trainer.fast_dev_run=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


@pytest.mark.parametrize("recipe, config", CONFIGS, ids=lambda value: getattr(value, "stem", value.name))
def test_two_steps_with_every_config(recipe, config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    trainer = load(recipe.path).main(["fit", f"--config={config}", *TWO_STEPS]).trainer
    assert trainer.global_step == 2
    assert torch.isfinite(trainer.callback_metrics["val/loss"])


def test_the_configs_that_the_pages_name_are_there():
    shipped = {path.stem for path in DEFAULT.configs}
    assert shipped >= {f"multidigits_{name}" for name in ("fixed", "uncertainty", "pcgrad", "gradnorm")}


# From losses, from the gram, on rows, on halves of a batch, and made from another.
@pytest.mark.parametrize("balancer", ["dwa", "famo", "nash", "gradvac", "graddrop", "modo", "clip_update"])
def test_any_balancer_by_its_name(balancer, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    trainer = load(DEFAULT.path).main(["fit", f"--model.balancer={balancer}", *TWO_STEPS]).trainer
    assert trainer.global_step == 2
    assert torch.isfinite(trainer.callback_metrics["val/loss"])


@pytest.mark.parametrize("recipe, config", CONFIGS, ids=lambda value: getattr(value, "stem", value.name))
def test_a_config_says_how_it_is_run(recipe, config):
    text = config.read_text()
    assert all(f"# {word}" in text for word in HEADER)
    assert f"lightning-mtl run {recipe.name} --config {config.stem}\n" in text
    assert yaml.safe_load(text)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_says_how_it_is_run(recipe):
    text = recipe.path.read_text()
    assert all(f"\n{word}" in text for word in HEADER)
    assert f"lightning-mtl run {recipe.name}\n" in text


@pytest.mark.parametrize("tasks", ["[left]", "[rec]", "[left,right]", "[rec,left]"])
@pytest.mark.parametrize("level", ["parameters", "features"])
def test_any_tasks_at_any_level(tasks, level, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", f"--model.tasks={tasks}", f"--model.level={level}", "--model.balancer=pcgrad", *TWO_STEPS]
    assert load(DEFAULT.path).main(arguments).trainer.global_step == 2


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_the_other_subcommands(subcommand, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load(DEFAULT.path).main([subcommand, *TWO_STEPS]).subcommand == subcommand


def test_the_logger_in_the_header(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    wandb = "--trainer.logger WandbLogger --trainer.logger.project multidigits --trainer.logger.offline true"
    assert wandb in DEFAULT.path.read_text()
    cli = load(DEFAULT.path).main(["fit", *wandb.split(), *TWO_STEPS[1:], "--trainer.max_steps=2"])
    assert type(cli.trainer.logger).__name__ == "WandbLogger"
    cli.trainer.logger.experiment.finish()


@pytest.mark.distributed
def test_two_processes_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "lightning_mtl.cli", "run", DEFAULT.name, "--trainer.devices=2"]
    options = [*TWO_STEPS, "--model.balancer=pcgrad", "--trainer.enable_model_summary=false"]
    environment = os.environ | {"PYTHONPATH": str(Path(lightning_mtl.__file__).parents[1])}
    done = subprocess.run(
        [*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "MEMBER: 2/2" in done.stderr
    assert "`max_steps=2` reached" in done.stderr
