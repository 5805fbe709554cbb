"""Labelled or captioned images in tars with clip_benchmark's layout: `wds:PATH` and `wds:hf:ORG/NAME`.

`clip_benchmark_export_wds` writes this layout, see docs/evaluate.md. KEY.cls contains a class number, KEY.npy zeros and
ones for several classes per image, and KEY.txt the captions of a retrieval set, one per line. Tars are read in place.
"""

import contextlib
import dataclasses
import functools
import io
import pathlib
import re

import numpy as np

from xclip_jax.core import hub_client, storage
from xclip_jax.core.errors import BadSample, UserError, check_choice
from xclip_jax.data import labelled
from xclip_jax.data.base import MAX_BYTES, LazySequence, SourceKind, SourceOptions, read_text, split_lines
from xclip_jax.data.readers import tar as tar_reader
from xclip_jax.data.readers import tar_index

CLASSES, SEVERAL, CAPTIONS = "classification", "multilabel", "retrieval"
_ANSWERS = {CLASSES: ".cls", SEVERAL: ".npy", CAPTIONS: ".txt"}
_IMAGES = (".webp", ".png", ".jpg", ".jpeg")  # by decreasing priority
_SHARDS = "nshards.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
_HUB = re.compile(rf"({hub_client.ID})(?:@([^/]+))?(?:/([\w.-]+))?")


@dataclasses.dataclass(frozen=True)
class Split:
    """An unread split: the user's spec, the data set's folder, the split's name, and the commit on the Hub or ""."""

    spec: str
    root: pathlib.Path
    name: str
    version: str = ""

    @functools.cached_property
    def type(self) -> str:
        """`CLASSES`, `SEVERAL` or `CAPTIONS`."""
        kind = "\n".join(self.lines("dataset_type.txt", optional=True)).lower() or CLASSES
        check_choice(f"{self.spec}: dataset_type.txt", kind, _ANSWERS)
        return kind

    def lines(self, name: str, *, optional: bool = False) -> list[str]:
        """Return the stripped lines of a text file; [] for a missing `optional` one."""
        path = self.root / name
        if optional and not path.is_file():
            return []
        expected = f"classnames.txt, {self.name}/{_SHARDS} with the number of tars, {self.name}/0.tar"
        with storage.unreadable_as(f"{self.spec}: no file {str(path)!r}; expected clip_benchmark's layout, {expected}"):
            return [line.strip() for line in read_text(path).splitlines()]

    def tars(self) -> list[str]:
        """Return the paths of the tars."""
        number = "".join(self.lines(f"{self.name}/{_SHARDS}"))
        if not re.fullmatch("[1-9][0-9]{0,6}", number):
            raise UserError(f"{self.spec}: {self.name}/{_SHARDS} contains {number!r}; expected the number of tars.")
        return [str(self.root / self.name / f"{i}.tar") for i in range(int(number))]


def locate(rest: str, *, fetch: bool = True) -> Split:
    """Find the split, by default "test", of a spec "wds:" + `rest`.

    `rest` is the path of a data set or its split, or "hf:ORG/NAME[@REVISION][/SPLIT]"; without `fetch` only text files
    are downloaded from the Hub. Errors are as for `hub_client.sentences`.
    """
    spec = f"wds:{rest}"
    if not rest.startswith(hub_client.PREFIX):
        path = pathlib.Path(rest).expanduser()
        is_split = (path / _SHARDS).is_file()
        return Split(spec, path.parent, path.name) if is_split else Split(spec, path, "test")
    match = _HUB.fullmatch(rest.removeprefix(hub_client.PREFIX))
    if not match:
        raise UserError(f"{spec!r} does not name a data set of the Hub; write wds:hf:ORG/NAME[@REVISION][/SPLIT].")
    repository, revision, split = match[1], match[2], match[3] or "test"
    patterns = ["*.txt", *[f"{split}/*.tar"] * fetch]
    hub = hub_client.load(spec)
    with hub_client.sentences(spec, repository, revision):
        place = hub.snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=patterns)
    return Split(spec, pathlib.Path(place), split, pathlib.Path(place).name)


def read(split: Split) -> tuple[LazySequence, list[bytes]]:
    """Return the images of a split, and the content of each image's label or caption file.

    `UserError` for missing files, damaged tars, images without labels, or labels without images.
    """
    suffix = _ANSWERS[split.type]
    images: list[tuple[str, object, str, int, int]] = []  # tar and its version, key, offset and size in bytes
    answers = []
    for tar in split.tars():
        with storage.unreadable_as(f"{split.spec}: a tar cannot be read"):
            version = storage.stat(tar)
            size = version[0]
            members = list(tar_index.members(tar, size))
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        for path, offset, length in members:
            stem, ending = tar_index.split_name(path)
            key = stem.decode("utf-8", "replace")
            files = samples.setdefault(key, {})
            if not path or offset + length > size or ending in files:
                raise UserError(
                    f"{split.spec}: {tar!r} is damaged at byte {offset:,} or cut off, or has {key + ending!r} twice; "
                    "get it again, or give each sample a key."
                )
            files[ending] = offset, length
        for key, files in samples.items():
            span = next((files[ending] for ending in _IMAGES if ending in files), None)
            if span is None or suffix not in files or files[suffix][1] > MAX_BYTES["text"]:
                raise UserError(
                    f"{split.spec}: sample {key!r} of {tar!r} has the files "
                    f"{', '.join(files)}; type {split.type} needs {suffix} and one of {', '.join(_IMAGES)}."
                )
            images.append((tar, version, key, *span))
            answers.append(tar_reader.read_span(tar, version, *files[suffix]))

    def read_image(index: int) -> bytes:
        tar, version, _, offset, size = images[index]
        return tar_reader.read_span(tar, version, offset, size)

    def sizes() -> list[tuple[str, int]]:
        return [(key, size) for _, _, key, _, size in images]

    return LazySequence(len(images), read_image, lambda i: f"{images[i][0]}#{images[i][2]}", sizes), answers


def open_labelled(split: Split) -> labelled.Labelled:
    """Open images with one class each, or any number for the type `SEVERAL`; errors are as for `read`."""
    names = split.lines("classnames.txt")
    images, answers = read(split)
    several = split.type == SEVERAL
    labels = np.zeros((len(answers), len(names)) if several else len(answers), np.int64)
    limit = 2 if several else len(names)
    for i, answer in enumerate(answers):
        labels[i] = -1
        with contextlib.suppress(Exception):  # np.load raises any class
            labels[i] = np.load(io.BytesIO(answer)) if several else int(answer)
        if not 0 <= labels[i].min() <= labels[i].max() < limit:
            expected = "an array of zeros and ones" if several else f"a number below {limit}"
            raise UserError(f"{split.spec}: {images.name(i)!r} has the label {answer[:20]!r}; expected {expected}.")
    source = labelled.Labelled("image", images, labels.astype(bool) if several else labels, names)
    source.templates = split.lines(TEMPLATES, optional=True)
    source.version = split.version
    return source


def open_captions(split: Split) -> tuple[LazySequence, list[list[str]]]:
    """Open images and their captions; errors are as for `read`."""
    images, answers = read(split)
    captions = []
    for i, answer in enumerate(answers):
        try:
            captions.append(split_lines(answer))
        except BadSample as error:
            raise UserError(f"{split.spec}: {images.name(i)!r}: {error}.") from error
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
        except UserError:  # opening the first split explains the error
            return False
