"""One of two processes, started as torchrun starts them: does every run and leaves a file for each.

Every run has a process group of its own. A run that fails on one process therefore ends on the other too, by the
closed connection or the time-out, and the next one begins in order.
"""

from __future__ import annotations

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

TIMEOUT = timedelta(seconds=20)  # of a collective: twenty times what the slowest needs
GIVE_UP = 3  # runs that hang


def main() -> None:
    rank, out = int(os.environ["RANK"]), Path(os.environ["OUT"])
    torch.set_num_threads(1)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, int(os.environ["WORLD_SIZE"]), rank == 0, timedelta(seconds=120))
    runs: list[Run] = pickle.loads((out / "runs").read_bytes())
    hung = 0
    for index, run in enumerate(runs):
        begin = time.monotonic()
        result = attempt(run, dist.PrefixStore(str(index), store))
        seconds = time.monotonic() - begin
        print(f"{seconds:6.2f} s  {run}  {result.get('error', '')}", file=sys.stderr, flush=True)
        partial = out / f"{rank}.partial"
        torch.save(result, partial)
        partial.rename(out / f"{index}.{rank}")
        hung += seconds > TIMEOUT.total_seconds()
        if hung == GIVE_UP:
            print(f"Gave up: {hung} runs hung.", file=sys.stderr, flush=True)
            os._exit(1)


def attempt(run: Run, store: dist.Store) -> dict[str, object]:
    try:
        dist.init_process_group(
            "gloo", store=store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]), timeout=TIMEOUT
        )
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
