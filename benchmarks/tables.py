"""The tables of benchmarks in the docs, written from benchmarks/results: no figure there is typed by hand.

Run:   python benchmarks/tables.py           (after a script was run with --out benchmarks/results/...)
       python benchmarks/tables.py --check   (fails if the pages do not show what is stored)
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
NETS = {
    "mlp": "MLP, 1.8 M, batch 64",
    "resnet18": "ResNet-18 of width 32, batch 16",
    "resnet50": "ResNet-50, batch 128",
}
Row = list[str]


def step_cost(stored: dict[str, Any]) -> Iterator[Row]:
    arms = list(stored["results"][0]["x_sum"])
    yield ["network", "T", *arms, "pcgrad, parameters, of the limit"]
    for result in stored["results"]:
        ratios = [f"{result['x_sum'][arm]:.2f}" for arm in arms]
        yield [NETS[result["net"]], str(result["tasks"]), *ratios, f"{result['x_limit']:.2f}"]


def solvers(stored: dict[str, Any]) -> Iterator[Row]:
    sizes = sorted({result["tasks"] for result in stored["results"]})
    yield ["method", *(f"{what}, T = {size}" for size in sizes for what in ("solve", "step", "torchjd"))]
    for method in dict.fromkeys(result["method"] for result in stored["results"]):
        of = {result["tasks"]: result for result in stored["results"] if result["method"] == method}
        cells = [of[size][key] for size in sizes for key in ("ms", "step_ms", "torchjd_ms")]
        yield [f"`{method}`", *("" if cell is None else f"{cell:.2f}" for cell in cells)]


def guarantees(stored: dict[str, Any]) -> Iterator[Row]:
    yield ["method", "residual", "float64 rows", "bar", "float32 rows", "bar"]
    of = {(result["method"], result["residual"], result["rows"]): result for result in stored["results"]}
    for method, residual in dict.fromkeys((method, residual) for method, residual, _ in of):
        found = [of.get((method, residual, rows)) for rows in ("float64", "float32")]
        cells = [
            text
            for one in found
            for text in (("", "") if one is None else (f"{one['worst']:.0e}", f"{one['bar']:.0e}"))
        ]
        yield [method, residual, *cells]


def defaults(stored: dict[str, Any]) -> Iterator[Row]:
    arms = ["equal", *(f"gradnorm, alpha {a}" for a in ("0", "0.5", "1.5"))]
    arms += [f"uncertainty, rate x {k}" for k in (1, 3, 10, 100)]
    yield ["problem", *arms]
    of = {(result["problem"], result["arm"]): result["delta_m"] for result in stored["results"]}
    for problem in dict.fromkeys(problem for problem, _ in of):
        every = [of[problem, arm] for arm in arms]
        yield [problem, *(f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}" for values in every)]


#: name of a table -> page, file of results, rows.
TABLES: dict[str, tuple[str, str, Callable[[dict[str, Any]], Iterator[Row]]]] = {
    "step_cost": ("benchmarks.md", "cpu.json", step_cost),
    "solvers": ("benchmarks.md", "solvers.json", solvers),
    "guarantees": ("benchmarks.md", "guarantees.json", guarantees),
    "defaults": ("choose_a_balancer.md", "defaults.json", defaults),
}
PAGES = list(dict.fromkeys(page for page, _, _ in TABLES.values()))


def markdown(rows: Iterator[Row]) -> str:
    head, *body = list(rows)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def written(name: str, text: str) -> str:
    """The text of the page ``name``, with its tables as the stored results have them."""
    for table, (page, file, rows) in TABLES.items():
        if page != name:
            continue
        lines = markdown(rows(json.loads((RESULTS / file).read_text())))
        between = re.compile(rf"(<!-- table {table} -->\n)(.*?)(<!-- end -->)", re.DOTALL)
        text, count = between.subn(lambda found, lines=lines: f"{found[1]}\n{lines}\n\n{found[3]}", text)
        if count != 1:
            raise SystemExit(f"docs/{page} must have one place for the table {table!r}, not {count}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    for page in PAGES:
        before = (DOCS / page).read_text()
        after = written(page, before)
        if args.check and after != before:
            sys.exit(f"docs/{page} does not show what is stored: run python benchmarks/tables.py")
        if not args.check:
            (DOCS / page).write_text(after)


if __name__ == "__main__":
    main()
