"""Two processes with half of each batch end where one process with the whole batches ends."""

from itertools import combinations, product

import pytest
import torch

from tests.distributed.equality import BAR, assert_parameters_equal, assert_states_equal, distance, single
from tests.distributed.runs import Run
from tests.nets import BALANCERS, GRAM_BALANCERS, LEVELS
from tests.versions import has

LABELS = ("one_rank", "nowhere", "uneven", "silent", "empty")
EVERY_2 = ("pcgrad_every_2", "gradnorm_every_2")
# A loss balancer takes no rows: outside the full grid it is run at one level.
LOSS_PAIRS = [("fixed", "parameters"), ("uncertainty", "parameters")]
GRAM_PAIRS = [*product(GRAM_BALANCERS, LEVELS)]
PAIRS = LOSS_PAIRS + GRAM_PAIRS
PARAMETERS = [(balancer, "parameters") for balancer in BALANCERS]


def runs(pairs, labels=("all",), **others):
    return [Run(balancer, level, labels=key, **others) for (balancer, level), key in product(pairs, labels)]


GRID = [
    Run(balancer, level, accumulate=accumulate, clip=clip, ddp=ddp)
    for balancer, level, accumulate, clip, ddp in product(
        BALANCERS, LEVELS, (1, 2), (None, 0.5), ("plain", "find_unused", "bucket_view")
    )
]
RUNS = [
    *GRID,
    *runs(PAIRS, ddp="static_graph"),
    *runs(PAIRS, LABELS),
    *runs(GRAM_PAIRS, ["one_rank"], ddp="static_graph"),
    *runs(GRAM_PAIRS, ["uneven"], accumulate=2, clip=0.5),
    *runs(product(EVERY_2, LEVELS), ["all", "one_rank"]),
    *runs([("gradnorm_shared", "parameters")]),
    *runs(GRAM_PAIRS, model="weight_heads", steps=5),
    *runs(PAIRS[1:], ["colours"], model="per_label"),
    *runs(PAIRS, ["uneven"], model="weighted"),
    *runs(PAIRS, ["one_rank"], model="instances"),
    *runs(PARAMETERS[1:3], ["nowhere", "uneven"], model="instances"),
    *runs(PARAMETERS, ["one_rank"], model="switched_off"),
    *runs(GRAM_PAIRS, ["all", "one_rank"], model="synchronised"),
    *runs(PARAMETERS[1:3], model="frozen", steps=5),
    # One loader per task, also exhausted early, on both processes at once or on one before the other.
    *runs(PARAMETERS, ["all", "exhausted", "exhausted_apart"], model="loaders"),
    # An existing module, with its features given, and with the shared parameters found in the graph.
    *runs(LOSS_PAIRS, ["one_rank", "silent", "empty"], model="features"),
    *runs(GRAM_PAIRS, ["all", "one_rank", "nowhere", "silent", "empty"], model="features"),
    *runs(GRAM_PAIRS, ["uneven"], model="features", accumulate=2, clip=0.5),
    *runs(PARAMETERS, ["one_rank"], model="features", ddp="find_unused"),
    *runs(PARAMETERS[2:], ["all", "single", "late", *LABELS], model="graph"),
    *runs(product(EVERY_2, ["parameters"]), ["single"], model="graph"),
    *runs(PARAMETERS[2:], ["one_rank"], model="graph", ddp="find_unused"),
    # On CPUs older versions shard a plain sum of losses wrongly, too.
    *runs(LOSS_PAIRS if has("torch", "2.13") else [], ["one_rank"], model="sharded"),
    # Loops without a Trainer.
    *runs(PAIRS, do="loop"),
    *runs(GRAM_PAIRS, do="loop", accumulate=2, ddp="bucket_view"),
    *runs(PARAMETERS[2:], do="loop", model="discovered"),
    *runs(PAIRS, do="loop", model="fabric"),
]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_parameters_equal_one_process(run, together, alone):
    assert_parameters_equal(run, together, alone)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_balancer_state_equals_one_process(run, together, alone):
    assert_states_equal(run, together, alone)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_both_processes_end_equal(run, together):
    first, second = together(run)
    assert torch.equal(first["network"], second["network"])
    torch.testing.assert_close(first["balancer"], second["balancer"], rtol=0, atol=0, equal_nan=True)


def test_runs_differ_by_more_than_the_bar(alone):
    """Otherwise a clipping, an accumulation or a balancer that is not at work would pass for one that is."""
    grid = {single(run) for run in GRID if (run.balancer, run.level) in PAIRS}
    ends = [alone(run)["network"] for run in grid]
    assert min(distance(a, b) for a, b in combinations(ends, 2)) > 10 * BAR
