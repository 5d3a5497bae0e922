"""Whether two processes with half of each batch end where one process with the whole batches ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.distributed.runs import Run

BAR = 1e-6


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two vectors; infinite if something is not a number."""
    return (ours - theirs).abs().nan_to_num(nan=torch.inf).max().item()


def single(run: Run) -> Run:
    """The run on one process, where the kind of DDP does not count."""
    return replace(run, ddp="plain")


def assert_parameters_equal(run: Run, together: Callable[[Run], Any], alone: Callable[[Run], Any]) -> None:
    one = alone(single(run))["network"]
    worst = max(distance(each["network"], one) for each in together(run))
    assert worst <= BAR, worst


def assert_states_equal(
    run: Run, together: Callable[[Run], Any], alone: Callable[[Run], Any], bar: float = BAR
) -> None:
    """Every buffer of the balancer, relative to its largest entry if that is more than 1; what is NaN stays NaN."""
    one = alone(single(run))["balancer"]
    for each in together(run):
        assert each["balancer"].keys() == one.keys()
        for name, value in one.items():
            ours, theirs = each["balancer"][name].double().nan_to_num(-7), value.double().nan_to_num(-7)
            assert ours.shape == theirs.shape, name
            largest = float(theirs.abs().max()) if theirs.numel() else 0.0
            assert (ours - theirs).abs().le(bar * max(1.0, largest)).all(), name
