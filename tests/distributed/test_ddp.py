"""What DDP is kept from doing, and from saying."""

from itertools import product

import pytest

from tests.distributed.runs import Run
from tests.nets import BALANCERS, GRAM_BALANCERS, LEVELS

# From Lightning itself, whatever the module.
LIGHTNING_WARNS = ("`isinstance(treespec, LeafSpec)` is deprecated", "You defined a `validation_step` but have no")


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


@pytest.mark.parametrize("run", [Run(*pair) for pair in product(BALANCERS, LEVELS)], ids=str)
def test_training_warns_of_nothing(run, everything):
    found = [warning for process in everything(run) for warning in process["warnings"]]
    assert [warning for warning in found if not warning.startswith(LIGHTNING_WARNS)] == []
