"""Following docs/add_a_balancer.md to the letter gives a balancer that obeys all laws."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest

from tests.balancers import test_balancers as laws
from tests.balancers.cases import Case

PAGE = Path(__file__).parents[2] / "docs" / "add_a_balancer.md"
# Laws of every balancer, and of every gram balancer, that need no other parameter.
LAWS = [
    name
    for name, law in vars(laws).items()
    if name.startswith("test_")
    and list(inspect.signature(law).parameters) == ["case"]
    and any(mark.args[1] in (laws.ALL.args[1], laws.GRAM.args[1]) for mark in law.pytestmark)
]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    code, line = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[:2]
    folder = tmp_path_factory.mktemp("project")
    (folder / "followed_page.py").write_text(code)
    said: dict[str, object] = {}
    exec(line, said)
    sys.path.insert(0, str(folder))
    yield Case("followed_page.Longest", frozenset(said["promises"]), said["known_weights"])  # type: ignore[arg-type]
    sys.path.remove(str(folder))


@pytest.mark.parametrize("law", LAWS)
def test_it_obeys_the_laws(law, case):
    getattr(laws, law)(case)


@pytest.mark.parametrize("order", [[1, 0, 2, 3], [3, 1, 0, 2]])
def test_it_keeps_its_promises(case, order):
    assert case.promises <= laws.TESTED
    laws.test_ignores_state(case)
    laws.test_equivariant(case, order)
    laws.test_scale_free(case, 7.0)
    laws.test_sums_to_1(case)
    laws.test_never_negative(case)


def test_there_are_enough_laws():
    assert len(LAWS) >= 10
