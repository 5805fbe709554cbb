"""The client of the Hugging Face Hub: its import, and its errors as sentences."""

import contextlib
from collections.abc import Iterator
from typing import Any

from xclip_jax.core.errors import UserError, first_line
from xclip_jax.core.imports import import_extra

PREFIX = "hf:"
ID = r"[\w.-]+/[\w.-]+"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def load(purpose: str) -> Any:
    """Import huggingface_hub; if it is not installed, raise a `UserError` that begins with `purpose`."""
    return import_extra("huggingface_hub", "hub", purpose)


def unreachable(error: BaseException) -> bool:
    """Whether a request failed for lack of a connection or a working server."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    return isinstance(error, OfflineModeIsEnabled | ConnectionError | TimeoutError) or _of_network(error)


def _of_network(error: BaseException) -> bool:
    """Whether an HTTP library raised the error; different versions of the client use different libraries."""
    return type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3"))


@contextlib.contextmanager
def sentences(purpose: str, repository: str, revision: str | None = None) -> Iterator[None]:
    """Convert errors of huggingface_hub about a repository to a `UserError` that begins with `purpose`."""
    from huggingface_hub import constants, errors

    try:
        yield
        return
    except errors.LocalEntryNotFoundError:
        remedy = "connect this machine, or fetch it on another one and copy the cache"
        text = f"it is not in the cache, {constants.HF_HUB_CACHE}, and the Hub cannot be reached; {remedy}"
    except errors.GatedRepoError:
        text = f"access to {repository} is restricted; ask for it at {constants.ENDPOINT}/{repository} and {LOG_IN}"
    except errors.RevisionNotFoundError:
        text = f"{repository} has no revision {revision!r}; name a branch, tag or commit"
    except errors.RepositoryNotFoundError:
        text = f"the Hub has no repository {repository}, or it is private; check the name, or {LOG_IN}"
    except errors.LocalTokenNotFoundError:
        text = f"no account of the Hub is known; {LOG_IN}"
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        remedy = f"; {LOG_IN}, with an account and token that have the right" if status in (401, 403) else ""
        text = f"the Hub answers {first_line(error).rstrip('.')}{remedy}"
    except Exception as error:
        # A refused model card raises ValueError, a refused file RuntimeError.
        of_client = isinstance(error, OSError | ValueError | RuntimeError) or _of_network(error)
        if isinstance(error, UserError) or not of_client:
            raise
        text = f"the exchange with the Hub failed: {first_line(error).rstrip('.')}"
    raise UserError(f"{purpose}: {text}.") from None  # the client's tracebacks fill a screen
