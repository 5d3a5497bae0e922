"""With fixed weights, two processes train exactly as a hand-written sum of the losses does on two processes."""

from dataclasses import replace

import pytest

from tests.distributed.runs import Run

RUNS = [
    Run("fixed", steps=50),
    Run("fixed", steps=50, accumulate=2, clip=0.5, ddp="bucket_view"),
    Run("fixed", steps=50, ddp="static_graph"),
]
PAIRS = [(run, replace(run, model="handwritten")) for run in RUNS]


@pytest.mark.parametrize("ours, theirs", PAIRS, ids=[str(run) for run in RUNS])
def test_parameters_after_fifty_steps(ours, theirs, together):
    for mine, handwritten in zip(together(ours), together(theirs), strict=True):
        assert (mine["network"] - handwritten["network"]).abs().max() <= 1e-6
