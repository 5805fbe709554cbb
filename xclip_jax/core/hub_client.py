"""The client of the Hugging Face Hub: its import, its errors as sentences, and folders of data sets."""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from xclip_jax.core.errors import UserError, first_line

PREFIX = "hf:"
ID = r"[\w.-]+/[\w.-]+"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
# Top-level packages whose exceptions a connection that fails may raise, by version of huggingface_hub.
_NETWORK = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


def load(purpose: str) -> Any:
    """Return huggingface_hub, or raise a `UserError` that begins with `purpose` if it is not installed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"{purpose} needs huggingface_hub: pip install 'xclip_jax[hub]'.") from error
    return huggingface_hub


def unreachable(error: BaseException) -> bool:
    """Whether a request failed because there is no connection, or the server does not work."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    return isinstance(error, OfflineModeIsEnabled | ConnectionError | TimeoutError) or _of_network(error)


def _of_network(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in _NETWORK


def reason(error: Exception) -> str:
    """Return why a request failed, for a sentence."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    return "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else first_line(error).rstrip(".")


@contextlib.contextmanager
def sentences(what: str, repository: str, revision: str | None = None) -> Iterator[None]:
    """Turn errors of huggingface_hub about a repository into a `UserError`; `what` begins its message."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{what}: access to {repository} is restricted; ask for it at {constants.ENDPOINT}/{repository} and "
            f"{LOG_IN}."
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{what}: {repository} has no revision {revision!r}; name a branch, tag or commit.") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{what}: the Hub has no repository {repository}, or it is private; check the name, or {LOG_IN}."
        ) from None
    except errors.LocalTokenNotFoundError:
        raise UserError(f"{what}: no account of the Hub is known; {LOG_IN}.") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        remedy = f"; {LOG_IN}, with an account and token that have the right" if status in (401, 403) else ""
        raise UserError(f"{what}: the Hub answers {reason(error)}{remedy}.") from None
    except UserError:
        raise
    except Exception as error:
        # A refused model card raises ValueError, a refused file RuntimeError.
        if not isinstance(error, OSError | ValueError | RuntimeError) and not _of_network(error):
            raise
        raise UserError(f"{what}: the exchange with the Hub failed: {reason(error)}.") from None


def dataset_folder(spec: str, repository: str, revision: str | None, patterns: Sequence[str]) -> pathlib.Path:
    """Return the folder, in the Hub's cache, of a repository of data with the files that match `patterns`.

    Missing files are fetched; only the cache is used if the Hub cannot be reached or HF_HUB_OFFLINE is set.

    Args:
      spec: the user's spec, for messages.
      repository: "ORG/NAME".
      revision: branch, tag or commit, None for the newest.
      patterns: patterns of file names for `huggingface_hub.snapshot_download`.

    Raises:
      UserError: huggingface_hub is not installed, the repository or revision does not exist, access is refused, or
        neither the Hub nor the cache can be read.
    """
    hub = load(spec)
    from huggingface_hub.errors import LocalEntryNotFoundError

    with sentences(spec, repository, revision):
        try:
            folder = hub.snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=patterns)
        except LocalEntryNotFoundError:
            raise UserError(
                f"{spec} is not in the cache, {hub.constants.HF_HUB_CACHE}, and the Hub cannot be reached; connect "
                "this machine, or fetch it on another one and copy the cache."
            ) from None
    return pathlib.Path(folder)
