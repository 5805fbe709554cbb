"""Errors of the Hub's client as sentences."""

import importlib
import sys

import pytest

from xclip_jax.core import hub_client
from xclip_jax.core.errors import UserError

errors = pytest.importorskip("huggingface_hub.errors")
# The client's library of requests, whose name depends on its version.
httpx = importlib.import_module(errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])


def http_error(status, kind=None):
    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/x"))
    return (kind or errors.HfHubHTTPError)(f"status {status}", response=response)


def test_without_the_client_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"^hf:a/b .*pip install 'xclip_jax\[hub\]'"):
        hub_client.load("hf:a/b")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (http_error(503), True),
        (http_error(404), False),
        (errors.OfflineModeIsEnabled("offline"), True),
        (ConnectionError("refused"), True),
        (httpx.ConnectError("refused"), True),
        (ValueError("card"), False),
    ],
)
def test_which_errors_mean_that_the_hub_is_unreachable(error, expected):
    assert hub_client.unreachable(error) is expected


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(403), "status 403; .*hf auth login"),
        (http_error(500), "status 500"),
        (http_error(404, errors.RepositoryNotFoundError), "no repository a/b, or it is private"),
        (http_error(404, errors.RevisionNotFoundError), "a/b has no revision 'v2'"),
        (OSError("disk"), "OSError: disk"),
    ],
)
def test_sentences__name_the_cause(error, message):
    with pytest.raises(UserError, match=f"^push: .*{message}"), hub_client.sentences("push", "a/b", "v2"):
        raise error


def test_other_errors_pass():
    with pytest.raises(KeyError), hub_client.sentences("push", "a/b"):
        raise KeyError("a fault of this package")
