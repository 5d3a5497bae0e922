"""Do two commits train to the same bits, on one process?

python benchmarks/same_numbers.py OLD [NEW]     (NEW: the working tree, if not given)

Every balancer at every level that it has, through MultiTaskModule, Balanced (with features and without) and
``lightning_mtl.backward``: a digest of all parameters and of the balancer's state after a few steps. Each commit runs
in a folder of its own; a rewrite of the engine that changes no decision must show no difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_mtl
from lightning_mtl import Balanced, MultiTaskModule
from lightning_mtl.balancers import available, load
from lightning_mtl.tasks import ClassificationTask, RegressionTask

STEPS = 4
LEVELS = ("parameters", "features")


NAMES = ("kind", "size", "shape")
WAYS = ("MultiTaskModule", "Balanced, features", "Balanced, graph", "backward")


def encoder() -> nn.Module:
    conv, norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
    return nn.Sequential(nn.Unflatten(1, (1, 2, 4)), conv, norm, nn.Tanh(), nn.Flatten(), nn.Linear(32, 6))


def batch(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
    size = torch.where(x[:, 1] > 1, torch.nan, 4 * x[:, 0])
    return x, {"kind": (x[:, 2] > 0).long(), "size": size, "shape": torch.stack([x[:, 0] * x[:, 1], -x[:, 0]], 1)}


def declared(name: str, level: str) -> MultiTaskModule:
    tasks = {
        "kind": ClassificationTask(nn.Linear(6, 2), 2),
        "size": RegressionTask(nn.Linear(6, 1)),
        "shape": RegressionTask(nn.Linear(6, 2), loss="l1"),
    }
    return MultiTaskModule(encoder(), tasks, name, level)


class Mixed(Balanced, L.LightningModule):
    """The same model without declared tasks."""

    def __init__(self, name: str, level: str, features: bool) -> None:
        super().__init__(tasks=NAMES, balancer=name, level=level)
        self.encoder, self.features = encoder(), features
        self.heads = nn.ModuleList(nn.Linear(6, width) for width in (2, 1, 2))

    def losses(self, batch: Any) -> tuple[dict[str, Any], Tensor]:
        x, targets = batch
        z = self.encoder(x)
        kind, size, shape = (head(z) for head in self.heads)

        def of(part: slice) -> list[Tensor]:
            return [
                F.cross_entropy(kind[part], targets["kind"][part]),
                F.mse_loss(size[part].squeeze(1), targets["size"][part].nan_to_num(0)),
                F.l1_loss(shape[part], targets["shape"][part]),
            ]

        if getattr(self.balancer, "halves", False):
            halves = zip(of(slice(0, None, 2)), of(slice(1, None, 2)), strict=True)
            return dict(zip(NAMES, halves, strict=True)), z
        return dict(zip(NAMES, of(slice(None)), strict=True)), z

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses, z = self.losses(batch)
        return self.balance(losses, features=z if self.features else None)


def cases() -> Iterator[tuple[str, str, str]]:
    """Balancer, level and way in, as far as they go together."""
    for name in available():
        for level in LEVELS:
            try:
                load(name, len(NAMES)).check_level(level)
            except ValueError:
                continue
            for way in WAYS:
                if level == "parameters" or "graph" not in way:
                    yield name, level, way


def digest(name: str, level: str, way: str) -> str:
    torch.manual_seed(0)
    module = declared(name, level) if way == "MultiTaskModule" else Mixed(name, level, "graph" not in way)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    for step in range(STEPS):
        torch.manual_seed(step)
        optimizer.zero_grad()
        if way == "backward":
            losses, z = module.losses(batch(step))
            last = module.encoder[-1].parameters()
            lightning_mtl.backward(losses, module.balancer, features=z, level=level, last_layer=last)
        else:
            module.training_step(batch(step), step).backward()
        optimizer.step()
    found = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        found.update(key.encode() + value.detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


@contextmanager
def _tree(revision: str | None) -> Iterator[Path]:
    here = Path(__file__).resolve().parent.parent
    if revision is None:
        yield here
        return
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", revision], cwd=here, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        yield Path(folder)


def _run(revision: str | None) -> dict[str, str]:
    with _tree(revision) as root:
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--digests"]
        output = subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True).stdout
    found: dict[str, str] = json.loads(output.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", nargs="?")
    parser.add_argument("new", nargs="?")
    parser.add_argument("--digests", action="store_true", help="print those of the package on the path")
    arguments = parser.parse_args()
    if arguments.digests:
        warnings.simplefilter("ignore")
        print(json.dumps({" | ".join(case): digest(*case) for case in cases()}))
        return
    if arguments.old is None:
        parser.error("name a commit to compare with")
    old, new = _run(arguments.old), _run(arguments.new)
    different = [case for case in old if old[case] != new.get(case)]
    for case in different:
        print(f"differs: {case}")
    print(f"{len(old)} cases, {len(different)} differ")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
