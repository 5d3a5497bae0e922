"""Every balancer: two processes with half of each batch end where one process with the whole batches ends."""

from dataclasses import replace

import pytest

from lightning_mtl.balancers import GramBalancer, LossBalancer, available, load
from tests.distributed.runs import OVERFLOW, Run
from tests.distributed.test_equals_one_process import distance
from tests.nets import BALANCERS

BAR = 1e-6
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


def single(run):
    return replace(run, ddp="plain")


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_parameters_equal_one_process(run, together, alone):
    one = alone(single(run))["network"]
    assert max(distance(each["network"], one) for each in together(run)) <= BAR


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_balancer_state_equals_one_process(run, together, alone):
    one = alone(single(run))["balancer"]
    # State at level "features" is that of each process's own rows only where a method keeps none of them.
    for each in together(run):
        assert each["balancer"].keys() == one.keys()
        for name, value in one.items():
            ours, theirs = each["balancer"][name].double().nan_to_num(-7), value.double().nan_to_num(-7)
            assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max())), name


@pytest.mark.parametrize("run", HALF, ids=str)
def test_an_infinite_loss_skips_the_step_on_both_processes(run, together):
    for seen in together(run):
        before, after = seen["balancer"][OVERFLOW : OVERFLOW + 2]
        for name, value in before.items():
            assert after[name].double().nan_to_num(-7).equal(value.double().nan_to_num(-7)), name
        assert seen["network"][OVERFLOW].equal(seen["network"][OVERFLOW + 1])
        assert not seen["network"][OVERFLOW].equal(seen["network"][OVERFLOW - 1])
