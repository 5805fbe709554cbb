"""HTTP connections of the server, with a limit of time for each request and of their number."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 10.0  # for a request to arrive, body included
PER_ADDRESS = 64  # connections of one address; a browser opens six
CONNECTIONS = 200  # of all addresses: some systems allow a process 256 open files


class Connection(H11Protocol):
    """A connection that is closed if a request does not arrive completely within `REQUEST_SECONDS`.

    With more than `PER_ADDRESS` connections of one address, or more than `CONNECTIONS` in all, the one among them that
    has waited longest for its request is closed.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Start to wait for the first request."""
        super().connection_made(transport)
        self._watch()
        everyone = [c for c in self.connections if isinstance(c, Connection) and not c.transport.is_closing()]
        same = [c for c in everyone if c.client and self.client and c.client[0] == self.client[0]]
        if len(same) > PER_ADDRESS:
            _close_oldest(same)
        elif len(everyone) > CONNECTIONS:
            _close_oldest(everyone)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take a part of a request, the first of which starts the time of the request."""
        if self.timeout_keep_alive_task is not None:  # idle until now
            self._stop_waiting()
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the rest of this one where it was answered early."""
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """Start the time limit if the client has something to send, or stop it."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY) or self.transport.is_closing():
            self._stop_waiting()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _close_oldest(connections: list[Connection]) -> None:
    """Close the connection that has waited longest. One that was just made waits, so there is one."""
    waiting = {c: c._deadline.when() for c in connections if c._deadline is not None}
    min(waiting, key=waiting.__getitem__).transport.close()
