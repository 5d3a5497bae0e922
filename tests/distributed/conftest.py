"""Starts the two processes once for all tests of this folder, with the runs that the selected tests ask for."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from tests.distributed.runs import Run, execute

ROOT = Path(__file__).parents[2]
DEADLINE = 240  # seconds for all runs; below the time-out of a test
Results = Callable[[Run], list[Any]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.distributed)
            item.add_marker(pytest.mark.xdist_group("distributed"))


@pytest.fixture(scope="session")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two processes, which have ended, left their results. Several xdist workers share it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = base / "distributed"
    with FileLock(base / "distributed.lock"):
        if not out.exists():
            out.mkdir()
            params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
            runs = dict.fromkeys(value for given in params for value in given.values() if isinstance(value, Run))
            (out / "runs").write_bytes(pickle.dumps(list(runs)))
            start_pair(out)
    return out


def start_pair(out: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "tests"}
    shared = {**os.environ, **torchrun, "OUT": str(out), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in ("0", "1"):
        with (out / f"log.{rank}").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.distributed.worker"],
                    env={**shared, "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0"},
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )
    end = time.monotonic() + DEADLINE
    try:
        for process in processes:
            process.wait(timeout=max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        (out / "late").touch()
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def together(folder: Path) -> Results:
    """What a run gave on process 0 and on process 1; fails the test, with their logs, if it did not get that far."""
    index_of = {run: index for index, run in enumerate(pickle.loads((folder / "runs").read_bytes()))}

    def results(run: Run) -> list[Any]:
        files = [folder / f"{index_of[run]}.{rank}" for rank in (0, 1)]
        found = [torch.load(file) if file.exists() else {"error": "No result."} for file in files]
        errors = [f"Process {rank}: {result['error']}" for rank, result in enumerate(found) if "error" in result]
        if errors:
            if not all(file.exists() for file in files):
                late = f"They were ended after {DEADLINE} s." if (folder / "late").exists() else "They ended early."
                logs = [f"Log of process {rank}:\n{(folder / f'log.{rank}').read_text()[-2000:]}" for rank in (0, 1)]
                errors += [late, *logs]
            pytest.fail("\n".join(errors), pytrace=False)
        return [result["value"] for result in found]

    return results


@pytest.fixture(scope="session")
def alone() -> Callable[[Run], Any]:
    """What a run gives in this process, with the whole batches. Done once for all tests that ask."""
    return cache(execute)
