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
DEADLINE = 480  # seconds for all runs: about five times what two idle cores need
CRASHES = 5  # how often a pair may die before the rest is given up


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.distributed)
            item.add_marker(pytest.mark.xdist_group("distributed"))
            item.add_marker(pytest.mark.timeout(DEADLINE + 60))  # the first test waits for all runs


@pytest.fixture(scope="session")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes, which have ended, left their results. The workers of pytest-xdist share it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = base / "distributed"
    with FileLock(base / "distributed.lock"):
        if not out.exists():
            out.mkdir()
            params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
            runs = dict.fromkeys(value for given in params for value in given.values() if isinstance(value, Run))
            (out / "runs").write_bytes(pickle.dumps(list(runs)))
            do_all(out, len(runs))
    return out


def do_all(out: Path, num: int) -> None:
    """Start a pair; if one of it dies, end the other, and start a new pair at the next run."""
    end, first = time.monotonic() + DEADLINE, 0
    for _ in range(CRASHES):
        processes = [start(out, first, rank, port) for port in [free_port()] for rank in ("0", "1")]
        try:
            while (codes := [process.poll() for process in processes]).count(0) < 2:
                if any(codes) or time.monotonic() > end:
                    break
                time.sleep(0.1)
            else:
                return
        finally:
            for process in processes:
                process.kill()
                process.wait()
        first = next(index for index in range(num) if not all((out / f"{index}.{rank}").exists() for rank in (0, 1)))
        what = f"The processes ended with {codes}." if any(codes) else f"Ended after {DEADLINE} s."
        logs = [f"Log of process {rank}:\n...{(out / f'log.{rank}').read_text()[-3000:]}" for rank in (0, 1)]
        for rank in (0, 1):
            torch.save({"error": "\n".join([what, *logs])}, out / f"{first}.{rank}")
        first += 1
        if first == num or time.monotonic() > end:
            return


def start(out: Path, first: int, rank: str, port: int) -> subprocess.Popen:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "tests"}
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ours = {"OUT": str(out), "FIRST": str(first), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (out / f"log.{rank}").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.worker"],
            env={**os.environ, **ranks, **master, **ours},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def everything(folder: Path) -> Callable[[Run], list[dict[str, Any]]]:
    """What a run left on process 0 and on process 1, its warnings too. Fails the test if there was an error."""
    index_of = {run: index for index, run in enumerate(pickle.loads((folder / "runs").read_bytes()))}

    def results(run: Run) -> list[dict[str, Any]]:
        files = [folder / f"{index_of[run]}.{rank}" for rank in (0, 1)]
        nothing = {"error": "Not reached: an earlier run took all the time, or crashed too often."}
        found = [torch.load(file) if file.exists() else nothing for file in files]
        errors = [f"Process {rank}: {result['error']}" for rank, result in enumerate(found) if "error" in result]
        if errors:
            pytest.fail("\n".join(errors), pytrace=False)
        return found

    return cache(results)


@pytest.fixture(scope="session")
def together(everything: Callable[[Run], list[dict[str, Any]]]) -> Callable[[Run], list[Any]]:
    """What a run gave on process 0 and on process 1."""
    return lambda run: [result["value"] for result in everything(run)]


@pytest.fixture(scope="session")
def alone() -> Callable[[Run], Any]:
    """What a run gives in this process, with the whole batches. Done once for all tests that ask."""
    return cache(execute)
