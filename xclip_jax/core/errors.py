"""Errors caused by the user's input or by a sample; commands print them as one sentence, without a traceback."""

import argparse
import contextlib
import errno
import itertools
import numbers
import os
import pathlib
import re
import select
import shlex
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, ClassVar, NoReturn

from xclip_jax.core import ending
from xclip_jax.core.addresses import public

# Exit statuses after which the same command goes on with the run: of one that was asked to stop (EX_TEMPFAIL of
# sysexits.h), and of one that hung or lost a process (the first number that sysexits.h leaves free).
EXIT_RESUMABLE = 75
EXIT_RESTART = 79
# Of one whose output has no reader any more: what a shell reports of a program that SIGPIPE ends.
EXIT_UNREAD = 141
# What to do about errors of the operating system that name a file.
_REMEDIES = {
    errno.EACCES: "; change its permissions, or name another folder",
    errno.EROFS: "; name another folder",
}


class UserError(ValueError):
    """Bad input. The message names the file, key or value that is wrong and what to do about it.

    Addresses in it are without passwords and signatures, whoever prints it.
    """

    def __init__(self, *parts: Any) -> None:
        super().__init__(*map(public, parts))


class BadSample(UserError):
    """One sample that cannot be used; training draws another in its place and records this one.

    Attributes:
      reason: a few words without numbers or names, so that samples can be counted by it.
      detail: what exactly is wrong; may be "".
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, public(detail)

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Exceptions pickle by their message alone; this one has two parts."""
        return type(self), (self.reason, self.detail)


class Diverged(UserError):
    """Training whose loss, gradients or updates are not finite."""


def describe(error: BaseException) -> str:
    """Return the message of an exception with its notes, such as the set or file in which it was raised."""
    return public("; ".join([str(error), *getattr(error, "__notes__", ())]))


def first_line(error: BaseException) -> str:
    """Return the class and the first line of a library's error, for a sentence."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(public("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


@contextlib.contextmanager
def exit_with_message() -> Iterator[None]:
    """Context of a command: `UserError`, and an `OSError` that names a file, end it with one sentence and status 1.

    Ctrl-C ends it with one sentence, which has the notes of the `KeyboardInterrupt`, and `ending.EXIT_INTERRUPTED`.
    Where the reader of its output closes it, as `head` does, it ends silently, with status `EXIT_UNREAD`. Other
    exceptions, whose traceback Python prints, show addresses without passwords and signatures too.
    """
    sys.excepthook = _print_exception
    try:
        with ending.unwinding():
            yield
        print(end="", flush=True)  # at Python's own exit an error could not be caught
    except UserError as error:
        sys.exit(f"error: {describe(error)}")
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _drop_unread_output():
            sys.exit(EXIT_UNREAD)
        if error.filename is None:
            raise
        remedy = _REMEDIES.get(error.errno or 0, "")
        sys.exit(public(f"error: {str(error.filename)!r}: {error.strerror}{remedy}"))


def _drop_unread_output() -> bool:
    """Send standard output and standard error to the null device where nobody reads them; return whether one is so.

    What is still in a buffer would else raise at Python's exit. A pipe to another process, which may break as well, is
    not one of the two.
    """
    unread = []
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            unread.append(descriptor)
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in unread:
        os.dup2(null, descriptor)
    os.close(null)
    return bool(unread)


class Parser(argparse.ArgumentParser):
    """Parser of a command's arguments, whose errors are one sentence, without the usage before it.

    Arguments are not abbreviated, and the description is shown as it is written.

    Attributes:
      program: name of the running program in its help, where it was not started by `python -m`; set by `cli`.
    """

    program: ClassVar[str | None] = None

    def __init__(self, *, prog: str | None = None, hints: Mapping[str, str] | None = None, **options: Any) -> None:
        """Make a parser.

        Args:
          prog: name of the program in its help, which `program` replaces, in the description too.
          hints: for options of other commands, without their dashes, what to write instead of them.
          **options: those of `ArgumentParser`.
        """
        self._hints, self._given = dict(hints or {}), list[str]()
        if prog and Parser.program and options.get("description"):
            options["description"] = options["description"].replace(prog, Parser.program)
        defaults: dict[str, Any] = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(prog=Parser.program or prog, **(defaults | options))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def print_help(self, file: Any = None) -> None:
        with exit_with_message():
            print(self.format_help(), end="", file=file)  # argparse's own passes over an error of writing

    def error(self, message: str) -> NoReturn:
        hint = self._hint(message)
        sys.exit(public(f"error: {message}; {f'{hint}; ' if hint else ''}see --help"))

    def _hint(self, message: str) -> str:
        """Return what to write instead of an argument that belongs to another command or was cut off a path."""
        for word in self._given:
            name = word.partition("=")[0].removeprefix("--").replace("-", "_")
            if word.startswith("--") and name in self._hints:
                return self._hints[name]
        leading = list(itertools.takewhile(lambda word: not word.startswith("-"), self._given))
        lacks = "--checkpoint" in self._option_string_actions and "--checkpoint" not in str(self._given)
        if lacks and len(leading) > len(self._get_positional_actions()):
            return f"write --checkpoint {shlex.quote(leading[0])}"
        strange = re.match(r"unrecognized arguments: (.*)|unknown argument '(.*)'$", message)
        text = f"{strange[1] or strange[2]} " if strange else ""
        for before, word in itertools.pairwise(self._given):
            cut = text.startswith(f"{word} ") and (not before.startswith("-") or "=" in before)
            if cut and not word.startswith("-") and not os.path.exists(word):
                rest = itertools.takewhile(lambda word: not word.startswith("-"), text.split())
                return f"quote a path with spaces: {shlex.quote(' '.join([before, *rest]))}"
        return ""


def check_choice(key: str, value: object, valid: Iterable[Any]) -> None:
    """Raises `UserError` unless `value` is among `valid`; the message lists the valid values of config key `key`."""
    valid = list(valid)
    if value not in valid:
        raise UserError(f"{key} is {value!r}; it must be one of {', '.join(map(repr, valid))}.")


def check_count(key: str, value: object, minimum: int) -> None:
    """Raises `UserError` unless `value`, given as `key`, is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
        raise UserError(f"{key} is {value!r}; expected an integer of at least {minimum}.")


def check_writable(option: str, folder: str | os.PathLike) -> None:
    """Raises `UserError`, which begins with `option`, unless `folder` exists or can be made, and can be written to."""
    parent = pathlib.Path(folder).absolute()
    while not (parent.exists() or parent.is_symlink()):
        parent = parent.parent
    fault = ""
    if not parent.is_dir():
        fault = "is not a folder"
    elif not os.access(parent, os.W_OK | os.X_OK):
        fault = "cannot be written to"
    if fault:
        raise UserError(f"{option}: {str(parent)!r} {fault}; name another folder.")
