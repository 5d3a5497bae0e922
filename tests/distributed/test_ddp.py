"""What DDP is kept from doing."""

import pytest

from tests.distributed.runs import Run
from tests.nets import BALANCERS, GRAM_BALANCERS


@pytest.mark.parametrize("run", [Run(balancer, do="buffers") for balancer in GRAM_BALANCERS], ids=str)
def test_balancer_buffers_are_not_broadcast(run, together):
    _, second = together(run)
    # An ordinary buffer loses in the forward what only process 1 wrote; the balancer's keep it.
    assert second == {name: name.startswith("balancer.") for name in second}


@pytest.mark.parametrize(
    "run", [Run(balancer, do="refused", ddp="static_graph", accumulate=2) for balancer in BALANCERS], ids=str
)
def test_static_graph_with_accumulation_is_refused(run, together):
    for text in together(run):
        assert text.startswith("MultiTaskModule: `Trainer(accumulate_grad_batches=...)` must be 1 with DDPStrategy(")
