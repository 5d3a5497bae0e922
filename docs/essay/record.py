"""Measure what the pages of the essay show: run the command, store its tables, and write them into the page.

Run:   python docs/essay/record.py                        (every command; about five minutes of one core)
       python docs/essay/record.py transfer caruana_bias  (those whose file in results/ begins with one of these)
       python docs/essay/record.py --stored               (runs nothing: writes what is stored into the pages)

A page says what it shows by a line `<!-- measured: caruana amplify -->`, which stands for the command
`lightning-mtl run caruana amplify`, and ends it by `<!-- end -->`; what is between the two is written here. The tests
compare it with `results/caruana_amplify.json`.
"""

import argparse
import json
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import chdir
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
MEASURED = re.compile(r"<!-- measured: (?P<arguments>.+?) -->\n(?P<shown>.*?)<!-- end -->", re.DOTALL)
PACKAGES = {"torch": "torch", "gpytorch": "GPyTorch", "sklearn": "scikit-learn", "scipy": "SciPy"}


def file_of(arguments: str) -> Path:
    """Where the result of ``lightning-mtl run <arguments>`` is stored."""
    return HERE / "results" / (re.sub(r"\W+", "_", arguments) + ".json")


def measure(arguments: str) -> dict[str, Any]:
    """Run a recipe on one thread and note each table that it makes, with the time and the versions."""
    import torch

    from lightning_mtl.cli.compare import load
    from lightning_mtl.cli.folder import find

    torch.set_num_threads(1)
    name, *options = shlex.split(arguments)
    recipe = load(find(name).path)
    from _lab import report  # importable since the recipe is

    tables: list[dict[str, Any]] = []
    make = report.table

    def noted(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Any:
        tables.append({"title": title, "columns": list(columns), "rows": [list(row) for row in rows]})
        return make(**tables[-1])

    started = time.process_time()
    with mock.patch.object(report, "table", noted), tempfile.TemporaryDirectory() as folder, chdir(folder):
        recipe.main(options)
    return {
        "command": f"lightning-mtl run {arguments}",
        "date": date.today().isoformat(),
        "seconds": round(time.process_time() - started),
        # Without the build, as in 2.13.0+cpu.
        "versions": {text: version(text).partition("+")[0] for name, text in PACKAGES.items() if name in sys.modules},
        "tables": tables,
    }


def shown(result: dict[str, Any]) -> str:
    """The lines of a page: what was run and when, then each table under its title."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    parts = [f"`{result['command']}`, {result['date']}: CPU, {result['seconds']} s of one core, {versions}."]
    for table in result["tables"]:
        rows = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
        lines = [re.sub(r"\[/?bold\]", "**", f"| {' | '.join(row)} |").replace("\n", " ") for row in rows]
        parts += [f"*{table['title']}*", "\n".join(lines)]
    return "\n\n".join(parts) + "\n\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[""], help="how the file in results/ begins")
    parser.add_argument("--stored", action="store_true", help="run nothing")
    options = parser.parse_args()
    for page in sorted(HERE.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for match in MEASURED.finditer(text):
            file = file_of(match["arguments"])
            if not file.stem.startswith(tuple(options.names)):
                continue
            if not options.stored:
                file.parent.mkdir(exist_ok=True)
                result = json.dumps(measure(match["arguments"]), indent=1, ensure_ascii=False)
                file.write_text(result + "\n", encoding="utf-8")
            # The page as it is now: this run may have taken minutes.
            now = shown(json.loads(file.read_text(encoding="utf-8")))
            start = match[0].partition("\n")[0]
            before = page.read_text(encoding="utf-8")
            page.write_text(before.replace(match[0], f"{start}\n{now}<!-- end -->"), encoding="utf-8")
            print(f"{page.name}: {file.name}")


if __name__ == "__main__":
    main()
