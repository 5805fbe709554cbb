"""Labelled or captioned images in tars, in the layout of clip_benchmark: `wds:PATH` and `wds:hf:ORG/NAME`.

docs/evaluate.md shows the layout, which `clip_benchmark_export_wds` writes. KEY.cls is the number of a class, KEY.txt
has the captions of a retrieval set, one per line, and KEY.npy zeros and ones for several classes per image.
Tars are read in place, by `tar_index.members`.
"""

import dataclasses
import functools
import io
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from xclip_jax.core import hub_client, storage
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import labelled
from xclip_jax.data.base import MAX_BYTES, LazySequence, SourceKind, SourceOptions, decode_utf8, read_text
from xclip_jax.data.readers import tar_index

CLASSES, SEVERAL, CAPTIONS = "classification", "multilabel", "retrieval"
# Files with labels or captions, by the type of data set.
_ANSWERS = {CLASSES: ".cls", SEVERAL: ".npy", CAPTIONS: ".txt"}
_IMAGES = (".webp", ".png", ".jpg", ".jpeg")  # the first of several counts
_SHARDS = "nshards.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
_Row = tuple[int, bytes, int, int]  # number of the tar, key, offset and size in bytes
_HUB = re.compile(rf"({hub_client.ID})(?:@([^/]+))?(?:/([\w.-]+))?")


@dataclasses.dataclass(frozen=True)
class Split:
    """A split of a data set, not yet read: its folder, name, and commit on the Hub, or ""; `spec` is the user's."""

    spec: str
    root: pathlib.Path
    name: str
    version: str = ""

    @functools.cached_property
    def type(self) -> str:
        """`CLASSES`, `SEVERAL` or `CAPTIONS`."""
        kind = "\n".join(self.lines("dataset_type.txt", optional=True)).lower() or CLASSES
        if kind not in _ANSWERS:
            raise UserError(f"{self.spec}: data sets of type {kind!r} are not supported, only {', '.join(_ANSWERS)}.")
        return kind

    def lines(self, name: str, *, optional: bool = False) -> list[str]:
        """Return the lines of a text file of the data set, without white space around them."""
        path = self.root / name
        if not path.is_file():
            if optional:
                return []
            splits = sorted(path.parent.name for path in self.root.glob(f"*/{_SHARDS}"))
            known = f"; its splits are {', '.join(splits)}" if splits else ""
            expected = f"(classnames.txt, {self.name}/{_SHARDS}, {self.name}/0.tar){known}"
            raise UserError(f"{self.spec}: no file {str(path)!r}; expected clip_benchmark's layout {expected}.")
        return [line.strip() for line in read_text(path).splitlines()]

    def tars(self) -> list[str]:
        """Return the paths of the tars."""
        number = "".join(self.lines(f"{self.name}/{_SHARDS}"))
        if not re.fullmatch("[0-9]{1,7}", number):
            raise UserError(f"{self.spec}: {self.name}/{_SHARDS} has {number!r}, not a number of tars.")
        tars = [str(self.root / self.name / f"{i}.tar") for i in range(int(number))]
        if missing := [tar for tar in tars if not pathlib.Path(tar).is_file()]:
            raise UserError(f"{self.spec}: {len(missing)} of {len(tars)} tars do not exist, {missing[0]!r} first.")
        return tars


def _text(key: bytes) -> str:
    return key.decode("utf-8", "replace")


def _images(tars: Sequence[str], versions: Sequence[object], rows: Sequence[_Row]) -> LazySequence:
    """Return images that are files in tars, read on access."""

    def name(index: int) -> str:
        number, key, *_ = rows[index]
        return f"{tars[number]}#{_text(key)}"

    def read(index: int) -> bytes:
        number, _, offset, size = rows[index]
        if size > MAX_BYTES["image"]:
            raise BadSample("file too large", name(index))
        try:
            data = storage.open_file(tars[number], versions[number]).read(offset, size)
        except OSError as error:
            raise BadSample("tar cannot be read", str(error)) from error
        if len(data) < size:
            raise BadSample("tar cut off", "it is shorter than when it was opened")
        return data

    return LazySequence(len(rows), read, name, lambda: ((_text(key), size) for _, key, _, size in rows))


