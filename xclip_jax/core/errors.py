"""Errors caused by the user's input or by a sample; commands print them as one sentence, without a traceback."""

import argparse
import contextlib
import numbers
import os
import pathlib
import re
import select
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, ClassVar, NoReturn

__all__ = ["BadSample", "Diverged", "UserError"]

# The bounds keep matching linear in the length of a text, which may be a caption of somebody else.
_USER = re.compile(r"""(?<![A-Za-z0-9+.-])([A-Za-z0-9+.-]{1,40})://([^\s/"]{0,2000})@""")
# A query, in http also a fragment: up to a space, a quote, closing marks before these, or a comma and a next address.
# Elsewhere than in http a ? without KEY= is a wildcard.
_QUERY = re.compile(
    r"""
    (?<![A-Za-z0-9+.-])
    (https?://[^\s"`<>?\#]*+ (?=[?\#]) | [A-Za-z0-9+.-]{1,40}://[^\s"`<>?]*+ (?=\?[\w.-]+=))
    ((?:(?!,\s{0,9}[A-Za-z][\w.+:-]{0,40}:) (?![?'"()\[\]{},.:;!\\]{0,9}(?:[\s"`<>]|$)) (?:[^\s"`<>\\]|\\(?!["'])))*)
    """,
    re.IGNORECASE | re.VERBOSE,
)
# Columns that the name of a source or set ends in, which are no part of the address.
_COLUMNS = re.compile(r"\?(?:(?:image|text|label)=[^?#&]*(?:&|$))+$")


def redact(content: Any) -> Any:
    """Return `content`, a text or JSON, without user information, query and fragment of every URL in it.

    A user without password stays in other URLs than http: abfs://container@account names a place. Columns at the end of
    a source or set, ?image=COLUMN&text=COLUMN, stay too.
    """
    if isinstance(content, str):
        return _QUERY.sub(_without_query, _USER.sub(_without_user, content)) if "://" in content else content
    if isinstance(content, Mapping):
        return {redact(key): redact(value) for key, value in content.items()}
    return type(content)(map(redact, content)) if isinstance(content, (list, tuple)) else content


def _without_user(match: re.Match[str]) -> str:
    scheme, user = match.groups()
    return f"{scheme}://" if scheme.lower() in ("http", "https") or ":" in user else match[0]


def _without_query(match: re.Match[str]) -> str:
    columns = _COLUMNS.search(match[2])
    return match[1] + (columns[0] if columns else "")


# Exit statuses after SIGINT (128 + 2) and SIGPIPE (128 + 13), as shells report them.
EXIT_INTERRUPTED = 130
EXIT_UNREAD = 141
# Exit statuses after which the same command resumes the run: it was asked to stop (EX_TEMPFAIL of sysexits.h), or it
# hung or lost a process (the first number that sysexits.h leaves free).
EXIT_RESUMABLE = 75
EXIT_RESTART = 79


def exit_now(status: int) -> NoReturn:
    """End this process without waiting for its threads, wherever it is, a signal's handler included.

    Python's own exit crashes where XLA still compiles in threads of its own, and waits for threads that read.
    """
    try:
        for flush in (sys.stdout.flush, sys.stderr.flush):
            with contextlib.suppress(Exception):  # a stream that nobody reads, or that was just being written
                flush()
    finally:
        os._exit(status)


def interrupted(*_: Any, advice: str = "") -> NoReturn:
    """End this process by Ctrl-C, in one sentence; also a handler of SIGINT.

    An exception could be lost in a callback, such as JAX's in each garbage collection, or in an import inside `try`.
    """
    os.write(2, f"error: interrupted{advice and f'; {advice}'}\n".encode())  # a handler may not enter sys.stderr again
    exit_now(EXIT_INTERRUPTED)


def end_at_once() -> None:
    """Let Ctrl-C end this process at once from here on, unless the parent process ignores it, as nohup does."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)
        sys.unraisablehook = _unraisable


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Let Ctrl-C end a command by `KeyboardInterrupt`, so that open files are closed; see `end_at_once`."""
    if signal.getsignal(signal.SIGINT) is not interrupted:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt as error:
        interrupted(advice="; ".join(getattr(error, "__notes__", ())))
    finally:
        signal.signal(signal.SIGINT, interrupted)


