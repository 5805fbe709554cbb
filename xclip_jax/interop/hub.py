"""The Hugging Face Hub: "hf:ORG/NAME" and "hf:ORG/NAME@REVISION" as paths to weights, and uploads.

`huggingface_hub`, the extra `hub`, is imported with the first use. It keeps the files in its own cache and reads its
own environment variables: HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and others.
"""

import contextlib
import glob
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from xclip_jax.core import hub_client
from xclip_jax.core.console import log0
from xclip_jax.core.errors import UserError
from xclip_jax.core.hub_client import ID, PREFIX
from xclip_jax.core.remote import expand_home
from xclip_jax.core.storage import write_whole
from xclip_jax.interop import hf, open_clip, tensor_files, vocabulary

# Companion files to download if the repository has them.
_COMPANIONS = (
    "xclip_config.json", open_clip.CONFIG, hf.CONFIG, hf.PREPROCESSOR, "processor_config.json", vocabulary.FILE,
    vocabulary.CLIP_FILES[0], vocabulary.OPTIONS, vocabulary.SENTENCEPIECE,
)  # fmt: skip
_ALIAS = "hf-hub:"  # open_clip's name of `PREFIX`
# Names of models in open_clip and OpenAI's CLIP, such as ViT-B-32 and ViT-B/32, optionally with a name of weights.
_MODEL = re.compile(
    r"((coca_)?ViT-(\w|bigG|gopt|SO400M)[-/]\d\d|RN\d+(x\d+)?|EVA0\d-\w-\d\d|convnext_(tiny|small|base|x*large)(_[wd])?(_320)?"
    r"|MobileCLIP2?-\w\d?)(-plus|-alt|-quickgelu|-SigLIP2?|-i18n|-CLIPA|-worldwide|-\d{2,3}|@\d{3}px)*(/\w+)?"
)
# The first of these files in a repository is fetched: safetensors before pickles, else in the order of `NAMES`.
_WEIGHTS = tuple(sorted(tensor_files.NAMES, key=lambda name: ".safetensors" not in name))


def is_hub(path: str) -> bool:
    """Whether `path` names a repository of the Hub."""
    return path.startswith((PREFIX, _ALIAS))


def local_name(path: str) -> str:
    """Name for files about the weights of `path`, in the working directory: "ORG--NAME"; other paths as they are."""
    return _repository(path).replace("/", "--") if is_hub(path) else path


def _repository(path: str) -> str:
    return path.removeprefix(_ALIAS).removeprefix(PREFIX)


def resolve(path: str) -> str:
    """Return a local path of weights, after downloading "hf:ORG/NAME[@REVISION]" (or "hf-hub:...") to the Hub's cache.

    Downloads are one file of weights (or the shards of one index), configs, tokenizer and preprocessing. Without a
    connection to the Hub, or with HF_HUB_OFFLINE, the cache is used.

    Args:
      path: other paths are returned with "~" expanded.

    Raises:
      UserError: huggingface_hub is not installed, the repository or revision does not exist, access is refused, the
        Hub cannot be reached and the cache lacks the weights, or the repository has none that can be read; a name of
        open_clip's list of models.
    """
    if not is_hub(path):
        if _MODEL.fullmatch(path) and not os.path.exists(path):
            raise UserError(
                f"{path!r} does not exist, and names of models in open_clip's lists are not read; name the repository "
                "of the Hub that has the weights, hf:ORG/NAME, such as hf:laion/CLIP-ViT-B-32-laion2B-s34B-b79K."
            )
        return expand_home(path)
    match = re.fullmatch(rf"({ID})(?:@(.+))?", _repository(path))
    if not match:
        raise UserError(f"{path!r} names no repository of the Hub; expected hf:ORG/NAME or hf:ORG/NAME@REVISION.")
    repository, revision = match[1], match[2]
    hub = hub_client.load(path)
    with hub_client.sentences(path, repository, revision):
        try:
            info = hub.HfApi().model_info(repository, revision=revision)
        except Exception as error:
            if not hub_client.unreachable(error):
                raise
            return _cached(hub, path, repository, revision, error)
        names = {file.rfilename for file in info.siblings or ()}
        weights = _choose(names, path)
        extra = [name for name in (*_COMPANIONS, *([weights] if weights.endswith(".json") else [])) if name in names]
        # The weights come last, so that a cache with weights has their companions.
        folder = _fetch(hub, repository, info.sha, extra)
        shards = tensor_files.files_of(epath.Path(folder) / weights) if weights in extra else [weights]
        if missing := sorted(set(shards) - names):
            raise UserError(f"{path}: {weights} names {missing[0]}, which the repository lacks.")
        _fetch(hub, repository, info.sha, shards)
        if revision != info.sha:  # the cache finds the branch by this file if there is no connection
            ref = pathlib.Path(folder).parent.parent / "refs" / (revision or hub.constants.DEFAULT_REVISION)
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_whole(epath.Path(ref), info.sha.encode())
        return str(pathlib.Path(folder) / weights)


