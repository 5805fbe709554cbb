"""Data sources by their specs, and the sources of a run; `SOURCES` is the one place to add a kind.

A spec is KIND:REST: KIND is a key of `SOURCES`, and REST is up to the kind, such as a path, a pattern of files or a
name. A kind of another package is package.module:Class, as in "my_lab.sources:JsonLines:/data/x.jsonl".
"""

import contextlib
import dataclasses
import difflib
import glob
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from xclip_jax.core.console import command
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.core.imports import Classes, import_class
from xclip_jax.data import holdout, images, labelled, records
from xclip_jax.data.base import (
    IMAGE_SUFFIXES,
    LabelledSource,
    Record,
    Source,
    SourceKind,
    SourceOptions,
    WrappedSource,
)
from xclip_jax.data.config import DataConfig

READERS = "xclip_jax.data.readers"
SOURCES: Mapping[str, type[SourceKind]] = Classes(
    SourceKind,
    {
        "tar": f"{READERS}.tar:Tars",
        "folder": f"{READERS}.folder:Folders",
        "csv": f"{READERS}.table:CsvTables",
        "parquet": f"{READERS}.table:ParquetTables",
        "array_record": f"{READERS}.table:ArrayRecords",
        "tfds": f"{READERS}.tfds:TfdsSplits",
        "demo": "xclip_jax.demo.emoji:DemoSplits",
        "glue": f"{READERS}.glue:GlueTasks",
        "wds": f"{READERS}.wds:Wds",
        "hf": f"{READERS}.hub:HubSets",
    },
)
OF_ANOTHER_PACKAGE = "package.module:Class:REST"
_SAMPLED = 256  # records of a source that `transparent_share` reads
_WILDCARDS = r"[*?\[{]"

_IMPORTED = re.compile(r"(?P<class>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*)(?::(?P<rest>.*))?", re.S)


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """A parsed spec.

    Attributes:
      kind: kind of the source.
      rest: the part that `kind` opens; "" if the spec ends with the kind's name.
    """

    kind: type[SourceKind]
    rest: str


def is_spec(text: str) -> bool:
    """Whether `text` has the form of a spec, and is not a plain path; nothing is imported or opened."""
    prefix, colon, _ = text.partition(":")
    return (bool(colon) and prefix in SOURCES) or _IMPORTED.fullmatch(text) is not None


def spec_from_path(text: str) -> str:
    """Return the most likely spec for a plain path; a spec is returned as it is.

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
      UserError: an unknown kind, a kind in `SOURCES` without a rest, or a module that cannot be imported.
    """
    prefix, colon, rest = text.partition(":")
    if colon and prefix in SOURCES:
        if not rest:
            raise UserError(f"source {text!r} ends after its type; write {', '.join(_forms(SOURCES[prefix]))}.")
        return SourceSpec(SOURCES[prefix], rest)
    if match := _IMPORTED.fullmatch(text):
        return SourceSpec(_import(text, match["class"]), match["rest"] or "")
    raise _unknown(text)


