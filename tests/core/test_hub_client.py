"""Errors of the Hub's client as sentences."""

import importlib

import pytest

from xclip_jax.core import hub_client
from xclip_jax.core.errors import UserError

errors = pytest.importorskip("huggingface_hub.errors")
# The client's library of requests, whose name depends on its version.
httpx = importlib.import_module(errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])


def http_error(status, kind=None):
    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/x"))
    return (kind or errors.HfHubHTTPError)(f"status {status}", response=response)


def test_which_errors_mean_that_the_hub_is_unreachable():
    away = (http_error(503), errors.OfflineModeIsEnabled("x"), ConnectionError("x"), httpx.ConnectError("x"))
    assert all(map(hub_client.unreachable, away))
    assert not any(map(hub_client.unreachable, (http_error(404), ValueError("card"))))


def test_sentences__name_the_cause_and_pass_other_errors():
    for error, message in (
        (http_error(403), "status 403; .*hf auth login"),
        (http_error(404, errors.RepositoryNotFoundError), "no repository a/b"),
        (http_error(404, errors.RevisionNotFoundError), "a/b has no revision 'v2'"),
        (OSError("disk"), "OSError: disk"),
    ):
        with pytest.raises(UserError, match=f"^push: .*{message}"), hub_client.sentences("push", "a/b", "v2"):
            raise error
    with pytest.raises(KeyError), hub_client.sentences("push", "a/b"):
        raise KeyError("a fault of this package")
