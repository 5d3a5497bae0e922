"""The proximal step of soft sharing: two processes with half of each batch end where one process ends."""

import pytest
import torch

from tests.distributed.runs import Run, Soft, execute

BAR = 1e-6
RUNS = [
    Run("fixed", model="soft"),
    Run("fixed", model="soft", labels="uneven"),
    Run("fixed", model="soft", accumulate=2, clip=0.5),
    Run("pcgrad", model="soft", labels="one_rank"),
    Run("pcgrad", "features", model="soft"),
]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_parameters_equal_one_process(run, together, alone):
    first, second = together(run)
    assert torch.equal(first["network"], second["network"])
    assert (first["network"] - alone(run)["network"]).abs().max() <= BAR


def test_the_step_is_at_work(alone, monkeypatch):
    """Otherwise a step that never comes would pass for one that comes everywhere."""
    constrained = alone(RUNS[0])["network"]
    monkeypatch.setattr(Soft, "configure_callbacks", lambda self: [])
    with pytest.warns(UserWarning, match="the callback that it brings does not run in this fit"):
        free = execute(RUNS[0])["network"]
    assert (constrained - free).abs().max() > 1000 * BAR