def locate(rest: str, *, fetch: bool = True) -> Split:
    """Find the split that the spec "wds:" + `rest` names, "test" where it names none.

    `rest` is the path of a data set or of a split in it, or "hf:ORG/NAME[@REVISION][/SPLIT]"; without `fetch` only its
    text files are fetched, from the cache if the Hub cannot be reached. Errors are as for `hub_client.sentences`.
    """
    spec = f"wds:{rest}"
    if not rest.startswith(hub_client.PREFIX):
        path = pathlib.Path(rest).expanduser()
        is_split = (path / _SHARDS).is_file()
        return Split(spec, path.parent, path.name) if is_split else Split(spec, path, "test")
    match = _HUB.fullmatch(rest.removeprefix(hub_client.PREFIX))
    if not match:
        raise UserError(f"{spec!r} names no data set of the Hub; write wds:hf:ORG/NAME[@REVISION][/SPLIT].")
    repository, revision, split = match[1], match[2], match[3] or "test"
    patterns = ["*.txt", *[f"{split}/*.tar"] * fetch]
    hub = hub_client.load(spec)
    with hub_client.sentences(spec, repository, revision):
        place = hub.snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=patterns)
    return Split(spec, pathlib.Path(place), split, pathlib.Path(place).name)


def read(split: Split) -> tuple[LazySequence, list[bytes]]:
    """Return the images of a split, and the content of each image's file with label or captions.

    Raises:
      UserError: missing files, damaged tars, images without labels or labels without images.
    """
    tars = split.tars()
    suffix = _ANSWERS[split.type]
    rows = []
    answers = []
    versions = list(map(storage.stat, tars))
    for number, (tar, version) in enumerate(zip(tars, versions, strict=True)):
        size = version[0]
        file = storage.open_file(tar, version)
        samples: dict[bytes, dict[str, tuple[int, int]]] = {}
        for name, offset, length in tar_index.members(tar, size):
            if not name or offset + length > size:
                raise UserError(f"{split.spec}: tar {tar!r} is damaged at byte {offset:,} or cut off; get it again.")
            key, ending = tar_index.split_name(name)
            files = samples.setdefault(key, {})
            if ending in files:
                raise UserError(f"{split.spec}: tar {tar!r} has {_text(key) + ending!r} twice; give each sample a key.")
            files[ending] = offset, length
        for key, files in samples.items():
            image = next((files[ending] for ending in _IMAGES if ending in files), None)
            if image is None or suffix not in files or files[suffix][1] > MAX_BYTES["text"]:
                raise UserError(
                    f"{split.spec}: sample {_text(key)!r} of {tar!r} has the files "
                    f"{', '.join(files)}; type {split.type} needs {suffix} and one of {', '.join(_IMAGES)}."
                )
            rows.append((number, key, *image))
            answers.append(file.read(*files[suffix]))
    return _images(tars, versions, rows), answers


def open_labelled(split: Split) -> labelled.Labelled:
    """Open images in classes: one per image, or any number for the type `SEVERAL`.

    Raises:
      UserError: a retrieval set, labels that are not among the classes, or as for `read`.
    """
    if split.type == CAPTIONS:
        raise UserError(f"{split.spec} has captions and no classes; name it as a set of its own: {split.spec}.")
    names = split.lines("classnames.txt")
    images, answers = read(split)
    labels = np.zeros((len(answers), len(names)) if split.type == SEVERAL else len(answers), np.int64)
    for i, answer in enumerate(answers):
        try:
            labels[i] = np.load(io.BytesIO(answer)) if split.type == SEVERAL else int(answer)
            if not 0 <= labels[i].min() <= labels[i].max() < (2 if split.type == SEVERAL else len(names)):
                raise ValueError
        except Exception:  # of any class from np.load
            expected = "an array of zeros and ones" if split.type == SEVERAL else f"a number below {len(names)}"
            raise UserError(
                f"{split.spec}: {images.name(i)!r} has the label {answer[:20]!r}; expected {expected}."
            ) from None
    source = labelled.Labelled("image", images, labels.astype(bool) if split.type == SEVERAL else labels, names)
    source.templates = split.lines(TEMPLATES, optional=True)
    source.version = split.version
    return source


def open_captions(split: Split) -> tuple[LazySequence, list[list[str]]]:
    """Open images and the captions of each.

    Raises:
      UserError: text that is not UTF-8, or as for `read`.
    """
    images, answers = read(split)
    captions = []
    for i, answer in enumerate(answers):
        try:
            captions.append(decode_utf8(answer).splitlines())
        except BadSample as error:
            raise UserError(f"{split.spec}, {images.name(i)!r}: {error}.") from error
    return images, captions


class Wds(SourceKind):
    """`wds:PATH` and `wds:hf:ORG/NAME[@REVISION]`, with or without /SPLIT."""

    @classmethod
    def open_labelled(cls, rest: str, options: SourceOptions) -> labelled.Labelled:
        return open_labelled(locate(rest))

    @classmethod
    def has_split(cls, rest: str, split: str, options: SourceOptions) -> bool:
        try:
            return (locate(rest, fetch=False).root / split / _SHARDS).is_file()
        except UserError:  # opening the first split says what is wrong
            return False
