"""A run of its own for ``test_compile.py``: inductor, its caches and its flags belong to the whole process."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mtl import MultiTaskModule
from tests.nets import WIDTH, loader, network, samples, sgd, three_tasks, trainer


class Encoder(nn.Module):
    """Its compiled backward reuses the memory of its own inputs, unless it is told not to."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.two, self.norm_two = nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.out = nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.one(x)))
        return self.out(torch.relu(h + self.norm_two(self.two(h))))


def trained(encoder: Any, tasks: Any) -> Tensor:
    model = MultiTaskModule(encoder, tasks, "pcgrad", optimizer=sgd)
    trainer().fit(model, loader(64))
    return network(model)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder, tasks = Encoder(), three_tasks()
    eager = trained(deepcopy(encoder), deepcopy(tasks))

    import torch._functorch.config as functorch

    functorch.donated_buffer = True  # as it was before the eager run
    torch.compiler.config.cache_key_tag = ""
    start = {name: value.clone() for name, value in encoder.state_dict().items()}
    compiled = torch.compile(encoder)
    # An ordinary user's step: now the caches in memory and on disk hold a backward that may run only once.
    compiled(samples(16)[0]).square().sum().backward()
    encoder.load_state_dict(start)
    encoder.zero_grad()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]

    balanced = trained(compiled, deepcopy(tasks))
    print(
        json.dumps(
            {
                "difference": float((balanced - eager).abs().max()),
                "moved": float((eager - network(MultiTaskModule(Encoder(), three_tasks()))).abs().max()),
                "graphs": graphs,
            }
        )
    )


if __name__ == "__main__":
    main()