def parse_all(specs: Sequence[str]) -> list[SourceSpec]:
    """Parse the specs of `data.sources`.

    Raises:
      UserError: no spec, or as for `parse`.
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
    if not is_spec(text) or (prefix in SOURCES and not rest):
        return False
    kind = parse(text).kind
    return kind.opens("labels") and kind.labelled_items == items


def _import(text: str, name: str) -> type[SourceKind]:
    try:
        return import_class(name, SourceKind, "source")
    except UserError as error:
        # A word before a colon is more likely a misspelt kind than a module.
        if isinstance(error.__cause__, ModuleNotFoundError) and "." not in name.partition(":")[0]:
            raise _unknown(text) from error
        raise


def _forms(kind: type[SourceKind]) -> list[str]:
    return [spec for spec, form in kind.forms.items() if form.pairs or form.labels]


def usage(what: str = "pairs") -> dict[str, str]:
    """Return {form of spec: what it reads} of all of `SOURCES` that read `what`: "pairs", "labels" or "splits"."""
    forms = ((spec, getattr(form, what)) for kind in SOURCES.values() for spec, form in kind.forms.items())
    return {spec: meaning for spec, meaning in forms if meaning}


def _unknown(text: str) -> UserError:
    prefix, colon, rest = text.partition(":")
    path = os.path.expanduser(text)
    near = [f"{name}:{text}" for name, kind in SOURCES.items() if kind.reads(path)]
    if not near and (os.path.isabs(path) or not (colon or text in SOURCES)):
        return _no_source(text)
    if colon and not near:
        near = [f"{name}:{rest}" for name in difflib.get_close_matches(prefix, SOURCES, n=1)]
    suggestion = f"; did you mean {near[0]!r}?" if near else "."
    specs = dict.fromkeys([*usage(), *usage("labels"), OF_ANOTHER_PACKAGE])
    return UserError(f"unknown source {text!r}; write {_either(specs)}{suggestion}")


def _images_of(pattern: str) -> str:
    """Return the folder of a pattern of images, or ""."""
    folder, name = os.path.split(pattern)
    pattern_of_images = re.search(_WILDCARDS, name) and name.lower().endswith(IMAGE_SUFFIXES)
    return (folder or ".") if pattern_of_images and ":" not in pattern else ""


def _no_source(text: str) -> UserError:
    """Return the error for a plain path that no kind of source reads."""
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


def _open(spec: str, options: SourceOptions | None, labels: bool) -> Source:
    parsed, what = parse(spec), "labels" if labels else "pairs"
    if not parsed.kind.opens(what):
        items = "labelled items" if labels else "image-text pairs"
        raise UserError(f"source {spec!r} has no {items}; write {_either({**usage(what), OF_ANOTHER_PACKAGE: ''})}.")
    return parsed.kind.open(parsed.rest, options or SourceOptions(), labels)


def open_pairs(spec: str, options: SourceOptions | None = None) -> Source:
    """Open the image-text pairs named by `spec`.

    Raises:
      UserError: an unknown kind or one without pairs, a missing file or folder, a data set that is not prepared.
    """
    return _open(spec, options, labels=False)


def open_labelled(spec: str, options: SourceOptions | None = None) -> LabelledSource:
    """Open the labelled items named by `spec`.

    A folder has one sub-folder for each class, whose sorted names are the classes; a CSV file has the columns path and
    label. GLUE's splits are train and validation.

    Raises:
      UserError: an unknown kind or one without labels, a missing file or folder, a data set that is not prepared.
    """
    return cast(LabelledSource, _open(spec, options, labels=True))


def source_options(config: DataConfig) -> SourceOptions:
    """Return the keys of `config` that sources use."""
    return SourceOptions(config.dir, config.image_key, tuple(config.text_keys), config.tags_key)


def open_sources(config: DataConfig, classes: int = 0, fields: Sequence[str] | None = None) -> list[Source]:
    """Open the sources of `config`, without the pairs that `config.holdout` holds out.

    Args:
      config: their specs and options.
      classes: number of classes of labelled sources; 0 for pairs.
      fields: fields of training batches, of "image", "text" and "label"; None if nothing is trained.

    Raises:
      labelled.MismatchError: labelled sources that do not fit `classes` or `fields`.
      UserError: a source that cannot be opened, keys that contradict each other, labelled sources that do not fit each
        other, and for training fewer pairs than a batch has.
    """
    parse_all(config.sources)
    options = source_options(config)
    opened: list[Source]
    if classes:
        if config.spread_duplicate_captions:
            raise UserError(
                "data.spread_duplicate_captions compares captions, and labelled items have none: set it to False."
            )
        if config.holdout:
            raise UserError("data.holdout holds out pairs; of labelled items evaluate another split, and set it to 0.")
        items = [open_labelled(spec, options) for spec in config.sources]
        labelled.check_sources(config.sources, items, classes, fields)
        opened = list(items)
    else:
        opened = [open_pairs(spec, options) for spec in config.sources]
    if empty := [spec for spec, source in zip(config.sources, opened, strict=True) if not len(source)]:
        raise UserError(f"source {empty[0]!r} has nothing in it; leave it out of data.sources, or name another split.")
    if classes:
        return opened
    if config.holdout:
        opened = holdout.training_part(config.sources, opened, config)
    if fields is not None and config.batch > (pairs := sum(map(len, opened))):
        which = "that data.holdout leaves" if config.holdout else "of data.sources"
        raise UserError(
            f"data.batch={config.batch} exceeds the {pairs} pairs {which}: a batch would contain pairs several times, "
            f"as their own negatives. Set data.batch to at most {pairs}, or add pairs."
        )
    if fields is not None and config.weights:
        _check_shares(config, opened)
    return opened


def _check_shares(config: DataConfig, opened: Sequence[Source]) -> None:
    """Raise `UserError` if `data.weights` gives a source a larger share of a batch than it has pairs."""
    for spec, source, weight in zip(config.sources, opened, config.weights, strict=True):
        pairs = max(round(config.subset * len(source)), 1)
        share = math.ceil(config.batch * weight / sum(config.weights))
        if share > pairs:
            raise UserError(
                f"data.weights gives {spec!r}, of {pairs} pairs, {share} of a batch of {config.batch}: a batch would "
                "contain pairs several times, as their own negatives. Lower its weight or data.batch, or add pairs."
            )


def transparent_share(opened: Sequence[Source], timeout: float, threads: int) -> float:
    """Return the share of transparent images among at most `_SAMPLED` random records of each source.

    Records that cannot be used do not count. `timeout` and `threads` are as for `records.read_each`.
    """
    rng = np.random.default_rng(0)
    places = [(x, int(i)) for x in opened for i in rng.choice(len(x), min(len(x), _SAMPLED), replace=False)]

    def look(record: Record) -> bool:
        return "image" in record and images.is_transparent(record["image"])

    read = list(records.read_each(places, look, timeout=timeout, threads=min(threads, records.MAX_THREADS)))
    usable = [transparent for transparent in read if not isinstance(transparent, BadSample)]
    return sum(usable) / max(len(usable), 1)


class Decoded(WrappedSource):
    """Keeps each decoded image in memory after its first use, for sets that fit: n * h * w * 3 bytes.

    An image that cannot be decoded stays encoded, so that only uses of the image make its record a bad one.
    """

    def __init__(self, source: Source, background: str = images.WHITE) -> None:
        super().__init__(source)
        self._background = background
        self._records: dict[int, Record] = {}

    def __getitem__(self, index: int) -> Record:
        record = self._records.get(index)
        if record is None:
            record = self.source[index]
            if "image" in record:  # labelled texts have none
                try:
                    record = record | {"image": images.decode(record["image"], background=self._background)}
                except Exception as error:
                    records.as_bad_sample(error)  # raises what concerns more than this record
            self._records[index] = record
        return record
