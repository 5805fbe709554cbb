"""Photographs of products with a shop's titles: splits, captions, and the source of training pairs.

The files are not part of this project: docs/photographs.md has their origin and hashes. Name their folder by the
recipe's argument root=FOLDER, or by the environment variable PHOTOGRAPHS.

Splits are rows of the files:

    train               train-*.parquet
    choice              the same without the kinds of `held_kinds`, to train the runs whose results decide something
    validation_unseen   the kinds of `held_kinds` in train-*.parquet
    validation, test    the files of these names; equal titles are in one file
    test_unseen         unseen_types/test-*.parquet, kinds that no other file has

Captions are the shop's titles ("loose"), or made of the columns of audience, colour and kind ("tight"): "men's navy
blue shirts". With "half" a hash of the photograph decides which of the two a photograph has.
"""

import functools
import glob
import hashlib
import os
import pathlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from xclip_jax.core.errors import UserError
from xclip_jax.data.base import SourceKind, SourceOptions
from xclip_jax.data.readers.table import ColumnSource, ImageColumn

KIND = "studies.photographs.corpus:PhotographSplits"
FOLDER = "PHOTOGRAPHS"  # environment variable
FILES = {
    "train": "train-*.parquet",
    "validation": "validation-*.parquet",
    "test": "test-*.parquet",
    "test_unseen": "unseen_types/test-*.parquet",
}
SPLITS = (*FILES, "choice", "validation_unseen")
ROWS = {"train": 34_296, "validation": 1_918, "test": 3_061, "test_unseen": 4_386}
TITLE, KIND_COLUMN = "productDisplayName", "articleType"
HELD_KINDS, HELD_SIZES = 20, (40, 800)  # number of kinds held out for choices; fewest and most photographs of each
_AUDIENCES = {"Men": "men's", "Women": "women's", "Boys": "boys'", "Girls": "girls'", "Unisex": "unisex"}

Row = dict[str, Any]


def hash_rank(*words: str) -> str:
    """Return a hash to sort things in an order that no result can influence."""
    return hashlib.sha256(" ".join(words).encode()).hexdigest()


def folder(data_dir: str | None) -> str:
    """Return the folder of the files: `data_dir`, or the environment variable.

    Raises:
      UserError: neither names a folder with the files.
    """
    name = data_dir or os.environ.get(FOLDER, "")
    if not name or not glob.glob(os.path.join(name, FILES["train"])):
        raise UserError(
            f"the photographs are not in {name!r}; see docs/photographs.md, and name their folder by the recipe's "
            f"argument root=FOLDER, or by the environment variable {FOLDER}."
        )
    return str(pathlib.Path(name).resolve())


@functools.lru_cache(maxsize=1)
def held_kinds(root: str) -> tuple[str, ...]:
    """Return the kinds held out of training for choices: the first by hash among the kinds of middle size."""
    counts = Counter(table(root, "train")[KIND_COLUMN].to_pylist())
    least, most = HELD_SIZES
    middle = [kind for kind, n in counts.items() if least <= n <= most]
    return tuple(sorted(sorted(middle, key=lambda kind: hash_rank("held kind", kind))[:HELD_KINDS]))


@functools.lru_cache(maxsize=len(SPLITS))
def table(root: str, split: str) -> Any:
    """Return the rows of a split, a `pyarrow.Table`; `UserError` for files with another number of rows."""
    if split not in FILES:
        held = pyarrow.compute.field(KIND_COLUMN).isin(held_kinds(root))
        return table(root, "train").filter(held if split == "validation_unseen" else ~held)
    pattern = os.path.join(root, FILES[split])
    whole = pyarrow.concat_tables(pyarrow.parquet.read_table(path) for path in sorted(glob.glob(pattern)))
    if len(whole) != ROWS[split]:
        raise UserError(f"{pattern} has {len(whole)} rows; expected {ROWS[split]}, those of the study.")
    return whole


@functools.lru_cache(maxsize=len(SPLITS))
def rows(root: str, split: str) -> list[Row]:
    """Return the columns of a split but its images, a dictionary for each row."""
    return table(root, split).drop_columns(["image"]).to_pylist()


def tight(row: Row) -> str:
    """Return a caption of audience, colour and kind."""
    colour = "" if row["baseColour"] in ("", "NA", None) else row["baseColour"].lower()
    return " ".join(filter(None, (_AUDIENCES[row["gender"]], colour, row[KIND_COLUMN].lower())))


CAPTIONS: dict[str, Callable[[Row], str]] = {
    "loose": lambda row: row[TITLE],
    "tight": tight,
    "half": lambda row: row[TITLE] if int(hash_rank("half", str(row["id"]))[-1], 16) % 2 else tight(row),
}


def captions(root: str, split: str, kind: str) -> list[str]:
    """Return the caption of each row of a split; `kind` is one of `CAPTIONS`."""
    return [CAPTIONS[kind](row) for row in rows(root, split)]


class Photographs(ColumnSource):
    """Photographs of a split with one kind of captions."""

    def __init__(self, root: str, split: str, kind: str) -> None:
        texts = captions(root, split, kind)
        images = ImageColumn(table(root, split)["image"], lambda index, path: (path, ""))
        super().__init__(images, {"text": pyarrow.chunked_array([texts])}, SourceOptions())
        identity = [f"{row['id']} {text}" for row, text in zip(rows(root, split), texts, strict=True)]
        self._hash = hashlib.sha256("\n".join(identity).encode()).hexdigest()

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of rows and a hash of their numbers and captions."""
        return {"samples": len(self), "hash": self._hash}


class PhotographSplits(SourceKind):
    """A split of the photographs with one kind of captions, `KIND:SPLIT/CAPTIONS`."""

    @classmethod
    def open(cls, rest: str, options: SourceOptions) -> Photographs:
        """Open the split and captions `rest`."""
        split, _, kind = rest.partition("/")
        if split not in SPLITS or kind not in CAPTIONS:
            valid = f"splits are {', '.join(SPLITS)}, captions {', '.join(CAPTIONS)}"
            raise UserError(f"{KIND}:{rest} is not SPLIT/CAPTIONS; {valid}.")
        return Photographs(folder(options.dir), split, kind)
