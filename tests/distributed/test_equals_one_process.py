"""Two processes with half of each batch end where one process with the whole batches ends."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.distributed.runs import Run
from tests.nets import BALANCERS, GRAM_BALANCERS, LEVELS

BAR = 1e-6


def runs(models="declared", balancers=BALANCERS, levels=LEVELS, labels="all", **others):
    """All combinations; names may be joined by spaces."""
    split = [axis.split() if isinstance(axis, str) else axis for axis in (balancers, levels, models, labels)]
    return [Run(b, level, model=m, labels=key, **others) for b, level, m, key in product(*split)]


GRID = [
    Run(balancer, level, accumulate=accumulate, clip=clip, ddp=ddp)
    for balancer, level, accumulate, clip, ddp in product(
        BALANCERS, LEVELS, (1, 2), (None, 0.5), ("plain", "find_unused", "bucket_view")
    )
]
LABELS = "one_rank single nowhere uneven silent empty"
EVERY_2 = ("pcgrad_every_2", "gradnorm_every_2")
RUNS = [
    *GRID,
    *runs(ddp="static_graph"),
    *runs(labels=LABELS),
    *runs(labels="uneven", accumulate=2),
    *runs(labels="one_rank", ddp="static_graph"),
    *runs(balancers=(*EVERY_2, "gradnorm_shared")),
    *runs(balancers=EVERY_2, labels="one_rank"),
    *runs("weight_heads per_label synchronised", GRAM_BALANCERS),
    *runs("per_label", ("fixed", "uncertainty"), ("parameters",)),
    *runs("synchronised", GRAM_BALANCERS, labels="one_rank"),
    *runs("frozen", ("fixed", "pcgrad"), ("parameters",)),
    *runs("loaders", levels=("parameters",), labels="all exhausted exhausted_apart"),
    *runs("features", labels=f"all {LABELS}"),
    *runs("features", accumulate=2, clip=0.5, labels="uneven"),
    *runs("graph", levels=("parameters",), labels=f"all {LABELS}"),
    *runs("graph", levels=("parameters",), balancers=EVERY_2, labels="single"),
    *runs("features", labels="one_rank", ddp="find_unused"),
    *runs("graph", levels=("parameters",), labels="one_rank", ddp="find_unused"),
    *runs("declared", do="loop"),
    *runs("declared", do="loop", accumulate=2, ddp="bucket_view"),
    *runs("discovered", levels=("parameters",), do="loop"),
    *runs("fabric", do="loop"),
]


def distance(ours, theirs):
    """The largest difference of two vectors; infinite if something is not a number."""
    return (ours - theirs).abs().nan_to_num(nan=torch.inf).max().item()


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_parameters(run, together, alone):
    one = alone(replace(run, ddp="plain"))
    assert max(distance(each["network"], one["network"]) for each in together(run)) <= BAR


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_balancer_state(run, together, alone):
    one = alone(replace(run, ddp="plain"))["balancer"]
    for each in together(run):
        torch.testing.assert_close(each["balancer"], one, rtol=0, atol=BAR, equal_nan=True)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_ranks_end_equal(run, together):
    first, second = together(run)
    assert torch.equal(first["network"], second["network"])
    torch.testing.assert_close(first["balancer"], second["balancer"], rtol=0, atol=0, equal_nan=True)
