"""The npm package `@iconify/json`: fetched once, checked, and read without unpacking it.

No client of npm is needed: a package is one tar file, at an address that follows from its name and version.
"""

import base64
import collections
import dataclasses
import hashlib
import http.client
import json
import os
import pathlib
import re
import ssl
import tarfile
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from studies.icons import families, names
from xclip_jax.core import storage
from xclip_jax.core.errors import UserError

NPM = "https://registry.npmjs.org"
_TIMEOUT, _TRIES, _CHUNK = 60, 5, 1 << 20  # seconds without an answer; downloads that go on where the last one ended


@dataclasses.dataclass(frozen=True)
class Package:
    """A pinned package of the npm registry.

    Attributes:
      name: with its scope, as in "@iconify/json".
      version: of the package.
      integrity: "sha512-" and the base64 digest of its .tgz, as the registry and lock files have it.
    """

    name: str
    version: str
    integrity: str


ICONIFY = Package(
    "@iconify/json",
    "2.2.535",
    "sha512-nAV60ACUSHwnsb6fsp+letHlNkrwO4vzBtcC6B4EDHErQQfezk7E3nJdnwJjve6OCfMNO0uVT5Vrgna9/NCmXw==",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Icon:
    """One usable icon.

    Attributes:
      icon_set, name: where it is from.
      caption: its name in words.
      concept: id of the caption's concept.
      aliases: captions that name other concepts.
      categories: of the set, in words.
      body: SVG without the `svg` element.
      box: left, top, width and height of the drawing.
    """

    icon_set: str
    name: str
    caption: str
    concept: str
    aliases: Sequence[str]
    categories: Sequence[str]
    body: str
    box: tuple[float, float, float, float]

    @property
    def id(self) -> str:
        """Name of the icon in the whole corpus: "ph/paw-print-bold"."""
        return f"{self.icon_set}/{self.name}"


def _setting(name: str) -> str | None:
    """Value of an option of npm in the environment."""
    variable = f"npm_config_{name}"
    return os.environ.get(variable) or os.environ.get(variable.upper())


def registry() -> str:
    """URL of the npm registry: npm_config_registry, else `registry` in the user's .npmrc, else the public one."""
    if url := _setting("registry"):
        return url.rstrip("/")
    path = pathlib.Path(_setting("userconfig") or "~/.npmrc").expanduser()
    try:
        match = re.search(r"^\s*registry\s*=\s*(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip("\"'").rstrip("/") if match else NPM


def fetch(package: Package = ICONIFY) -> pathlib.Path:
    """Path of the package's .tgz in the cache, fetched on first use; an interrupted download goes on where it ended.

    Raises:
      UserError: it cannot be downloaded, or is another file than expected.
    """
    folder = storage.cache_dir() / "npm"
    path = folder / f"{package.name.strip('@').replace('/', '-')}-{package.version}.tgz"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    url = f"{registry()}/{package.name}/-/{package.name.rpartition('/')[2]}-{package.version}.tgz"
    print(f"downloading {package.name} {package.version} ...", flush=True)
    try:
        _download(url, part)
        _check(part, package)
        part.replace(path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"the npm package {package.name} {package.version} could not be downloaded ({url}: "
            f"{error or type(error).__name__}); on a machine with network access run `npm pack "
            f"{package.name}@{package.version}` and copy the .tgz to {str(path)!r}."
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _download(url: str, path: pathlib.Path) -> None:
    """Write the file at `url` to `path`, asking for the rest of it after each interruption."""
    for attempt in range(_TRIES):
        try:
            _append(url, path)
            return
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException):
            if attempt == _TRIES - 1:
                raise


def _append(url: str, path: pathlib.Path) -> None:
    start = path.stat().st_size if path.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    context = ssl.create_default_context()
    for authorities in filter(None, (_setting("cafile"), os.environ.get("NODE_EXTRA_CA_CERTS"))):
        context.load_verify_locations(cafile=authorities)
    with urllib.request.urlopen(request, timeout=_TIMEOUT, context=context) as response:
        resumed = response.status == 206
        with path.open("ab" if resumed else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
        if response.length:
            raise OSError(f"the connection ended {response.length:,} bytes early")


def _check(path: pathlib.Path, package: Package) -> None:
    digest = hashlib.sha512(path.read_bytes()).digest()
    integrity = f"sha512-{base64.b64encode(digest).decode()}"
    if integrity != package.integrity:
        raise OSError(f"its integrity is {integrity}, expected {package.integrity}")


def members(path: pathlib.Path, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Name and content of the JSON files `names` of a package, in the order in which they are stored.

    Raises:
      UserError: the package is damaged, or lacks one of them.
    """
    missing = set(names)
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                name = member.name.removeprefix("package/")
                file = archive.extractfile(member) if name in missing else None
                if file is not None:
                    missing.discard(name)
                    yield name, json.loads(file.read())
                if not missing:
                    return
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise UserError(f"package {str(path)!r} is damaged ({error}); delete it to download it again.") from error
    raise UserError(f"package {str(path)!r} lacks {', '.join(sorted(missing))}; delete it to download it again.")


def read(path: pathlib.Path) -> tuple[list[Icon], list[dict[str, str]], dict[str, int]]:
    """Usable icons sorted by id; what attribution asks for, by set; and counts of icons by what became of them.

    Raises:
      UserError: a file that is damaged or lacks a set.
    """
    _, collection_of = next(members(path, ["collections.json"]))
    kept = families.kept(collection_of)
    names_alone = [s for s in families.BRAND_SETS | families.THING_SETS if s in collection_of]
    captions: dict[str, set[str]] = {}
    icons: list[Icon] = []
    counts: collections.Counter[str] = collections.Counter({"sets": len(collection_of), "sets kept": len(kept)})
    for member, data in members(path, [f"json/{name}.json" for name in dict.fromkeys((*kept, *names_alone))]):
        name = member.removeprefix("json/").removesuffix(".json")
        if name in names_alone:
            captions[name] = {names.caption(icon, name, data) for icon in data["icons"]}
        if name in kept:
            icons += _of_set(name, data, counts)
    brand_names = names.brands(
        *(
            (text for name in sorted(sets) if name in captions for text in captions[name])
            for sets in (families.BRAND_SETS, families.THING_SETS)
        )
    )
    usable = [icon for icon in icons if icon.caption not in brand_names]
    usable = [
        dataclasses.replace(icon, aliases=names.other_captions(icon.aliases, icon.caption, brand_names))
        for icon in usable
    ]
    counts["called as a brand is"] = len(icons) - len(usable)
    counts["usable"] = len(usable)
    counts["concepts of usable"] = len({icon.concept for icon in usable})
    described = [families.describe(name, collection_of[name]) for name in kept]
    return sorted(usable, key=lambda icon: icon.id), described, dict(counts)


def _of_set(name: str, data: Mapping[str, Any], counts: collections.Counter[str]) -> Iterator[Icon]:
    """Icons of a set that have a caption, with all of their other names as aliases; adds to `counts`."""
    branded, other_names = names.branded(data), names.aliases(data)
    categories = names.categories(data)
    for icon, entry in data["icons"].items():
        caption = names.caption(icon, name, data)
        counts["icons"] += 1
        if entry.get("hidden"):
            counts["hidden"] += 1
        elif icon in branded:
            counts["in a category of brands"] += 1
        elif names.moves(entry["body"]):
            counts["animated or with text"] += 1
        elif not names.is_caption(caption):
            counts["without a caption"] += 1
        else:
            box = (_size("left", entry, data), _size("top", entry, data), *_extent(entry, data))
            others = dict.fromkeys(names.caption(other, name, data) for other in other_names.get(icon, ()))
            concept, groups = names.concept(caption), categories.get(icon, ())
            yield Icon(name, icon, caption, concept, list(others), groups, entry["body"], box)


def _extent(entry: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[float, float]:
    return _size("width", entry, data, 16), _size("height", entry, data, 16)


def _size(key: str, entry: Mapping[str, Any], data: Mapping[str, Any], default: float = 0) -> float:
    return entry.get(key, data.get(key, default))
