"""What is printed, in the encoding of the stream."""

import io

import pytest

from xclip_jax.core import console


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", "caf\u00e9 \u5199 ?"), ("latin-1", "caf\u00e9 ? ?"), ("ascii", "caf? ? ?")]
)
def test_letters_that_the_stream_lacks_are_question_marks(encoding, shown):
    """Also half a letter of a file name in another encoding."""
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    console.show("caf\u00e9 \u5199 \udce9", out)
    assert out.buffer.getvalue().decode(encoding) == f"{shown}\n"
