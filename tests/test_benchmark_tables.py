"""The pages show what the benchmarks have stored, and nothing else."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

TOOL = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "tables.py"))


@pytest.mark.parametrize("page", TOOL["PAGES"])
def test_the_page_shows_the_stored_results(page):
    text = (TOOL["DOCS"] / page).read_text()
    assert TOOL["written"](page, text) == text


@pytest.mark.parametrize("name", list(TOOL["TABLES"]))
def test_a_figure_that_is_not_stored_is_seen(name):
    page = TOOL["TABLES"][name][0]
    head, rest = (TOOL["DOCS"] / page).read_text().split(f"<!-- table {name} -->\n")
    table, tail = rest.split("<!-- end -->", 1)
    other = f"{head}<!-- table {name} -->\n{table.replace('0', '9')}<!-- end -->{tail}"
    assert TOOL["written"](page, other) != other
