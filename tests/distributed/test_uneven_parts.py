"""Processes whose parts of a batch differ: in size, in instances (perhaps none), in constants; inputs differentiated.

With counts exchanged always, two processes end where one process with the whole batches ends.
"""

from __future__ import annotations

import math
from itertools import product

import pytest

from tests.distributed.equality import assert_parameters_equal, assert_states_equal
from tests.distributed.runs import Run
from tests.nets import BALANCERS, GRAM_BALANCERS

PAIRS = [(balancer, "parameters") for balancer in BALANCERS] + [(balancer, "features") for balancer in GRAM_BALANCERS]
RUNS = [
    *(Run(*pair, model=model) for pair, model in product(PAIRS, ("lopsided", "detections"))),
    *(Run(*pair, model="forces") for pair in PAIRS[:4]),
    *(Run(balancer, model="detections", ddp="bucket_view", accumulate=2) for balancer in ("fixed", "pcgrad")),
]
LOGS = [
    Run(balancer, do="logs", model=model) for balancer in ("fixed", "pcgrad") for model in ("lopsided", "detections")
]
SWITCHED = [Run(balancer, model="switched") for balancer in BALANCERS]


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_two_processes_equal_one(run, together, alone):
    assert_parameters_equal(run, together, alone)
    assert_states_equal(run, together, alone)


@pytest.mark.parametrize("run", LOGS, ids=str)
def test_logs_equal_those_of_one_process(run, together, alone):
    one = {key: value for key, value in alone(run).items() if not key.startswith("balance/")}
    assert one.keys() >= {"train/loss", "val/loss"}
    assert all(math.isfinite(value) for value in one.values())
    for logged in together(run):
        assert {key: logged[key] for key in one} == pytest.approx(one, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("run", SWITCHED, ids=str)
def test_where_one_process_has_a_constant_the_task_is_what_the_other_computes(run, everything, together, alone):
    assert_parameters_equal(run, together, alone)
    assert_states_equal(run, together, alone)
    said = [[text for text in process["warnings"] if "'size' has no gradient" in text] for process in everything(run)]
    assert [len(texts) for texts in said] == [1, 0]
