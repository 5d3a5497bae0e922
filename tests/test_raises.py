"""Every error of the package has one form: ``Who: `arg` must <expected>, got <value>. <Cure>.``"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_mtl
from lightning_mtl.checks import bad_argument

PACKAGE = Path(lightning_mtl.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "_recipes" not in path.parts)
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text() for path in FILES}
PARAMETERS = ["who", "arg", "expected", "got", "cure", "kind"]
FORM = re.compile(r"[\w.\[\]' -]+: `[^`]+` must \S.*, got .*\. [A-Z`].*[^.]\.", re.DOTALL)


def called(node: ast.AST | None) -> str:
    """``f`` for a call of ``f(...)`` or ``module.f(...)``, else nothing."""
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def error_makers(sources: dict[str, str]) -> set[str]:
    """``bad_argument`` and the functions that only ever return what it makes."""
    makers = {"bad_argument"}
    functions = [
        node for source in sources.values() for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)
    ]
    for _ in range(2):  # a maker may call a maker
        for function in functions:
            returns = [node for node in ast.walk(function) if isinstance(node, ast.Return)]
            if returns and all(called(node.value) in makers for node in returns):
                makers.add(function.name)
    return makers


MAKERS = error_makers(SOURCES)


def only_raises(function: ast.FunctionDef) -> bool:
    """Whether a function is a docstring and a raise: a method that each subclass fills in."""
    return all(
        isinstance(line, ast.Raise) or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
        for line in function.body
    )


def other_raises(source: str, makers: set[str] = MAKERS) -> Iterator[int]:
    """Lines that raise something else than an error of the one form, or what Python asks for where it stands."""
    tree = ast.parse(source)
    allowed: dict[int, str] = {}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            name = "NotImplementedError" if only_raises(function) else ""
            name = "AttributeError" if function.name == "__getattr__" else name
            allowed |= {id(node): name for node in ast.walk(function) if name}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Raise) or node.exc is None or called(node.exc) in makers:
            continue
        name = called(node.exc) or getattr(node.exc, "id", "")
        fits = isinstance(node.exc, ast.Call) and FORM.fullmatch(fixed_text(next(iter(node.exc.args), None)) or "")
        if not (fits or name == "SystemExit" or name == allowed.get(id(node))):
            yield node.lineno


def fixed_text(node: ast.expr | None) -> str | None:
    """The text of a string, each ``{...}`` of an f-string as X; None if it is put together elsewhere."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
    return None


def wordings(source: str) -> Iterator[tuple[int, str]]:
    """Line and message of every call of ``bad_argument``, with X for what is known only when it runs."""
    for node in ast.walk(ast.parse(source)):
        if called(node) != "bad_argument":
            continue
        given = dict(zip(PARAMETERS, node.args, strict=False)) | {word.arg: word.value for word in node.keywords}
        part = {name: fixed_text(given.get(name)) or "X" for name in PARAMETERS}
        yield node.lineno, "{who}: `{arg}` must {expected}, got {got}. {cure}.".format(**part)


@pytest.mark.parametrize("name", SOURCES)
def test_every_raise_has_the_one_form(name):
    lines = list(other_raises(SOURCES[name]))
    assert not lines, f"{name}, lines {lines}: raise checks.bad_argument(...) instead"


@pytest.mark.parametrize("name", SOURCES)
def test_every_wording_fits_the_form(name):
    wrong = [f"line {line}: {text}" for line, text in wordings(SOURCES[name]) if not FORM.fullmatch(text)]
    wrong += [f"line {line}: must twice" for line, text in wordings(SOURCES[name]) if "must must" in text]
    assert not wrong, f"{name}: " + "; ".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        "raise ValueError('no')",
        "raise ValueError(f'A: `b` must be 1, got {b}.')",
        "def f(x):\n    if x:\n        raise RuntimeError",
        "def f(x):\n    x += 1\n    raise NotImplementedError",
        "def f(x):\n    raise KeyError(x) from None",
        "def f(x):\n    if x:\n        raise AttributeError(x)",
    ],
)
def test_another_raise_is_found(source):
    assert len(list(other_raises(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "raise bad_argument('A', 'b', 'be 1', 2, 'Pass 1')",
        "raise OSError(f'A: `b` must be 1, got {b}. Pass 1.')",
        "raise SystemExit(2)",
        "def __getattr__(name):\n    if name in HOMES:\n        return 1\n    raise AttributeError(name)",
        "try:\n    f()\nexcept ValueError:\n    raise",
        "def f(x):\n    '''Filled in by each method.'''\n    raise NotImplementedError",
    ],
)
def test_a_raise_of_the_form_is_not(source):
    assert not list(other_raises(source))


@pytest.mark.parametrize("cure", ["Pass 1.", "pass 1", ""])
def test_a_cure_that_is_no_sentence_is_found(cure):
    ((_, text),) = wordings(f"bad_argument('A', 'b', 'be 1', 2, {cure!r})")
    # An empty cure reads as unknown above, so it is written out here.
    assert not FORM.fullmatch(text if cure else "A: `b` must be 1, got 2. .")


def test_the_form_itself():
    error = bad_argument("PCGrad", "gram", "have shape [T, T]", [2, 3], "Pass rows @ rows.T", TypeError)
    assert isinstance(error, TypeError)
    assert str(error) == "PCGrad: `gram` must have shape [T, T], got [2, 3]. Pass rows @ rows.T."
    assert FORM.fullmatch(str(error))
