"""Data sources by their specs, and the sources of a run; `SOURCES` is the one place to add a kind.

A spec is KIND:REST: KIND is a key of `SOURCES`, and REST is up to the kind, such as a path, a pattern of files or a
name. Other packages have kinds named package.module:Class, such as "my_lab.sources:JsonLines:/data/x.jsonl".
"""

import contextlib
import dataclasses
import glob
import inspect
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from xclip_jax.core.errors import BadSample, UserError, redact
from xclip_jax.core.imports import LazyClassTable, import_class, import_name
from xclip_jax.data import holdout, images, labelled
from xclip_jax.data.base import IMAGE_SUFFIXES, Record, Source, SourceKind, SourceOptions, WrappedSource
from xclip_jax.data.config import DataConfig

CaptionTransform = Callable[[str, Sequence[str], np.random.Generator], str]

READERS = "xclip_jax.data.readers"
SOURCES: Mapping[str, type[SourceKind]] = LazyClassTable(
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
# {form of a spec: its content} for messages and --help: image-text pairs, and labelled items.
PAIRS = {
    "tar:PATTERN": "tars of KEY.jpg (or another image) with KEY.txt or KEY.json",
    "folder:PATH": "images, sub-folders too, each with a .txt file of the same name: one caption per line",
    "csv:PATTERN": "tables with columns of image paths and captions, between commas, ; or tabs",
    "parquet:PATTERN": "tables of images or paths and captions",
    "array_record:PATTERN": "serialized tf.train.Example in ArrayRecord files",
    "tfds:NAME/SPLIT": "a prepared data set of TensorFlow Datasets",
    "demo:SPLIT": "a split of the demo's emoji, prepared on first use",
    "hf:ORG/NAME/SPLIT": "a data set of the Hugging Face Hub, columns of images and captions",
}
LABELS = {
    "folder:PATH": "images, one sub-folder per class",
    "csv:PATH": "a table with the columns path and label",
    "parquet:PATTERN": "tables of images and classes",
    "tfds:NAME/SPLIT": "a prepared data set of TensorFlow Datasets with features image and label",
    "glue:TASK@FOLDER/SPLIT": "a task of GLUE",
    "wds:PATH": "tars in clip_benchmark's layout",
    "wds:hf:ORG/NAME": "the same on the Hugging Face Hub",
    "hf:ORG/NAME/SPLIT": "a data set of the Hugging Face Hub, columns of images and classes",
}

_IMPORTED = re.compile(r"(?P<class>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*)(?::(?P<rest>.*))?", re.S)


class SourceSpec(NamedTuple):
    """A parsed spec: its kind, and the remaining part."""

    kind: type[SourceKind]
    rest: str


def is_spec(text: str) -> bool:
    """Whether `text` has the form of a spec, without importing or opening anything."""
    prefix, _, rest = text.partition(":")
    if prefix in SOURCES:
        return bool(rest) and not text.startswith("hf://")  # an address
    return _IMPORTED.fullmatch(text) is not None


def spec_from_path(text: str) -> str:
    """Return the most likely spec for a plain path, or raise `UserError`; a spec is returned as it is."""
    path = os.path.expanduser(text)
    if is_spec(text):
        return text
    if os.path.isdir(path):
        tars = glob.glob("*.tar", root_dir=path)
        names = (name for _, _, files in os.walk(path) for name in files)
        if tars and any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
            raise UserError(
                f"{text!r} has images and tars, such as {min(tars)}; write folder:{text} or tar:{text} for one of them."
            )
        return f"tar:{text}" if tars else f"folder:{text}"
    for name, kind in SOURCES.items():
        if redact(path).lower().endswith(kind.suffixes):
            return f"{name}:{text}"
    raise UserError(
        f"no file or folder {text!r} of a known kind; check the path, or write KIND:REST, such as csv:FILE for a table "
        "of image names and captions."
    )


def parse(text: str) -> SourceSpec:
    """Parse a spec without opening it; `UserError` for an unknown kind, only a kind, or a missing module."""
    prefix, _, rest = text.partition(":")
    cause = None
    if prefix in SOURCES and is_spec(text):
        return SourceSpec(SOURCES[prefix], rest)
    if match := _IMPORTED.fullmatch(text):
        try:
            return SourceSpec(import_class(match["class"], SourceKind, "source"), match["rest"] or "")
        except UserError as error:
            # A word before a colon is more likely a misspelt kind than a module.
            if "." in prefix or not isinstance(error.__cause__, ModuleNotFoundError):
                raise
            cause = error
    raise UserError(f"unknown source {text!r}; write {_forms({**PAIRS, **LABELS})}.") from cause


def parse_all(specs: Sequence[str]) -> list[SourceSpec]:
    """Parse the specs of `data.sources`; `UserError` for none, and see `parse`."""
    if not specs:
        raise UserError("data.sources is empty; add a source such as folder:PATH or tfds:NAME/SPLIT.")
    return [parse(spec) for spec in specs]


def has_labels(text: str, items: str) -> bool:
    """Whether `text` is the spec of a source of labelled `items`, "image" or "text", without opening it."""
    if not is_spec(text):
        return False
    kind = parse(text).kind
    return overrides(kind, "open_labelled") and kind.labelled_items == items


def overrides(kind: type[SourceKind], method: str) -> bool:
    """Whether a kind implements a method of `SourceKind`."""
    return inspect.getattr_static(kind, method) is not inspect.getattr_static(SourceKind, method)


def extras(spec: str) -> set[str]:
    """Return the extras of this package (setup.py) required by a source, without opening it."""
    hub = {"hub"} if "hf://" in spec or spec.startswith("wds:hf:") else set()
    return hub | set(parse(spec).kind.extras)


def _forms(forms: Mapping[str, str]) -> str:
    return f"{', '.join(forms)} or {OF_ANOTHER_PACKAGE}"


def _open(spec: str, options: SourceOptions | None, method: str, items: str, forms: Mapping[str, str]) -> Any:
    kind, rest = parse(spec)
    if not overrides(kind, method):
        raise UserError(f"source {spec!r} has no {items}; write {_forms(forms)}.")
    return getattr(kind, method)(rest, options or SourceOptions())


def open_pairs(spec: str, options: SourceOptions | None = None) -> Source:
    """Open the image-text pairs named by `spec`; raise `UserError` for an unknown, missing or unprepared source."""
    return _open(spec, options, "open", "image-text pairs", PAIRS)


def open_labelled(spec: str, options: SourceOptions | None = None) -> labelled.Labelled:
    """Open the labelled items named by `spec`, see `LABELS`; see `open_pairs` for errors."""
    return _open(spec, options, "open_labelled", "labelled items", LABELS)


def source_options(config: DataConfig) -> SourceOptions:
    """Return the config keys used by sources."""
    field = config.caption_transform.rpartition(":")[2]
    return SourceOptions(config.dir, config.image_column, tuple(config.text_weights), field)


def caption_transform(config: DataConfig) -> CaptionTransform | None:
    """Return the function of `data.caption_transform`, if any, of (caption, the record's "tags", random generator)."""
    name = config.caption_transform.rpartition(":")[0]
    return import_name(name, "data.caption_transform") if name else None


def open_sources(config: DataConfig, classes: int = 0, fields: Sequence[str] | None = None) -> list[Source]:
    """Open the sources of `config`, without the pairs of `config.holdout` and `config.drop`.

    Args:
      config: specs and options of the sources.
      classes: number of classes of labelled sources; 0 for pairs.
      fields: fields of training batches, among "image", "text" and "label"; None without training.

    Raises:
      UserError: a source that cannot be opened, has nothing in it or does not fit `classes` or `fields`, or training
        batches larger than the data.
    """
    parse_all(config.sources)
    caption_transform(config)  # raises now rather than at the first batch
    if classes and (config.spread_duplicate_captions or config.holdout or config.drop):
        raise UserError("data.spread_duplicate_captions, data.holdout and data.drop are for pairs only; remove them.")
    options = dataclasses.replace(source_options(config), negative_columns=tuple(config.negative_columns))
    open_one = open_labelled if classes else open_pairs
    opened: list[Source] = [open_one(spec, options) for spec in config.sources]
    empty = [spec for spec, source in zip(config.sources, opened, strict=True) if not len(source)]
    if empty:
        raise UserError(f"source {empty[0]!r} has nothing in it; leave it out of data.sources, or name another split.")
    if classes:
        labelled.check_sources(config.sources, cast(Sequence[labelled.Labelled], opened), classes, fields)
        return opened
    if config.holdout or config.drop:
        opened = holdout.training_part(config.sources, opened, config)
    shares = [("data.sources", config.batch, sum(map(len, opened)))]
    for spec, source, weight in zip(config.sources, opened, config.weights, strict=False):  # weights may be empty
        shares.append((spec, math.ceil(config.batch * weight / sum(config.weights)), len(source)))
    for spec, rows, pairs in shares if fields is not None else ():
        if rows > pairs:
            raise UserError(
                f"data.batch={config.batch} exceeds the {pairs} pairs of {spec!r} for training, of which a batch takes "
                f"{rows}: pairs would be negatives of themselves. Lower data.batch or its data.weights, or add pairs."
            )
    return opened


class Decoded(WrappedSource):
    """Keeps decoded images in memory, n * h * w * 3 bytes.

    Undecodable images stay encoded, so that the record is bad only if its image is used.
    """

    def __init__(self, source: Source, decoding: str = DataConfig.decoding) -> None:
        super().__init__(source)
        self._options = images.DECODINGS[decoding]
        self._records: dict[int, Record] = {}

    def __getitem__(self, index: int) -> Record:
        if index not in self._records:
            record = self.source[index]
            with contextlib.suppress(BadSample, KeyError):  # labelled texts have no image
                record = record | {"image": images.decode(record["image"], **self._options)}
            self._records[index] = record
        return self._records[index]
