"""A web server on this machine for tests: files with passwords and signatures, and answers that go wrong."""

import base64
import contextlib
import http.server
import threading

USER, PASSWORD, SIGNATURE = "reader", "hunter2-of-the-tests", "5ecre7-signature"


class Site:
    """What the server answers.

    Attributes:
      files: {path: bytes, or a function of the handler that writes the whole answer}.
      statuses: {path: statuses of the next answers, 0 for a right one}.
      sent: bytes that were sent of answers by functions.
      requests: paths that were asked for.
    """

    def __init__(self, port):
        self.port, self.files, self.sent, self.requests, self.closed = port, {}, 0, [], False
        self.statuses = {}

    def url(self, path, *, secret=False):
        """The address of a file; one that is secret needs its password and its signature, and has them."""
        if not secret:
            return f"http://127.0.0.1:{self.port}/{path}"
        return f"http://{USER}:{PASSWORD}@127.0.0.1:{self.port}/secret/{path}?sig={SIGNATURE}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Logs nothing."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def served(handler):
    """Context of a server, whose connections a `Handler` answers."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def serve():
    """Context of a `Site`."""
    with served(_Files) as server:
        server.handle_error = lambda *_: None  # of connections that a client closes
        server.site = Site(server.server_port)
        try:
            yield server.site
        finally:
            server.site.closed = True


class _Files(Handler):
    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, *, body):
        path, _, query = self.path.lstrip("/").partition("?")
        site = self.server.site
        site.requests.append(path)
        if site.statuses.get(path) and (status := site.statuses[path].pop(0)):
            self._send(status, b"", body=body)
            return
        login = f"Basic {base64.b64encode(f'{USER}:{PASSWORD}'.encode()).decode()}"
        if path.startswith("secret/"):
            path = path.removeprefix("secret/")
            if self.headers.get("Authorization") != login or query != f"sig={SIGNATURE}":
                self._send(403, b"", body=body)
                return
        content = site.files.get(path)
        if callable(content):
            with contextlib.suppress(ConnectionError):
                content(self)
            self.close_connection = True
        elif content is None:
            self._send(404, b"", body=body)
        elif spec := self.headers.get("Range"):
            first, _, last = spec.removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1]
            self._send(206 if part else 416, part, {"Content-Range": f"bytes {first}-*/{len(content)}"}, body=body)
        else:
            self._send(200, content, {"Accept-Ranges": "bytes"}, body=body)

    def _send(self, status, content, headers=None, *, body):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "ETag": '"a"', **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)
