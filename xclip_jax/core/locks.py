"""Locks by flock: one writer for a file or folder on a disk. Buckets have none."""

import contextlib
import errno
import fcntl
import os
import pathlib
import platform
from collections.abc import Iterator
from typing import IO

from xclip_jax.core.errors import UserError
from xclip_jax.core.storage import is_remote

# Errors of network file systems that do not implement flock: nothing is locked there.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


class HeldError(UserError):
    """Another process holds the lock."""

    def __init__(self, path: object, holder: str) -> None:
        super().__init__(f"{path} is in use by {holder or 'another process'}; wait for it, or name another path.")


def _flock(content: IO[str], how: int) -> None:
    try:
        fcntl.flock(content, how)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


@contextlib.contextmanager
def lock(path: str | os.PathLike, *, blocking: bool, file: str | os.PathLike = "") -> Iterator[None]:
    """Hold a lock on `path`, by a hidden file in its folder, or by `file`, which names this process meanwhile.

    Raises:
      HeldError: another process holds it, unless `blocking`.
    """
    if is_remote(os.fspath(path)):
        yield
        return
    place = pathlib.Path(path)
    file = pathlib.Path(file or place.with_name(f".{place.name}.lock"))
    locked = False
    while not locked:
        with open(file, "a+") as content:
            try:
                _flock(content, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
            except BlockingIOError as error:
                content.seek(0)
                raise HeldError(path, content.read().strip()) from error
            # The previous holder unlinked the file, so this may lock a deleted inode: retry.
            with contextlib.suppress(FileNotFoundError):
                locked = os.path.samestat(os.stat(file), os.fstat(content.fileno()))
            if locked:
                try:
                    content.truncate(0)
                    content.write(f"process {os.getpid()} on {platform.node()}\n")
                    content.flush()
                    yield
                finally:
                    file.unlink(missing_ok=True)


def holder(file: str | os.PathLike) -> str:
    """Return a description of the process that holds the lock file `file`, "" if none does or it is in a bucket."""
    if is_remote(os.fspath(file)) or not os.path.exists(file):
        return ""
    with open(file) as content:
        try:
            _flock(content, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return content.read().strip() or "another process"
    return ""
