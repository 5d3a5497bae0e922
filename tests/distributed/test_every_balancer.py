"""Every balancer: two processes with half of each batch end where one process with the whole batches ends."""

import pytest

from lightning_mtl.balancers import GramBalancer, LossBalancer, available, load
from tests.distributed.equality import assert_parameters_equal, assert_states_equal
from tests.distributed.runs import OVERFLOW, Run
from tests.nets import BALANCERS

# Those of the other files of this folder are left out; a loss balancer takes no rows, so that one level will do.
NEW = {key: load(key, 3) for key in available() if key not in BALANCERS}
PLACES = [
    (key, level)
    for key, balancer in NEW.items()
    for level in balancer.levels
    if not (level == "features" and (isinstance(balancer, LossBalancer) or key == "metabalance"))
]
MANNERS = {
    "plain": {},
    "clipped": {"accumulate": 2, "clip": 0.5, "ddp": "bucket_view"},
    "one_rank": {"labels": "one_rank"},
    "nowhere": {"labels": "nowhere"},
    "features": {"model": "features"},
}
RUNS = [
    Run(key, level, steps=6, **manner)
    for key, level in PLACES
    for name, manner in MANNERS.items()
    # A batch of the hand-written module is not halved by anybody.
    if not (name == "features" and isinstance(NEW[key], GramBalancer) and NEW[key].halves)
]
HALF = [Run(key, level, do="half", labels="inf", steps=4) for key, level in PLACES]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_parameters_equal_one_process(run, together, alone):
    assert_parameters_equal(run, together, alone)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_balancer_state_equals_one_process(run, together, alone):
    assert_states_equal(run, together, alone, bar=1e-5)


@pytest.mark.parametrize("run", HALF, ids=str)
def test_an_infinite_loss_skips_the_step_on_both_processes(run, together):
    for seen in together(run):
        before, after = seen["balancer"][OVERFLOW : OVERFLOW + 2]
        for name, value in before.items():
            assert after[name].double().nan_to_num(-7).equal(value.double().nan_to_num(-7)), name
        assert seen["network"][OVERFLOW].equal(seen["network"][OVERFLOW + 1])
        assert not seen["network"][OVERFLOW].equal(seen["network"][OVERFLOW - 1])
