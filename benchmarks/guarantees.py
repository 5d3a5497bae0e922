"""The worst residual of each guarantee, over the whole grid of problems.

Run:   python benchmarks/guarantees.py                (CPU, one thread; about an hour with 50 problems per cell)
       python benchmarks/guarantees.py --problems 2   (what the tests run)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

# The residuals are those of the tests.
sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.balancers.guarantees import METHODS, SIZES, bar, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=50, help="per cell")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, help="write the numbers there as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("method", "residual", "rows", "worst", "bar", "where", title=f"{args.problems} problems per cell")
    results = []
    for method in args.methods:
        found: dict = {}
        for num_tasks in SIZES:
            for key, value in worst(method, num_tasks, args.problems).items():
                found[key] = max(found.get(key, value), value, key=lambda pair: pair[0])
        for (name, dtype), (value, problem) in found.items():
            limit, rows = bar(name, dtype), str(dtype).removeprefix("torch.")
            where = f"T={problem.num_tasks} rank={problem.rank} ratio={problem.ratio:.0e} #{problem.index}"
            table.add_row(method, name, rows, f"{'[red]' if value > limit else ''}{value:.1e}", f"{limit:.0e}", where)
            results.append(
                {"method": method, "residual": name, "rows": rows, "worst": value, "bar": limit, "where": where}
            )
        if args.out:  # after each method: an hour's work is not lost with its last minute
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"problems": args.problems, "results": results}, indent=1) + "\n")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
