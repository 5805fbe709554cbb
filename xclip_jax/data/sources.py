"""Data sources by their specs: the grammar, and the one place to add a kind of them.

A spec is KIND:REST, where KIND is a key of `SOURCES` and REST is up to the kind: a path, a pattern of files, a name. A
kind of another package is package.module:Class, and a spec of it "my_lab.sources:JsonLines:/data/x.jsonl".
"""

import contextlib
import dataclasses
import difflib
import glob
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from xclip_jax.core.console import command
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.core.imports import Classes, import_class
from xclip_jax.core.remote import expand_home
from xclip_jax.data import records, rgb, transforms
from xclip_jax.data.base import (
    IMAGE_SUFFIXES,
    LabelledSource,
    NotOfferedError,
    Record,
    Source,
    SourceKind,
    SourceOptions,
    WrappedSource,
)

READERS = "xclip_jax.data.readers"
SOURCES: Mapping[str, type[SourceKind]] = Classes(
    SourceKind,
    {
        "tar": f"{READERS}.tar_source:Tars",
        "folder": f"{READERS}.folder_source:Folders",
        "csv": f"{READERS}.tables:CsvTables",
        "parquet": f"{READERS}.tables:ParquetTables",
        "array_record": f"{READERS}.array_record:ArrayRecords",
        "tfds": f"{READERS}.tfds_source:TfdsSplits",
        "demo": "xclip_jax.demo.emoji:DemoSplits",
        "glue": f"{READERS}.glue:GlueTasks",
        "wds": f"{READERS}.wds:Wds",
        "hf": f"{READERS}.hub_source:HubSets",
    },
)
OF_ANOTHER_PACKAGE = "package.module:Class:REST"
_SAMPLED = 256
_WILDCARDS = r"[*?\[{]"

_IMPORTED = re.compile(r"(?P<class>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*)(?::(?P<rest>.*))?", re.S)


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """A parsed spec.

    Attributes:
      text: the spec as written.
      kind: of the source.
      rest: what `kind` opens; "" where the spec ends with the kind's name.
    """

    text: str
    kind: type[SourceKind]
    rest: str


def is_spec(text: str) -> bool:
    """Whether `text` has the form of a spec, and is not a plain path; nothing is imported or opened."""
    prefix, colon, _ = text.partition(":")
    return (bool(colon) and prefix in SOURCES) or _IMPORTED.fullmatch(text) is not None


def spec_from_path(text: str) -> str:
    """Return the spec of a plain path, by what it looks like; a spec as it is.

    Raises:
      UserError: a path that does not exist, or that no kind of source reads.
    """
    path = os.path.expanduser(text)
    if is_spec(text):
        return text
    if os.path.isdir(path) and glob.glob(os.path.join(glob.escape(path), "*.tar")):
        return f"tar:{text}"
    kinds = [name for name, kind in SOURCES.items() if kind.reads(path)]
    if not kinds:
        pattern = re.search(_WILDCARDS, path) and not os.path.exists(path) and not _images_of(path)
        if pattern and (":" not in path or "://" in path):
            check = f"{command('check')} {shlex.quote(f'tar:{text}')}"
            raise UserError(f"{text!r} has no ending of a known type; write the type first, as in {check}")
        raise _unknown(text)
    return f"{kinds[0]}:{text}"


def parse(text: str) -> SourceSpec:
    """Parse a spec; nothing is opened.

    Raises:
      UserError: an unknown kind, or one of `SOURCES` without a rest; a URL with one slash; a module that cannot be
        imported.
    """
    prefix, colon, rest = text.partition(":")
    if colon and prefix in SOURCES:
        if not rest:
            raise UserError(f"source {text!r} ends after its type; write {', '.join(_specs_of(SOURCES[prefix]))}.")
        expand_home(rest)
        return SourceSpec(text, SOURCES[prefix], rest)
    if match := _IMPORTED.fullmatch(text):
        return SourceSpec(text, _import(text, match["class"]), match["rest"] or "")
    raise _unknown(text)


def parse_all(specs: Sequence[str]) -> list[SourceSpec]:
    """Parse the specs of `data.sources`.

    Raises:
      UserError: none, or as `parse`.
    """
    if not specs:
        raise UserError("data.sources is empty; add a source such as folder:PATH or tfds:NAME/SPLIT.")
    return [parse(spec) for spec in specs]


def has_labels(text: str, items: str) -> bool:
    """Whether `text` is the spec of a source of labelled `items`, "image" or "text"; nothing is opened.

    Raises:
      UserError: a class of another package that cannot be imported.
    """
    prefix, _, rest = text.partition(":")
    if prefix in SOURCES:
        kind = SOURCES[prefix]
        return bool(rest and kind.labelled_specs) and kind.labelled_items == items
    return is_spec(text) and parse(text).kind.labelled_items == items


def _import(text: str, name: str) -> type[SourceKind]:
    try:
        return import_class(name, SourceKind, "source")
    except UserError as error:
        # A word before a colon may just as well be a prefix that was misspelt.
        if isinstance(error.__cause__, ModuleNotFoundError) and "." not in name.partition(":")[0]:
            raise _unknown(text) from error
        raise


def _specs_of(kind: type[SourceKind]) -> list[str]:
    return list({**kind.pair_specs, **kind.labelled_specs})


