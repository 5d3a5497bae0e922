"""The table of docs/refused.md, written from the errors of the engine and the module layer.

python docs/refusals.py     writes it; tests/test_refused.py says when it is old.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "refused.md"
PARAMETERS = ("who", "arg", "expected", "got", "cure")
MARKED = re.compile(r"(?<=<!-- written by docs/refusals.py -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)


def rows() -> list[tuple[str, str, str]]:
    """Argument, what it must, and the cure, of every error; … for what is known only when it runs."""
    found = []
    for folder in ("engine", "module"):
        for path in sorted((ROOT / "lightning_mtl" / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "bad_argument":
                    given = dict(zip(PARAMETERS, node.args, strict=False))
                    found.append((_text(given["arg"]), _text(given["expected"]), _text(given["cure"])))
    return sorted(set(found))


def table() -> str:
    """The rows in Markdown."""
    lines = ["| argument | must | cure |", "| --- | --- | --- |"]
    for row in rows():
        lines.append("| " + " | ".join([f"`{row[0]}`", *(cell.replace("|", "\\|") for cell in row[1:])]) + " |")
    return "\n".join(lines) + "\n"


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return "…"


if __name__ == "__main__":
    PAGE.write_text(MARKED.sub(lambda _: table(), PAGE.read_text()))
