"""A lease on a folder without locks, as one in a bucket: a small file with name and time, which its holder renews."""

import contextlib
import os
import platform
import threading
import time
from collections.abc import Iterator

from etils import epath

from xclip_jax.core.console import log0
from xclip_jax.core.errors import UserError
from xclip_jax.core.storage import write_whole

RENEWED_SECONDS = 20.0
# A lease that was not renewed for so long is one of a process that was killed.
EXPIRES_SECONDS = 70.0
_POLL_SECONDS = 1.0


@contextlib.contextmanager
def held(path: epath.Path) -> Iterator[None]:
    """Context in which this process holds the lease in the file `path`, which is deleted at the end.

    Where a process was killed a moment ago, it waits until its lease has expired.

    Raises:
      UserError: another process holds it, and renews it.
    """
    _await_expiry(path)
    written, done = _write(path), threading.Event()

    def renew() -> None:
        nonlocal written
        while not done.wait(RENEWED_SECONDS):
            with contextlib.suppress(Exception):  # of a store that does not answer for a moment
                # One that is gone was another run's, which has ended.
                if (other := _read(path)) and other != written:
                    log0(f"WARNING: {path.parent} is in use by {_holder(other)} too; stop one of the two runs")
                written = _write(path)

    thread = threading.Thread(target=renew, daemon=True, name="lease")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if _read(path) == written:
            path.unlink(missing_ok=True)


def _write(path: epath.Path) -> str:
    content = f"process {os.getpid()} on {platform.node()}\n{time.time()}\n"
    write_whole(path, content)
    return content


def _read(path: epath.Path) -> str:
    return path.read_text() if path.exists() else ""


def _holder(content: str) -> str:
    return content.partition("\n")[0] or "another run"


def _await_expiry(path: epath.Path) -> None:
    first = _read(path)
    with contextlib.suppress(ValueError, IndexError):
        if abs(time.time() - float(first.splitlines()[1])) > EXPIRES_SECONDS:
            return
    # Clocks of hosts differ a little: what tells is whether the file changes.
    deadline = time.monotonic() + EXPIRES_SECONDS
    if first:
        log0(f"{path.parent} was in use by {_holder(first)} a moment ago; waiting up to {EXPIRES_SECONDS:.0f} s for it")
    while first and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        if (content := _read(path)) != first:
            if not content:
                return
            raise UserError(
                f"{path.parent} is in use by {_holder(content)}; wait for it, or use a different --config.run."
            )
