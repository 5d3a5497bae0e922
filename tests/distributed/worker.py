"""One of two processes, started as torchrun starts them: does every run and leaves a file for each.

Every run has a process group of its own. A run that fails on one process therefore ends on the other too, by the
closed connection or the time-out, and the next one begins in order.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.runs import Run, execute

TIMEOUT = timedelta(seconds=20)  # of a collective
RANK, WORLD_SIZE = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE"))


def main() -> None:
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, WORLD_SIZE, RANK == 0, timedelta(seconds=120))
    out = Path(os.environ["OUT"])
    runs: list[Run] = pickle.loads((out / "runs").read_bytes())
    for index in range(int(os.environ["FIRST"]), len(runs)):
        print(runs[index], file=sys.stderr, end="", flush=True)
        begin = time.monotonic()
        result = attempt(runs[index], dist.PrefixStore(str(index), store))
        print(f": {time.monotonic() - begin:.2f} s {result.get('error', '')}", file=sys.stderr, flush=True)
        torch.save(result, out / f"partial.{RANK}")
        (out / f"partial.{RANK}").rename(out / f"{index}.{RANK}")


def attempt(run: Run, store: dist.Store) -> dict[str, object]:
    try:
        dist.init_process_group("gloo", store=store, rank=RANK, world_size=WORLD_SIZE, timeout=TIMEOUT)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = execute(run)
        dist.barrier()
        return {"value": value, "warnings": [str(warning.message) for warning in caught]}
    except BaseException:
        return {"error": traceback.format_exc()}
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
