"""The tables of docs/benchmarks.md, written from benchmarks/results: no figure there is typed by hand.

Run:   python benchmarks/tables.py           (after a script was run with --out benchmarks/results/...)
       python benchmarks/tables.py --check   (fails if the page does not show what is stored)
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "benchmarks.md", ROOT / "benchmarks" / "results"
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


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], Iterator[Row]]]] = {
    "step_cost": ("cpu.json", step_cost),
    "solvers": ("solvers.json", solvers),
    "guarantees": ("guarantees.json", guarantees),
}


def markdown(rows: Iterator[Row]) -> str:
    head, *body = list(rows)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def written(page: str) -> str:
    """The page with its tables as the stored results have them."""
    for name, (file, rows) in TABLES.items():
        table = markdown(rows(json.loads((RESULTS / file).read_text())))
        between = re.compile(rf"(<!-- table {name} -->\n)(.*?)(<!-- end -->)", re.DOTALL)
        page, count = between.subn(lambda found, table=table: f"{found[1]}\n{table}\n\n{found[3]}", page)
        if count != 1:
            raise SystemExit(f"{PAGE} must have one place for the table {name!r}, not {count}")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    before = PAGE.read_text()
    after = written(before)
    if args.check and after != before:
        sys.exit("docs/benchmarks.md does not show what is stored: run python benchmarks/tables.py")
    if not args.check:
        PAGE.write_text(after)


if __name__ == "__main__":
    main()
