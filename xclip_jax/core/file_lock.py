"""A lock beside a file that several processes may write, each as a whole and one after another."""

import contextlib
import errno
import fcntl
import functools
import os
import pathlib
from collections.abc import Iterator

from xclip_jax.core.console import log0
from xclip_jax.core.storage import is_remote

# What some network file systems answer to flock.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


class HeldError(Exception):
    """Another process holds the lock."""


@contextlib.contextmanager
def beside(path: str | os.PathLike, *, wait: bool) -> Iterator[None]:
    """Hold a lock on `path`, a hidden file in its folder that is removed at the end.

    Buckets and some network file systems have no locks; a warning is printed for the latter.

    Raises:
      HeldError: another process holds it, unless `wait`.
    """
    name = os.fspath(path)
    if is_remote(name):
        yield
        return
    place = pathlib.Path(name)
    lock, claimed = place.with_name(f".{place.name}.lock"), False
    while not claimed:
        with open(lock, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                raise HeldError(name) from error
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                _warn(name)
            # Its last holder removed it: who waited for it, or opened it before, has a lock on nothing.
            claimed = _is_at(lock, file.fileno())
            if claimed:
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)


def _is_at(path: pathlib.Path, descriptor: int) -> bool:
    """Whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@functools.cache
def _warn(path: str) -> None:
    log0(f"WARNING: the file system of {path} has no locks; let no other process write this file meanwhile")
