"""Reading of records, in which any fault of a record becomes a `BadSample`."""

import collections
import hashlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import prefetch
from xclip_jax.data.base import Record, Source

MAX_THREADS = 16  # that read all records of a source at the start, of data.threads
_CHUNK = 32  # records that a thread reads one after another

T = TypeVar("T")


def read(source: Source, index: int) -> Record | BadSample:
    """Return record `index` of `source`, or the `BadSample` that says why it cannot be used.

    Raises:
      UserError, MemoryError: errors that concern more than this record.
    """
    try:
        return source[index]
    except Exception as error:
        return as_bad_sample(error)


def read_all(places: Sequence[tuple[Source, int]], timeout: float) -> list[Record | BadSample]:
    """Return `read(source, index)` for each of `places`.

    Args:
      places: (source, index) of the records.
      timeout: seconds after which a record that is not read is a `BadSample`, as on a disk that does not answer; 0 to
        wait for ever. What hangs keeps a thread, which ends when the disk answers or the process does.

    Raises:
      UserError, MemoryError: errors that concern more than one record.
    """
    if not timeout:
        return [read(source, index) for source, index in places]
    done: list[Record | BadSample] = []
    while len(done) < len(places):
        done += _read_until(places[len(done) :], timeout)
    return done


def _read_until(places: Sequence[tuple[Source, int]], timeout: float) -> list[Record | BadSample]:
    """The records up to one that hangs, which is a `BadSample`, or all of them."""
    records: list[Record | BadSample] = []
    errors: list[BaseException] = []
    ended = threading.Event()

    def work() -> None:
        try:
            for source, index in places:
                records.append(read(source, index))
        except BaseException as error:  # to be raised where it is waited for
            errors.append(error)
        finally:
            ended.set()

    threading.Thread(target=work, daemon=True, name="read").start()
    before = 0
    while not ended.wait(timeout):
        if len(records) == before:
            return [*records[:before], BadSample("read takes too long", f"more than {timeout:g} s")]
        before = len(records)
    if errors:
        raise errors[0]
    return records


def read_each(
    places: Iterable[tuple[Source, int]], take: Callable[[Record], T], *, timeout: float, threads: int
) -> Iterator[T | BadSample]:
    """Yield `take(record)` of each of `places`, in their order, and the `BadSample` of one that cannot be used.

    A caller that stops iterating, as at a signal, does not wait for records that are still being read; nor does the
    end of the process.

    Args:
      places: (source, index) of the records; some are taken ahead.
      take: called in the threads; it keeps little of a record, as its results wait in memory. What it raises makes the
        record a bad one.
      timeout: as of `read_all`.
      threads: number of chunks that are read at once.

    Raises:
      UserError, MemoryError: errors that concern more than one record.
    """

    def taken(record: Record | BadSample) -> T | BadSample:
        try:
            return record if isinstance(record, BadSample) else take(record)
        except Exception as error:
            return as_bad_sample(error)

    def work(chunk: Sequence[tuple[Source, int]]) -> list[T | BadSample]:
        return [taken(record) for record in read_all(chunk, timeout)]

    remaining, waiting = iter(places), collections.deque()
    with prefetch.thread_pool(threads) as pool:
        while chunk := list(itertools.islice(remaining, _CHUNK)):
            waiting.append(pool.apply_async(work, (chunk,)))
            if len(waiting) > 2 * threads:
                yield from waiting.popleft().get()
        while waiting:
            yield from waiting.popleft().get()


def outcome(numbers: np.ndarray, unreadable: int) -> dict[str, Any]:
    """Return JSON by which two readings of all records of a source are compared.

    Args:
      numbers: int (n,), what the order of a run takes from the records.
      unreadable: number of records that could not be read.
    """
    digest = hashlib.blake2b(np.ascontiguousarray(numbers, "<i8").tobytes(), digest_size=8).hexdigest()
    return {"digest": digest, "unreadable": unreadable}


def as_bad_sample(error: Exception) -> BadSample:
    """Return what reading or decoding one record raised as a `BadSample` with the exception's type as its reason.

    Parsers, decoders and tokenizers raise exceptions of any class on input that they were not made for.

    Raises:
      UserError, MemoryError: `error` itself, where it concerns more than the record.
    """
    if isinstance(error, BadSample):
        return error
    if isinstance(error, (UserError, MemoryError)):
        raise error
    if isinstance(error, UnicodeDecodeError):
        return BadSample("caption is not UTF-8", str(error))
    return BadSample(type(error).__name__, str(error))
