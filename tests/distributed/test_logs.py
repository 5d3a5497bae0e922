"""What two processes log is what one process with the whole batches logs."""

from itertools import product

import pytest

from tests.distributed.runs import TASKS, Run
from tests.nets import BALANCERS

RUNS = [Run(balancer, do="logs", labels=labels, steps=5) for balancer, labels in product(BALANCERS, ("all", "uneven"))]
RUNS += [Run("fixed", do="logs", labels="uneven", steps=5, model="weighted")]
SHORT = [Run(balancer, do="last_logs", labels="uneven", steps=5) for balancer in ("fixed", "pcgrad")]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_keys(run, together, alone):
    assert [set(logged) for logged in together(run)] == [set(alone(run))] * 2


@pytest.mark.parametrize("stage", ["train", "val", "balance"])
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_values(run, stage, together, alone):
    expected = {key: value for key, value in alone(run).items() if key.startswith(stage)}
    assert set(expected) >= {
        f"{stage}/weight/{task}" if stage == "balance" else f"{stage}/loss/{task}" for task in TASKS
    }
    for logged in together(run):
        assert {key: logged[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("run", SHORT, ids=str)
def test_of_an_epoch_that_is_shorter_than_from_one_log_to_the_next(run, together, alone):
    expected = {key: value for key, value in alone(run).items() if key.startswith("train")}
    assert set(expected) == {"train/loss", *(f"train/loss/{task}" for task in TASKS)}
    for logged in together(run):
        assert {key: logged[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
