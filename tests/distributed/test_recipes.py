"""The recipes' own models on their own data: two processes with half of each batch end where one process ends."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from tests.distributed.runs import Run

BAR = 1e-5  # Adam divides by the size of a gradient: rounding is not damped as with SGD
RUNS = [
    Run(balancer, level, do="recipe", model=model)
    for model, (balancer, level) in product(
        ("multidigits", "digit_attributes"),  # labels are missing in the second, unevenly
        [("fixed", "parameters"), ("uncertainty", "parameters"), ("pcgrad", "parameters"), ("gradnorm", "features")],
    )
]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_parameters_equal_one_process(run, together, alone):
    first, second = together(run)
    assert torch.equal(first["network"], second["network"])
    assert (first["network"] - alone(run)["network"]).abs().max() <= BAR


@pytest.mark.parametrize("run", RUNS[:1], ids=str)
def test_the_training_moved(run, alone):
    moved = alone(run)["network"] - alone(Run(**{**vars(run), "steps": 1}))["network"]
    assert moved.abs().max() > 100 * BAR


@pytest.mark.parametrize("balancer", ["fixed", "pcgrad"])
def test_launched_on_two_processes_no_gradient_is_copied_for_its_strides(balancer, tmp_path):
    """The default recipe holds its weights channels last; torch warns, on each process, of a gradient that does not."""
    root = Path(__file__).parents[2]
    options = {"devices": 2, "strategy": "ddp", "accelerator": "cpu", "max_epochs": 1, "limit_train_batches": 3}
    words = [f"--trainer.{key}={value}" for key, value in options.items()]
    done = subprocess.run(
        [sys.executable, str(root / "recipes" / "multidigits.py"), "fit", f"--model.balancer={balancer}", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONWARNINGS": "error:Grad strides", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "strides" not in done.stdout + done.stderr
    assert "GLOBAL_RANK: 1" in done.stdout + done.stderr
