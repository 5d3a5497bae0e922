"""Learned scales that the balancer moves itself are equal on all processes, whatever labels and accumulation."""

import pytest

from tests.distributed.equality import assert_parameters_equal, assert_states_equal
from tests.distributed.runs import Run

MANNERS = [{}, {"accumulate": 2, "clip": 0.5}, {"labels": "one_rank"}, {"labels": "nowhere"}, {"model": "features"}]
RUNS = [Run(f"{key}_adam", steps=6, **manner) for key in ("uncertainty", "imtl_l", "imtl") for manner in MANNERS]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_it_equals_one_process(run, together, alone):
    assert_parameters_equal(run, together, alone)
    assert_states_equal(run, together, alone, bar=1e-5)
    one, other = together(run)
    assert all(
        value.equal(other["balancer"][name]) for name, value in one["balancer"].items() if name != "last_weights"
    )
