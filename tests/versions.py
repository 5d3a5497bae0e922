"""What the oldest claimed versions do not have: a test that needs it says so here, and `pytest -ra` shows it."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version


def has(package: str, least: str) -> bool:
    """Whether the package is of this version or newer."""
    return Version(version(package)) >= Version(least)


def needs(package: str, least: str, why: str) -> None:
    """Skip the running test, with the reason, where the package is older."""
    if not has(package, least):
        pytest.skip(f"needs {package} >= {least}: {why}")


# Trainer.fit loads a checkpoint as tensors only if told so; an older one cannot be told, and unpickles.
TENSORS_ONLY: dict[str, Any] = {"weights_only": True} if has("lightning", "2.6") else {}
