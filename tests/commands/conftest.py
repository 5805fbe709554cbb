"""Images to search, and a model that searches them, for the tests of the search page."""

import pytest

from tests.helpers import tiny


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eight images with captions, one of them hostile, and a ninth that is none."""
    folder = tiny.folder(tmp_path_factory.mktemp("serve") / "<b>pictures", n=8)
    (folder / "003.txt").write_text("<img src=x onerror=alert(1)>")
    (folder / "bad.png").write_bytes(b"<html>")
    return folder


@pytest.fixture(scope="module")
def model(run):
    from xclip_jax import model as inference

    return inference.load(run, batch=8)
