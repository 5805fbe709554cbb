"""The tables of promises in docs/reliability.md name tests that exist, one of each in the normal suite."""

import ast
import functools
import pathlib
import re

import pytest

from tests.torture import faults

pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).parents[2]
# Promises that the normal suite does not try: each of their tests starts whole runs, half a minute of them, or more.
# `python -m tests.torture.faults` tries them.
SLOW = {
    # One that fails is in the suite; these take seconds of silence too.
    "one of several processes is killed, or hangs for `log.stall_limit`",
    "a signal to one of several processes",  # the suite has signals to one alone, and who agrees on them in parts
}


@functools.cache
def parsed(path):
    return ast.parse((ROOT / path).read_text())


def function(test):
    path, name = test.split("::")
    found = [x for x in ast.walk(parsed(path)) if isinstance(x, ast.FunctionDef) and x.name == name]
    assert found, f"{path} has no {name}"
    return found[0]


def is_in_the_normal_suite(test):
    """Whether neither the test nor one of its cases is marked to be left out."""
    marks = [ast.unparse(decorator) for decorator in function(test).decorator_list]
    return not any(re.search(r"\b(slow|skip)\b", mark) for mark in marks)


def test_every_promise_names_tests_that_exist():
    assert len(faults.promises()) > 30
    for promise in faults.promises():
        assert promise.tests and all(function(test) for test in promise.tests)


def test_every_promise_has_a_test_in_the_normal_suite():
    slow = {x.fault for x in faults.promises() if not any(is_in_the_normal_suite(test) for test in x.tests)}
    assert slow == SLOW
