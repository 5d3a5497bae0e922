"""The page of what is refused shows every error of the engine and the module layer."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "docs" / "refusals.py"


def refusals():
    spec = importlib.util.spec_from_file_location("refusals", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_that_of_the_source():
    script = refusals()
    (shown,) = script.MARKED.findall(script.PAGE.read_text())
    assert shown == script.table(), "run python docs/refusals.py"


def test_every_error_has_a_cure():
    found = refusals().rows()
    assert len(found) > 40
    assert all(cure.strip("…. ") for _, _, cure in found)
