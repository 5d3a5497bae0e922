"""``torch.compile`` of the encoder, and of a whole module."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_mtl import Balanced, boundary
from tests.engine.zoo import NETS, Trunk, three_losses
from tests.nets import BALANCERS, loader, module, network, sgd, trainer

pytestmark = [
    pytest.mark.slow,
    # Dynamo itself looks at `.grad` of whatever crosses a graph break.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture
def dynamo() -> Iterator[None]:
    """A compiler that has seen nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_an_encoder_compiled_and_used_before_gets_the_right_gradients(tmp_path):
    """Donated buffers: with its flag alone set, the caches of torch give wrong gradients without an error."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.module.compiled_encoder"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    result = json.loads(found.stdout.splitlines()[-1])
    assert result["graphs"] == 1
    assert result["moved"] > 0.05
    assert result["difference"] <= 1e-5


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("balancer", BALANCERS)
def test_a_module_compiled_as_a_whole_trains_as_ever(balancer):
    eager, model = module(balancer), module(balancer)
    trainer().fit(eager, loader(64))
    trainer().fit(torch.compile(model, backend="aot_eager"), loader(64))
    assert graphs() > 0
    assert (network(model) - network(eager)).abs().max() <= 1e-6


class WithBoundary(Trunk):
    """Encoder and heads in two graphs."""

    def losses_of(self, batch):
        z = boundary(torch.relu(self.trunk(batch[0])))
        return three_losses((self.kind(z), self.size(z), self.shape(z)), batch[1]), [z]


def with_sgd(model: Balanced) -> Balanced:
    model.configure_optimizers = lambda: sgd(model.own_parameters())
    return model


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("level", ["parameters", "features"])
def test_an_existing_module_with_a_boundary_can_be_compiled_as_a_whole(level):
    torch.manual_seed(0)
    eager = with_sgd(WithBoundary("pcgrad", level, tell=True))
    torch.manual_seed(0)
    model = with_sgd(WithBoundary("pcgrad", level, tell=True))
    trainer().fit(eager, loader(64))
    trainer().fit(torch.compile(model, backend="aot_eager"), loader(64))
    assert graphs() > 0
    assert (network(model) - network(eager)).abs().max() <= 1e-6


@pytest.mark.usefixtures("dynamo")
def test_an_existing_module_without_a_boundary_is_refused():
    model = with_sgd(NETS["found"].make("pcgrad", "parameters"))
    with pytest.raises(ValueError, match="boundary"):
        trainer().fit(torch.compile(model, backend="aot_eager"), loader(64))