def usage(attribute: str = "pair_specs") -> dict[str, str]:
    """Return {spec: what it reads} of all of `SOURCES`, of their `pair_specs`, `labelled_specs` or `split_specs`."""
    return {spec: meaning for kind in SOURCES.values() for spec, meaning in getattr(kind, attribute).items()}


def _unknown(text: str) -> UserError:
    prefix, colon, rest = text.partition(":")
    path = os.path.expanduser(text)
    near = [f"{name}:{text}" for name, kind in SOURCES.items() if kind.reads(path)]
    if not near and (os.path.isabs(path) or not (colon or text in SOURCES)):
        return _no_source(text)
    if colon and not near:
        near = [f"{name}:{rest}" for name in difflib.get_close_matches(prefix, SOURCES, n=1)]
    suggestion = f"; did you mean {near[0]!r}?" if near else "."
    specs = dict.fromkeys([*usage(), *usage("labelled_specs"), OF_ANOTHER_PACKAGE])
    return UserError(f"unknown source {text!r}; write {_either(specs)}{suggestion}")


def _images_of(pattern: str) -> str:
    """The folder of a pattern of images, or ""."""
    folder, name = os.path.split(pattern)
    pattern_of_images = re.search(_WILDCARDS, name) and name.lower().endswith(IMAGE_SUFFIXES)
    return (folder or ".") if pattern_of_images and ":" not in pattern else ""


def _no_source(text: str) -> UserError:
    """The error of a plain path that no kind of source reads."""
    path = os.path.expanduser(text)
    if os.path.exists(path):
        return UserError(f"{text!r} is a file of no known kind; name its folder or a table.")
    if folder := _images_of(text):
        return UserError(f"{text!r} is a pattern of images; name the folder, {folder!r}.")
    parent, name = os.path.split(path.rstrip("/"))
    near = []
    with contextlib.suppress(OSError):
        near = difflib.get_close_matches(name, os.listdir(parent or "."), n=1)
    if near:
        meant = os.path.join(os.path.dirname(text.rstrip("/")), near[0])
        return UserError(f"no file or folder {text!r}; did you mean {meant!r}?")
    form = "" if os.path.isabs(path) else "; a source is written KIND:REST, as in hf:ORG/NAME/train"
    return UserError(f"no file or folder {text!r}; check the path{form}.")


def _either(specs: Mapping[str, Any]) -> str:
    *first, last = specs
    return f"{', '.join(first)} or {last}"


def open_pairs(spec: str, options: SourceOptions | None = None) -> Source:
    """Open the image-text pairs named by `spec`.

    Raises:
      UserError: an unknown kind, or one without pairs; a missing file or folder, a data set that is not prepared.
    """
    parsed = parse(spec)
    try:
        return parsed.kind.open_pairs(parsed.rest, options or SourceOptions())
    except NotOfferedError as error:
        _refuse(spec, error, "pair_specs")


def open_labelled(spec: str, options: SourceOptions | None = None) -> LabelledSource:
    """Open the labelled items named by `spec`.

    A folder has one sub-folder a class, whose names sorted are the classes; a CSV file has the columns path and label.
    GLUE's splits are train and validation.

    Raises:
      UserError: an unknown kind, or one without labels; a missing file or folder, a data set that is not prepared.
    """
    parsed = parse(spec)
    try:
        return parsed.kind.open_labelled(parsed.rest, options or SourceOptions())
    except NotOfferedError as error:
        _refuse(spec, error, "labelled_specs")


def _refuse(spec: str, error: NotOfferedError, attribute: str) -> NoReturn:
    specs = {**usage(attribute), OF_ANOTHER_PACKAGE: ""}
    raise UserError(f"source {spec!r} has no {error}; write {_either(specs)}.") from error


def transparent_share(opened: Sequence[Source], timeout: float, threads: int) -> float:
    """Return the share of transparent images among at most `_SAMPLED` random records of each source.

    Records that cannot be used do not count. `timeout` and `threads` are those of `records.read_each`.
    """
    rng = np.random.default_rng(0)
    places = [(x, int(i)) for x in opened for i in rng.choice(len(x), min(len(x), _SAMPLED), replace=False)]

    def look(record: Record) -> bool:
        return "image" in record and transforms.is_transparent(record["image"])

    read = list(records.read_each(places, look, timeout=timeout, threads=min(threads, records.MAX_THREADS)))
    usable = [image for image in read if not isinstance(image, BadSample)]
    return sum(usable) / max(len(usable), 1)


class Decoded(WrappedSource):
    """Keeps each image decoded in memory after its first use. For sets that fit: n * h * w * 3 bytes.

    An image that cannot be decoded stays encoded, so that a record is a bad one where its image is used, as without
    this, and not where its captions are.
    """

    def __init__(self, source: Source, background: str = rgb.WHITE) -> None:
        super().__init__(source)
        self._background = background
        self._records: dict[int, Record] = {}

    def __getitem__(self, index: int) -> Record:
        record = self._records.get(index)
        if record is None:
            record = self.source[index]
            if "image" in record:  # labelled texts have none
                try:
                    record = record | {"image": transforms.decode(record["image"], background=self._background)}
                except Exception as error:
                    records.as_bad_sample(error)  # raises what concerns more than this record
            self._records[index] = record
        return record
