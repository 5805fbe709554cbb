"""This process's limit of open files, which is often 1,024 and may be raised."""

import os
import resource

from xclip_jax.core.errors import UserError

# Beside those that are asked for: of `storage.open_file`, of JAX, of trackers.
_SPARE = 768


def allow(n: int, what: str) -> None:
    """Raise the limit, as far as a process may, so that it can keep `n` more files open.

    Args:
      n: number of files.
      what: their name in the message.

    Raises:
      UserError: the process may not have that number.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _now() + n + _SPARE
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise UserError(
            f"{n:,} {what} need about {needed:,} open files, and a process may have {hard:,} here; raise that limit "
            f"(ulimit -Hn {needed}), or join them into fewer."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _now() -> int:
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return 0
