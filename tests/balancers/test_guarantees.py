"""The guarantees of the gram balancers, on a few problems per cell of the grid. No cell may fail."""

from __future__ import annotations

import pytest

from tests.balancers.guarantees import METHODS, SIZES, bar, worst


@pytest.mark.parametrize("num_tasks", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_guarantee(method, num_tasks):
    failures = [
        f"{name} {value:.1e} at {problem}"
        for (name, dtype), (value, problem) in worst(method, num_tasks, problems=2 if num_tasks <= 8 else 1).items()
        if value > bar(name, dtype)
    ]
    assert not failures, "\n".join(failures)
