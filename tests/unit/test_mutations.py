"""The list of weakenings fits the code that is here: what ``python -m benchmarks.mutate`` would do can be done."""

from __future__ import annotations

import ast

import pytest

from benchmarks.mutate import Unfit, weaken
from benchmarks.mutations import MUTATIONS, Mutation
from benchmarks.report import ROOT

TESTS = (ast.FunctionDef, ast.AsyncFunctionDef)


def named(test: str) -> tuple[str, str]:
    """File and function of a test's id."""
    file, _, function = test.partition("::")
    return file, function.partition("[")[0]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS])
def test_it_fits_and_its_tests_exist(mutation: Mutation) -> None:
    source = (ROOT / mutation.file).read_text()
    assert weaken(source, mutation) != source
    assert mutation.tests
    for test in mutation.tests:
        file, function = named(test)
        functions = [node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, TESTS)]
        assert function in functions


def test_names_are_its_own() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 20


@pytest.mark.parametrize(("old", "new"), [("a", "b"), ("missing", "b"), ("x = 1", "x = (")])
def test_what_does_not_fit_is_said(old: str, new: str) -> None:
    """Twice there, not there, no Python afterwards."""
    with pytest.raises(Unfit, match="a name"):
        weaken("x = 1\na = a\n", Mutation("a name", "", "file.py", old, new, ()))
