"""Answers of web servers that are not what was asked for."""

import gzip

import pytest

from tests.helpers import web
from xclip_jax.core import storage

PIECE = bytes(1 << 16)


def test_an_answer_that_is_too_long_is_not_read_to_its_end():
    def long(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(1000):
            handler.wfile.write(PIECE)
            handler.server.site.sent += len(PIECE)

    with web.serve() as site:
        site.files["long.jpg"] = long
        with pytest.raises(OSError, match="larger than 1,000 bytes"):
            storage.read(site.url("long.jpg"), 1000)
    assert site.sent < 500 * len(PIECE)


def test_a_compressed_answer_is_refused():
    def compressed(handler):
        handler.send_response(200)
        handler.send_header("Content-Encoding", "gzip")
        handler.end_headers()
        handler.wfile.write(gzip.compress(PIECE))

    with web.serve() as site:
        site.files["bomb.jpg"] = compressed
        with pytest.raises(OSError, match="the server sends it compressed, as 'gzip'; download the file") as error:
            storage.read(site.url("bomb.jpg"), len(PIECE))
    assert error.value.filename == site.url("bomb.jpg")
