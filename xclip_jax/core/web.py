"""Parts of files of web servers, which may send more than is asked for, slowly, compressed, or without end."""

import asyncio
import errno
from typing import Any


def read(system: Any, address: str, offset: int, size: int, seconds: float) -> bytes:
    """Return up to `size` bytes from `offset` of a file; more are the beginning of a file that the server sends whole.

    `system` is fsspec's file system of the address. The connection is closed once the bytes are more than `size`.

    Raises:
      TimeoutError: the answer is not complete after `seconds`.
      OSError: it is compressed.
      aiohttp.ClientError: a status that is an error; a connection that fails.
    """
    answer = _read(system, address, offset, size, seconds)
    return asyncio.run_coroutine_threadsafe(answer, system.loop).result()


async def _read(system: Any, address: str, offset: int, size: int, seconds: float) -> bytes:
    if not size:
        return b""
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={offset}-{offset + size - 1}"}
    options = system.kwargs | {"headers": system.kwargs.get("headers", {}) | headers, "timeout": seconds}
    session, data = await system.set_session(), bytearray()
    async with session.get(system.encode_url(address), auto_decompress=False, **options) as answer:
        answer.raise_for_status()
        if (encoding := answer.headers.get("Content-Encoding", "identity")) not in ("", "identity"):
            raise OSError(errno.EINVAL, f"the server sends it compressed, as {encoding!r}; download the file")
        while len(data) <= size and (chunk := await answer.content.readany()):
            data += chunk
    return bytes(data)