def pin(path: str) -> str:
    """Return "hf:ORG/NAME@COMMIT" with the present commit of a branch or tag, and print it; other paths unchanged.

    Later reads of the result belong together, whatever is committed meanwhile. Raises as `resolve` does.
    """
    if not is_hub(path):
        return path
    # The folder of a file in the Hub's cache is named after its commit.
    repository, pinned = _repository(path).partition("@")[0], pathlib.Path(resolve(path)).parent.name
    if not path.endswith(f"@{pinned}"):
        log0(f"{path} is commit {pinned}")
    return f"{PREFIX}{repository}@{pinned}"


def commit(pinned: str) -> str:
    """Return the commit of a result of `pin`."""
    return pinned.rpartition("@")[2]


def _fetch(hub: Any, repository: str, commit: str, names: Sequence[str]) -> str:
    """Download the files `names` of a commit, and return their folder in the cache."""
    return hub.snapshot_download(repository, revision=commit, allow_patterns=[glob.escape(name) for name in names])


def _choose(names: set[str], path: str) -> str:
    """Return the file of weights of a repository with the files `names`."""
    if known := [name for name in _WEIGHTS if name in names]:
        return known[0]
    files = _files_of_weights(names)
    if len(files) == 1:
        return files[0]
    others = f"it has {', '.join(files[:4])}" if files else f"its files are {', '.join(sorted(names)[:6]) or 'none'}"
    raise UserError(f"{path} has no file of weights that can be read ({', '.join(_WEIGHTS[:4])}, ...); {others}.")


def _files_of_weights(names: Iterable[str]) -> list[str]:
    """Return the files of weights that are not in a sub-folder."""
    return sorted(name for name in names if name.endswith(tensor_files.SUFFIXES) and "/" not in name)


def _cached(hub: Any, path: str, repository: str, revision: str | None, error: Exception) -> str:
    """Return the file of weights in the cache, as of the last connection to the Hub."""

    def find(name: str) -> str | None:
        file = hub.try_to_load_from_cache(repository, name, revision=revision)
        return file if isinstance(file, str) else None

    for name in _WEIGHTS:
        if (file := find(name)) and all(map(find, tensor_files.files_of(epath.Path(file)))):
            return file
    with contextlib.suppress(hub.errors.LocalEntryNotFoundError):
        patterns = [f"*{suffix}" for suffix in tensor_files.SUFFIXES]  # the cache must have all
        folder = pathlib.Path(
            hub.snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=True)
        )
        names = {file.name for file in folder.iterdir()}
        if len(files := _files_of_weights(names)) == 1 and not names & set(_WEIGHTS):
            return str(folder / files[0])
    reason = f"the Hub cannot be reached ({hub_client.reason(error)})"
    raise UserError(
        f"{path} is not in the cache, {hub.constants.HF_HUB_CACHE}, and {reason}; connect this machine, or fetch it on "
        "another one and copy the cache."
    ) from None  # the client's own tracebacks fill a screen


def check_push(repository: str) -> None:
    """Check, without writing anything, that this account can upload to `repository`.

    Raises:
      UserError: huggingface_hub is not installed, a name that is not ORG/NAME, no account or one without access to ORG,
        or the Hub cannot be reached.
    """
    what = f"--push {repository}"
    if not re.fullmatch(ID, repository):
        raise UserError(f"{what} names no repository of the Hub; expected ORG/NAME.")
    hub = hub_client.load(what)
    with hub_client.sentences(what, repository):
        account = hub.HfApi().whoami()
    namespace, names = repository.partition("/")[0], [account["name"]]
    names += [organization["name"] for organization in account.get("orgs", ())]
    if namespace not in names:
        raise UserError(f"{what}: the account {names[0]} has no access to {namespace}; it has to {', '.join(names)}.")


def push(folder: str, names: Sequence[str], repository: str, *, obsolete: Sequence[str], private: bool = False) -> str:
    """Upload files as one commit; create the repository if it does not exist.

    Args:
      folder: folder of the files.
      names: names of the files.
      repository: "ORG/NAME".
      obsolete: names of files that are removed from the repository unless they are among `names`.
      private: whether a new repository is private.

    Returns:
      The URL of the repository.

    Raises:
      UserError: the Hub refuses it or cannot be reached.
    """
    what = f"--push {repository}"
    api = hub_client.load(what).HfApi()
    with hub_client.sentences(f"{what}: {folder} is written", repository):
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in names],
            delete_patterns=[glob.escape(name) for name in obsolete],
            commit_message="Upload weights with xclip_jax",
        )
    return str(url)
