"""One line of the doctor: what was checked, whether it is right, and the remedy where it is not."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from xclip_jax.core.errors import UserError, describe

OK, WARNING, FAIL = MARKS = ("ok", "warning", "FAIL")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Options:
    """How thorough the checks are.

    Attributes:
      samples: to read at least.
      seconds: to read for at least.
      step: whether to compile and time the train step, see `check_step`.
    """

    samples: int = 512
    seconds: float = 3.0
    step: str = "auto"


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
      check: what was checked, such as "disk".
      text: what it is like; of a warning or a FAIL what is wrong and why that matters.
      mark: one of `MARKS`.
      remedy: what to do about it; "" where nothing is wrong, or where the text ends in it.
      values: numbers of the text, for machines; bytes, seconds, shares and samples a second.
    """

    check: str
    text: str
    mark: str = OK
    remedy: str = ""
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def line(self) -> str:
        """Return the finding as one line."""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.mark:<8} {self.check:<14} {' '.join(f'{self.text}{remedy}'.split())}"


def warning(check: str, text: str, remedy: str, **values: Any) -> Finding:
    """Return a finding that the run can be started with."""
    return Finding(check, text, WARNING, remedy, values)


def fail(check: str, text: str, remedy: str = "", **values: Any) -> Finding:
    """Return a finding with which the run would fail or be of no use."""
    return Finding(check, text, FAIL, remedy, values)


def attempt(check: str, function: Callable[[], T]) -> tuple[T | None, Finding | None]:
    """Return what `function` returns, or None and the FAIL that its error is.

    `UserError` and an `OSError` that names a file are findings; anything else is a fault of the program and is raised.
    """
    try:
        return function(), None
    except UserError as error:
        return None, fail(check, describe(error))
    except OSError as error:
        if error.filename is None:
            raise
        return None, fail(check, f"{str(error.filename)!r}: {error.strerror}.")


def summary(marks: list[str]) -> str:
    """Return the last line, from the marks of all findings."""
    warnings, failures = marks.count(WARNING), marks.count(FAIL)
    plural = "" if warnings == 1 else "s"
    return f"{len(marks)} checks: {failures} FAIL, {warnings} warning{plural}"
