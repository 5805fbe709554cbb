"""The table of promises: each names tests that exist, and the command tells what came from what was expected."""

import ast
import pathlib

import pytest

from benchmarks import faults

ROOT = pathlib.Path(__file__).parents[1]


def test_every_promise_names_tests_that_exist():
    for promise in faults.PROMISES:
        assert promise.tests
        for name in promise.tests:
            path, function = faults.node(name).split("::")
            functions = {
                x.name for x in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(x, ast.FunctionDef)
            }
            assert function in functions, f"{path} has no {function}"


@pytest.mark.parametrize(
    ("body", "holds", "words"), [("assert True", True, "1 passed"), ("assert 1 == 2", False, "FAILED")]
)
def test_what_came(body, holds, words, tmp_path, monkeypatch):
    path = tmp_path / "test_it.py"
    path.write_text(f"def test_x():\n    {body}\n")
    monkeypatch.setattr(faults, "node", lambda _: str(path))
    got, came = faults.run(faults.Promise("area", "fault", "expected", ("it::x",)))
    assert got == holds and words in came


def test_a_promise_without_a_test_that_ran_does_not_hold(tmp_path, monkeypatch):
    path = tmp_path / "test_it.py"
    path.write_text("import pytest\n\n\n@pytest.mark.skip\ndef test_x():\n    pass\n")
    monkeypatch.setattr(faults, "node", lambda _: str(path))
    assert not faults.run(faults.Promise("area", "fault", "expected", ("it::x",)))[0]
