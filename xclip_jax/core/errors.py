"""User errors, which commands print as one sentence without a traceback; exit statuses, Ctrl-C, and redaction."""

import argparse
import contextlib
import errno
import numbers
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, ClassVar, NoReturn

__all__ = ["BadSample", "Diverged", "UserError"]

# The bounds keep matching linear in the length of the text, which may be an untrusted caption.
_USER = re.compile(r"""(?<![A-Za-z0-9+.-])([A-Za-z0-9+.-]{1,40})://([^\s/"]{0,2000})@""")
# A query, or in http a fragment: up to a space, a quote, closing marks before these, or a comma before another URL,
# which has no & before its ?. Outside http a ? without KEY= is a wildcard.
_QUERY = re.compile(
    r"""
    (?<![A-Za-z0-9+.-])
    (https?://[^\s"`<>?\#]*+ (?=[?\#]) | [A-Za-z0-9+.-]{1,40}://[^\s"`<>?]*+ (?=\?[\w.-]+=))
    ((?:(?!,\s{0,9}[A-Za-z][\w.+:-]{0,40}:(?![^\s"?,]*&))
        (?![?'"()\[\]{},.:;!\\]{0,9}(?:[\s"`<>]|$)) (?:[^\s"`<>\\]|\\(?!["'])))*)
    """,
    re.IGNORECASE | re.VERBOSE,
)
# Columns at the end of a source or set, which are not part of the URL.
_COLUMNS = re.compile(r"\?(?:(?:image|text|label)=[^?#&]*(?:&|$))+$")


def redact(content: Any) -> Any:
    """Return text or JSON with user information, query and fragment removed from every URL.

    Outside http a user without a password stays, since abfs://container@account names a place. Columns at the end of a
    source or set, ?image=COLUMN&text=COLUMN, also stay.
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
# Exit statuses of runs that the same command resumes: stopped by a signal (EX_TEMPFAIL of sysexits.h), or hung or
# missing a process (the first number unused by sysexits.h).
EXIT_RESUMABLE = 75
EXIT_RESTART = 79


def exit_now(status: int) -> NoReturn:
    """Exit without waiting for threads, also from a signal handler.

    Python's own exit waits for reading threads, and crashes while XLA compiles in other threads.
    """
    try:
        for flush in (sys.stdout.flush, sys.stderr.flush):
            with contextlib.suppress(Exception):  # closed by its reader, or interrupted in a write
                flush()
    finally:
        os._exit(status)


def interrupted(*_: Any, advice: str = "") -> NoReturn:
    """Exit after Ctrl-C with one sentence; also serves as the SIGINT handler.

    An exception could be lost in a callback, such as JAX's at garbage collection, or in an import inside `try`.
    """
    os.write(2, f"error: interrupted{advice and f'; {advice}'}\n".encode())  # sys.stderr is not reentrant
    exit_now(EXIT_INTERRUPTED)


def end_at_once() -> None:
    """From now on exit on Ctrl-C without unwinding, unless the parent process ignores it, as nohup does.

    Closed standard streams are opened, or the first files would get their numbers, and messages of libraries.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            discard(descriptor)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)
    sys.unraisablehook = _unraisable


def _unraisable(event: Any) -> None:
    if issubclass(event.exc_type, KeyboardInterrupt):  # else the command would continue
        interrupted()
    # TensorStore ends its other writes, each with this error, after Orbax has raised that of the first one.
    if str(event.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(event)


class UserError(ValueError):
    """Bad input. The message names the file, key or value and the remedy; its URLs are redacted."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*map(redact, parts))


class BadSample(UserError):
    """An unusable sample, which training records and replaces.

    Samples are counted by `reason`, a few words without numbers or names; `detail` is the exact fault or "".
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Keep both parts, since exceptions pickle only their message."""
        return type(self), (self.reason, self.detail)


class Diverged(UserError):
    """Training with a non-finite loss, gradients or updates."""


def describe(error: BaseException) -> str:
    """Return the message of an exception with its notes, such as the set or file it concerns."""
    notes = getattr(error, "__notes__", ())
    return "; ".join([str(error).removesuffix(".") if notes else str(error), *notes])


def first_line(error: BaseException) -> str:
    """Return the class and the first line of a library's error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


@contextlib.contextmanager
def exit_with_message() -> Iterator[None]:
    """Context of a command: a `UserError`, or an `OSError` with a filename, exits with one sentence and status 1.

    So does an `OSError` of a full disk. Ctrl-C unwinds, so that files are closed, and exits with one sentence, notes of
    the `KeyboardInterrupt` included, and `EXIT_INTERRUPTED`. If the reader closes the output, as `head` does, the
    command exits silently with `EXIT_UNREAD`. Tracebacks are redacted.
    """
    sys.excepthook = _print_exception
    handled = signal.getsignal(signal.SIGINT) is interrupted
    if handled:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
        print(end="", flush=True)  # at interpreter exit an error could not be caught
    except KeyboardInterrupt as error:
        if not handled:
            raise
        interrupted(advice="; ".join(getattr(error, "__notes__", ())))
    except UserError as error:
        sys.exit(redact(f"error: {describe(error)}"))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_unread():
            sys.exit(EXIT_UNREAD)
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        place = (
            "a file, perhaps in /tmp or /dev/shm, cannot be written"
            if error.filename is None
            else repr(str(error.filename))
        )
        sys.exit(redact(f"error: {place}: {error.strerror}"))
    finally:
        if handled:
            signal.signal(signal.SIGINT, interrupted)


def _is_unread() -> bool:
    """Whether nobody reads standard output; if so, discard the rest, which would raise at interpreter exit."""
    poll = select.poll()
    poll.register(1, 0)
    unread = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if unread:
        discard(1)
    return unread


def discard(descriptor: int) -> None:
    """Discard what is written to `descriptor` from now on."""
    os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)


class Parser(argparse.ArgumentParser):
    """Argument parser with one-sentence errors, no abbreviations, and the description shown unchanged."""

    program: ClassVar[str | None] = None  # set by `xclip_jax.main` to replace `prog`, in the description too

    def __init__(self, *, prog: str, description: str | None = None, **options: Any) -> None:
        """Make a parser, see `argparse.ArgumentParser`."""
        program = Parser.program or prog
        defaults: dict[str, Any] = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(prog=program, description=(description or "").replace(prog, program), **(defaults | options))

    def error(self, message: str) -> NoReturn:
        sys.exit(redact(f"error: {message}; see --help"))


def check_choice(key: str, value: object, valid: Iterable[Any]) -> None:
    """Raise a `UserError` with the valid values of config key `key` unless `value` is one of them."""
    valid = list(valid)
    if value not in valid:
        raise UserError(f"{key} is {value!r}; it must be one of {', '.join(map(repr, valid))}.")


def check_count(key: str, value: object, minimum: int) -> None:
    """Raise `UserError` unless the value of `key` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
        raise UserError(f"{key} is {value!r}; expected an integer of at least {minimum}.")


def check_fraction(key: str, value: float) -> None:
    """Raise `UserError` unless the value of `key` is from 0 to 1."""
    if not 0 <= value <= 1:
        raise UserError(f"{key} is {value:g}; expected a fraction from 0 to 1.")
