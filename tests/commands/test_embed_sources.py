"""What can be embedded: image files of a folder, and lines of a text file."""

import functools
import http.server
import pathlib
import threading

import pytest

from tests.helpers import tiny
from xclip_jax.commands.embed_sources import Lines, open_images
from xclip_jax.core.errors import UserError


class Files(http.server.SimpleHTTPRequestHandler):
    """Serves a folder as Python does, whole files, or with `ranges` the part that is asked for."""

    ranges = False

    def do_GET(self):
        asked = self.headers.get("Range")
        if not (self.ranges and asked):
            return super().do_GET()
        content = pathlib.Path(self.translate_path(self.path)).read_bytes()
        first, last = asked.removeprefix("bytes=").split("-")
        if int(first) >= len(content):
            return self.send_error(416)
        part = content[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.end_headers()
        return self.wfile.write(part)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("ranges", [True, False])
def test_texts_by_http(ranges, tmp_path, monkeypatch):
    monkeypatch.setattr(Files, "ranges", ranges)
    (tmp_path / "texts.txt").write_text("a cat\na dog\nthe last")
    handler = functools.partial(Files, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/texts.txt"
        if ranges:
            lines = Lines(url)
            assert [lines.read(i)[0] for i in range(len(lines))] == ["a cat", "a dog", "the last"]
        else:
            with pytest.raises(UserError, match=r"cannot be read .*the server gives whole files only; download"):
                Lines(url)
        server.shutdown()


def test_a_text_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "t.txt").write_text("a fox\na hen\n", encoding="utf-8-sig")
    assert Lines(str(tmp_path / "t.txt")).read(0) == ("a fox", "a fox")


def test_hidden_folders_and_files_are_left_out(tmp_path):
    pictures = tmp_path / ".kept" / "pictures"  # above the folder that is named a dot means nothing
    for place in ("a.png", ".b.png", ".thumbnails/large/c.png", "sub/.cache/d.png", "sub/e.png"):
        (pictures / place).parent.mkdir(parents=True, exist_ok=True)
        (pictures / place).write_bytes(b"x")
    source = open_images(str(pictures))
    assert [source.name(i) for i in range(len(source))] == [str(pictures / name) for name in ("a.png", "sub/e.png")]


def test_folders_in_a_list_are_refused(tmp_path):
    root = tmp_path / "root"
    tiny.folder(root / "pictures", 2)
    for pattern in (f"{root}/pictures,{tmp_path}", f"{tmp_path},{root}/pictures/000.png"):
        with pytest.raises(UserError, match=r"names the folder '.*' in a list; name one folder, or files"):
            open_images(pattern)
