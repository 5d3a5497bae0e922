"""A checkpoint that two processes save goes on in one process."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.distributed.runs import Run, fit
from tests.nets import GRAM_BALANCERS, LEVELS

PAIRS = [("fixed", "parameters"), ("uncertainty", "parameters"), *product(GRAM_BALANCERS, LEVELS)]
RUNS = [Run(*pair, do="checkpoint", steps=5) for pair in PAIRS]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_resumed_alone_it_ends_where_one_process_ends(run, together, alone):
    path, _ = together(run)
    whole = replace(run, do="fit", epochs=2)
    resumed, straight = fit(whole, ckpt_path=path), alone(whole)
    assert (resumed["network"] - straight["network"]).abs().max() <= 1e-6
    torch.testing.assert_close(resumed["balancer"], straight["balancer"], rtol=1e-6, atol=1e-6, equal_nan=True)
