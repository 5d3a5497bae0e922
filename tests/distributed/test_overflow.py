"""Half precision with a gradient scaler on two processes: one overflow, on process 1 only, and both skip the step."""

from itertools import pairwise, product

import pytest
import torch

from tests.distributed.runs import OVERFLOW, Run
from tests.nets import GRAM_BALANCERS, LEVELS

PAIRS = [("fixed", "parameters"), ("uncertainty", "parameters"), *product(GRAM_BALANCERS, LEVELS)]
# The loss of a task is infinite; or it is finite and its scaled gradient is not.
RUNS = [Run(*pair, do="half", labels=labels, steps=5) for pair, labels in product(PAIRS, ("inf", "huge"))]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_both_processes_skip_that_step_alone(run, together):
    for seen in together(run):
        stood = [torch.equal(before, after) for before, after in pairwise(seen["network"])]
        assert stood == [batch == OVERFLOW for batch in range(run.steps)]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_loss_scale_is_halved_once_on_both_processes(run, together):
    expected = [1024.0 if batch <= OVERFLOW else 512.0 for batch in range(run.steps + 1)]
    assert [seen["scale"] for seen in together(run)] == [expected, expected]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_balancer_state_does_not_move_in_that_step(run, together):
    for seen in together(run):
        before, after = seen["balancer"][OVERFLOW : OVERFLOW + 2]
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("run", [run for run in RUNS if run.balancer in GRAM_BALANCERS], ids=str)
def test_balancer_counts_finite_steps_only(run, together):
    expected = [0, 1, 2, 2, 3, 4]
    assert [[int(state["step"]) for state in seen["balancer"]] for seen in together(run)] == [expected, expected]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_both_processes_stay_equal(run, together):
    first, second = together(run)
    assert all(torch.equal(a, b) for a, b in zip(first["network"], second["network"], strict=True))
    torch.testing.assert_close(first["balancer"], second["balancer"], rtol=0, atol=0, equal_nan=True)
