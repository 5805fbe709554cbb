"""The Hugging Face Hub: "hf:ORG/NAME" and "hf:ORG/NAME@REVISION" as paths to weights, and uploads.

`huggingface_hub`, the extra `hub`, is imported on first use. It caches files, and reads its environment variables
HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and others.
"""

import dataclasses
import functools
import glob
import os
import re
from collections.abc import Sequence

from etils import epath

from xclip_jax.core import hub_client, storage
from xclip_jax.core.console import log0
from xclip_jax.core.errors import UserError
from xclip_jax.core.hub_client import ID, PREFIX
from xclip_jax.core.run_folder import RunReader, evaluation_file
from xclip_jax.interop import hf, open_clip, tensor_files, vocabulary

# Companion files to download if the repository has them.
_COMPANIONS = (
    "xclip_config.json", open_clip.CONFIG, hf.CONFIG, hf.PREPROCESSOR, hf.PROCESSOR, vocabulary.FILE,
    vocabulary.CLIP_FILES[0], vocabulary.OPTIONS, vocabulary.SENTENCEPIECE,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Place:
    """Weights on this machine, as `locate` returns them."""

    name: str  # as the user gave it
    path: epath.Path  # a run's folder, or a file or folder of weights; for a repository, the file in the Hub's cache
    commit: str = ""  # of a repository, "" for other places

    def __str__(self) -> str:
        """The name with the commit: "hf:ORG/NAME@COMMIT"."""
        return f"{self.name.partition('@')[0]}@{self.commit}" if self.commit else self.name

    @functools.cached_property
    def run(self) -> RunReader | None:
        """The run in this folder, None for other weights."""
        run = RunReader(self.path)
        return run if run.is_run() else None


def is_hub(path: str) -> bool:
    """Whether `path` names a repository of the Hub."""
    return path.startswith(PREFIX)


def repository_of(path: str) -> str:
    """Return "ORG/NAME[@REVISION]" of a repository of the Hub."""
    return path.removeprefix(PREFIX)


def results_file(path: str) -> epath.Path:
    """Return the results file: in a run's or model's folder, next to a file, or for a repository in this folder."""
    return evaluation_file(repository_of(path).replace("/", "--") if is_hub(path) else path)


def locate(place: str | Place) -> Place:
    """Resolve a place of weights, and fetch "hf:ORG/NAME[@REVISION]" into the Hub's cache.

    Fetches one file of weights (or the shards of one index), configs, tokenizer and preprocessing, and prints the
    commit of a branch or tag. If the Hub cannot be reached, or with HF_HUB_OFFLINE, the cache is used.

    A path need not exist, and a `Place` is returned unchanged. `UserError` if huggingface_hub is not installed, the Hub
    refuses or lacks the repository, revision or weights, or neither the Hub nor its cache can provide them.
    """
    if isinstance(place, Place):
        return place
    if not is_hub(place):
        return Place(place, storage.as_path(place))
    match = re.fullmatch(rf"({ID})(?:@(.+))?", repository_of(place))
    if not match:
        raise UserError(f"{place!r} names no repository of the Hub; expected hf:ORG/NAME or hf:ORG/NAME@REVISION.")
    repository, revision = match.groups()
    hub = hub_client.load(place)
    with hub_client.sentences(place, repository, revision):
        get = functools.partial(hub.snapshot_download, repository, revision=revision)
        try:
            names = {file.rfilename for file in hub.HfApi().model_info(repository, revision=revision).siblings or ()}
        except Exception as error:
            if not hub_client.unreachable(error):
                raise
            get = functools.partial(get, local_files_only=True)
            names = set(os.listdir(get(allow_patterns=["-"])))  # the cached files of the repository
        weights = tensor_files.choose(names, place, "download one with its config into a folder, and name the folder")
        patterns = [glob.escape(name) for name in (*_COMPANIONS, weights) if name in names]
        folder = epath.Path(get(allow_patterns=patterns))
        if weights.endswith(".json"):
            patterns += map(glob.escape, tensor_files.files_of(folder / weights))
            folder = epath.Path(get(allow_patterns=patterns))
    if revision != folder.name:  # the folder of a commit in the cache
        log0(f"{place} is commit {folder.name}")
    return Place(place, folder / weights, commit=folder.name)


def check_push(repository: str) -> None:
    """Check, without writing anything, that this account can upload to `repository`; raise `UserError` if not."""
    flag = f"--push {repository}"
    hub = hub_client.load(flag)
    with hub_client.sentences(flag, repository):
        account = hub.HfApi().whoami()
    names = [account["name"], *(organization["name"] for organization in account.get("orgs", ()))]
    if not re.fullmatch(ID, repository) or repository.partition("/")[0] not in names:
        raise UserError(f"{flag}: expected ORG/NAME with an ORG to which the account has access: {', '.join(names)}.")


def push(folder: str, names: Sequence[str], repository: str, *, obsolete: Sequence[str]) -> str:
    """Upload the files `names` of `folder` to `repository` in one commit, and return the repository's URL.

    A missing repository is created. Files in `obsolete` are removed unless they are uploaded.
    """
    flag = f"--push {repository}"
    api = hub_client.load(flag).HfApi()
    with hub_client.sentences(f"{flag}: {folder} is written", repository):
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in names],
            delete_patterns=[glob.escape(name) for name in obsolete],
            commit_message="Upload weights with xclip_jax",
        )
    return str(url)
