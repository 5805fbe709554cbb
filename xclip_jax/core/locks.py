"""Locks: one writer for a file or folder, by flock on a disk and by a lease in a bucket."""

import contextlib
import errno
import fcntl
import functools
import os
import pathlib
import platform
import threading
import time
from collections.abc import Iterator

from etils import epath

from xclip_jax.core.console import log0
from xclip_jax.core.errors import UserError
from xclip_jax.core.storage import is_remote, write_whole

# Errors of network file systems that do not implement flock.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
RENEWED_SECONDS = 20.0
EXPIRES_SECONDS = 70.0  # a lease that was not renewed for this long belongs to a killed process
_POLL_SECONDS = 1.0


class HeldError(UserError):
    """Another process holds the lock."""

    def __init__(self, path: object, holder: str) -> None:
        super().__init__(f"{path} is in use by {holder or 'another process'}; wait for it, or name another path.")


@contextlib.contextmanager
def lock(path: str | os.PathLike, *, blocking: bool) -> Iterator[None]:
    """Hold a lock on the file `path`, by a hidden file in its folder; nothing is locked in a bucket.

    Raises:
      HeldError: another process holds it, unless `blocking`.
    """
    place = pathlib.PurePath(path)
    with (
        contextlib.nullcontext()
        if is_remote(os.fspath(path))
        else hold(pathlib.Path(place.with_name(f".{place.name}.lock")), place, blocking=blocking)
    ):
        yield


@contextlib.contextmanager
def hold(file: os.PathLike[str], path: object, *, blocking: bool) -> Iterator[None]:
    """Hold the lock file `file` of `path`; it names this process, and is deleted at the end.

    Some network file systems have no locks: a warning is printed.

    Raises:
      HeldError: another process holds it, unless `blocking`.
    """
    locked = False
    while not locked:
        with open(file, "a+") as content:
            try:
                fcntl.flock(content, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
            except BlockingIOError as error:
                content.seek(0)
                raise HeldError(path, content.read().strip()) from error
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                _warn(str(path))
            # The previous holder unlinked the file, so this may lock a deleted inode: retry.
            locked = _is_at(file, content.fileno())
            if locked:
                try:
                    content.truncate(0)
                    content.write(_name())
                    content.flush()
                    yield
                finally:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(file)


def holder(file: epath.Path) -> str:
    """Return a description of the process that holds the lock file `file`, "" if none does or it is in a bucket."""
    if is_remote(str(file)) or not file.exists():
        return ""
    with open(file) as content:
        try:
            fcntl.flock(content, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return content.read().strip() or "another process"
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
    return ""


def _is_at(path: os.PathLike[str], descriptor: int) -> bool:
    """Whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _name() -> str:
    return f"process {os.getpid()} on {platform.node()}\n"


@functools.cache
def _warn(path: str) -> None:
    log0(f"WARNING: the file system of {path} has no locks; let no other process write to it meanwhile")


@contextlib.contextmanager
def lease(path: epath.Path) -> Iterator[None]:
    """Hold a folder in a bucket, which has no locks, by a small file with name and time that is renewed.

    The file `path` is deleted at the end. After a kill it is waited for until the lease has expired.

    Raises:
      HeldError: another process holds the lease and renews it.
    """
    _await_expiry(path)
    written, done = _renew(path), threading.Event()

    def renew() -> None:
        nonlocal written
        while not done.wait(RENEWED_SECONDS):
            with contextlib.suppress(Exception):  # a store that does not answer for a moment
                if (other := _read(path)) and other != written:  # no file: the other run has ended
                    log0(f"WARNING: {path.parent} is in use by {other.partition(chr(10))[0]} too; stop one of the two")
                written = _renew(path)

    thread = threading.Thread(target=renew, daemon=True, name="lease")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if _read(path) == written:
            path.unlink(missing_ok=True)


def _renew(path: epath.Path) -> str:
    content = f"{_name()}{time.time()}\n"
    write_whole(path, content)
    return content


def _read(path: epath.Path) -> str:
    return path.read_text() if path.exists() else ""


def _await_expiry(path: epath.Path) -> None:
    first = _read(path)
    with contextlib.suppress(ValueError, IndexError):
        if abs(time.time() - float(first.splitlines()[1])) > EXPIRES_SECONDS:
            return
    # Clocks of hosts differ a little, so the test is whether the file changes.
    deadline = time.monotonic() + EXPIRES_SECONDS
    if first:
        name = first.partition("\n")[0]
        log0(f"{path.parent} was in use by {name} a moment ago; waiting up to {EXPIRES_SECONDS:.0f} s for it")
    while first and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        if (content := _read(path)) != first:
            if not content:
                return
            raise HeldError(path.parent, content.partition("\n")[0])
