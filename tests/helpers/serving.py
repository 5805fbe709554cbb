"""The search page, served by its command in a thread of this process."""

import contextlib
import re
import threading

import pytest

from xclip_jax.commands import serve as command

uvicorn = pytest.importorskip("uvicorn")


@contextlib.contextmanager
def served(run, pictures, cache):
    """Yield the address that the command prints for a folder of pictures."""
    printed, servers, ready, serve = [], [], threading.Event(), uvicorn.Server.run

    def observed(server, sockets):
        servers.append(server)
        ready.set()
        serve(server, sockets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XCLIP_CACHE", str(cache))
        patch.setattr(command, "log0", printed.append)
        patch.setattr(uvicorn.Server, "run", observed)
        line = [str(run), "--images", str(pictures), "--port", "0"]
        thread = threading.Thread(target=command.main, args=(line,), daemon=True)
        thread.start()
        assert ready.wait(100)
    try:
        yield re.fullmatch(r"\d+ images: (http://127\.0\.0\.1:\d+)  \(Ctrl-C to end\)", printed[-1])[1] + "/"
    finally:
        servers[0].should_exit = True
        thread.join(10)
    assert not thread.is_alive()
