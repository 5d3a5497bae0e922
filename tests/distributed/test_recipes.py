"""The recipes' own models on their own data: two processes with half of each batch end where one process ends."""

from itertools import product

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