def _unraisable(event: Any) -> None:
    if issubclass(event.exc_type, KeyboardInterrupt):  # else the command would go on
        interrupted()
    sys.__unraisablehook__(event)


class UserError(ValueError):
    """Bad input. The message names the wrong file, key or value and the remedy, without the secrets of addresses."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*map(redact, parts))


class BadSample(UserError):
    """One sample that cannot be used; training draws another in its place and records this one.

    Attributes:
      reason: a few words without numbers or names, so that samples can be counted by it.
      detail: what exactly is wrong; may be "".
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Exceptions pickle only their message; this one has two parts."""
        return type(self), (self.reason, self.detail)


class Diverged(UserError):
    """Training whose loss, gradients or updates are not finite."""


def describe(error: BaseException) -> str:
    """Return the message of an exception with its notes, such as the set or file in which it was raised."""
    notes = getattr(error, "__notes__", ())
    return "; ".join([str(error).removesuffix(".") if notes else str(error), *notes])


def first_line(error: BaseException) -> str:
    """Return the class and the first line of a library's error, for a sentence."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


@contextlib.contextmanager
def exit_with_message() -> Iterator[None]:
    """Context of a command: `UserError`, and an `OSError` that names a file, end it with one sentence and status 1.

    Ctrl-C ends it with one sentence, which has the notes of the `KeyboardInterrupt`, and `EXIT_INTERRUPTED`. If the
    reader closes the output, as `head` does, it ends silently with `EXIT_UNREAD`. Tracebacks are redacted.
    """
    sys.excepthook = _print_exception
    try:
        with unwinding():
            yield
        print(end="", flush=True)  # at Python's own exit an error could not be caught
    except UserError as error:
        sys.exit(redact(f"error: {describe(error)}"))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_unread():
            sys.exit(EXIT_UNREAD)
        if error.filename is None:
            raise
        sys.exit(redact(f"error: {str(error.filename)!r}: {error.strerror}"))


def _is_unread() -> bool:
    """Whether nobody reads standard output, whose rest is dropped then: Python's exit would raise for it."""
    poll = select.poll()
    poll.register(1, 0)
    unread = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return unread


class Parser(argparse.ArgumentParser):
    """Parser of a command's arguments, whose errors are one sentence, without the usage before it.

    Arguments are not abbreviated, and the description is shown as it is written.

    Attributes:
      program: name of the program in its help, if it was not started by `python -m`; set by `xclip_jax.main`.
    """

    program: ClassVar[str | None] = None

    def __init__(self, *, prog: str, description: str | None = None, **options: Any) -> None:
        """Make a parser; `program` replaces `prog`, in the description too."""
        program = Parser.program or prog
        defaults: dict[str, Any] = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(prog=program, description=(description or "").replace(prog, program), **(defaults | options))

    def error(self, message: str) -> NoReturn:
        sys.exit(redact(f"error: {message}; see --help"))


def check_choice(key: str, value: object, valid: Iterable[Any]) -> None:
    """Raises `UserError` unless `value` is among `valid`; the message lists the valid values of config key `key`."""
    valid = list(valid)
    if value not in valid:
        raise UserError(f"{key} is {value!r}; it must be one of {', '.join(map(repr, valid))}.")


def check_count(key: str, value: object, minimum: int) -> None:
    """Raises `UserError` unless `value`, given as `key`, is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
        raise UserError(f"{key} is {value!r}; expected an integer of at least {minimum}.")


def check_file(option: str, path: str | os.PathLike) -> None:
    """Make the folder of a file that an option names; raises `UserError` if the file cannot be written there."""
    check_writable(option, pathlib.Path(path).parent)
    if pathlib.Path(path).is_dir():
        raise UserError(f"{option}: {str(path)!r} is a folder; name a file.")
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)


def check_writable(option: str, folder: str | os.PathLike) -> None:
    """Raises `UserError`, which names `option`, unless files can be written to `folder`, which need not exist yet."""
    parent = pathlib.Path(folder).absolute()
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        fault = "cannot be written to" if parent.is_dir() else "is not a folder"
        raise UserError(f"{option}: {str(parent)!r} {fault}; name another folder.")
