"""Base classes of data sources and of kinds of sources; a kind of your own derives from both."""

import abc
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from xclip_jax.core.errors import UserError

Record = dict[str, Any]

# torchvision's ImageFolder reads those without GIF and JFIF.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff",
)  # fmt: skip
# Largest files that are read, in bytes. The largest photographs are a tenth of it; a longer text is not a caption, and
# takes seconds.
MAX_BYTES = {"image": 1 << 28, "text": 1 << 20, "json": 1 << 24}


class Source(abc.ABC):
    """Random access to image-text pairs. It is read by several threads, and pickled for `data.workers`.

    A record has "image", encoded (bytes) or decoded (uint8 (h, w, 3)), "text", captions to draw from (list of strings,
    at least one), "tags", keywords (list of strings, may be empty), and "id", a name.
    """

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of records, those included that cannot be used."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record:
        """Return a record.

        Raises:
          BadSample: it cannot be used. The ledger records it, and a random record of the source takes its place.
        """

    @abc.abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Return JSON that identifies the data: "samples", their number, "hash", and whatever else describes them.

        A copy elsewhere has the same hash, and other data have another one. A run stores fingerprints in
        data.json, and does not resume on data with another one.
        """

    def describe(self, index: int) -> dict[str, str]:
        """Return what names a record to a person, such as {"file": its path}, for the ledger. It must not raise."""
        return {}

    def known_fault(self, index: int) -> str:
        """Return why a record cannot be used, as far as that is known without reading it, or ""."""
        return ""

    def known_faults(self) -> Mapping[str, int]:
        """Return the number of records by `known_fault`, without those that have none."""
        return {}

    def remarks(self) -> Iterable[str]:
        """Lines about the whole source that `xclip_jax.commands.check` prints."""
        return ()


def name_of(source: Source, index: int) -> str:
    """Return what names a record to a person, in one line: its file, or its number where the source says no more."""
    return ", ".join(map(str, source.describe(index).values())) or f"record {index}"


class WrappedSource(Source):
    """A source that is another one in all but what a subclass changes."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        return self.source[index]

    def fingerprint(self) -> dict[str, Any]:
        """Fingerprint of the source."""
        return self.source.fingerprint()

    def describe(self, index: int) -> dict[str, str]:
        """The source's description of a record."""
        return self.source.describe(index)

    def known_fault(self, index: int) -> str:
        """The source's known fault of a record, or ""."""
        return self.source.known_fault(index)

    def known_faults(self) -> Mapping[str, int]:
        """Known faults of the source."""
        return self.source.known_faults()

    def remarks(self) -> Iterable[str]:
        """Remarks of the source."""
        return self.source.remarks()


class LabelledSource(Source):
    """Random access to labelled items. A record has "label", a number, and "image", or "text" and "tags".

    Attributes:
      key: what the items are, "image" or "text".
      items: encoded or uint8 (h, w, 3) images, or strings, in the order of the records.
      names: of the classes, in the order of their numbers; none where labels are numbers to be fitted.
      multilabel: whether an item may have several classes, or none.
      version: of the data set, "" where unknown.
      metrics: to report of a fine-tuned model, the most important first.
      templates: the data set's own prompts of a class, {c} for its name; empty for the evaluator's.
    """

    key: str
    items: Sequence[Any]
    names: Sequence[str] = ()
    multilabel: bool = False
    version: str = ""
    metrics: Sequence[str] = ("top1",)
    templates: Sequence[str] = ()

    @abc.abstractmethod
    def labels(self) -> np.ndarray:
        """Return all labels, (n,), or bool (n, classes) with `multilabel`; no image is decoded."""

    @property
    def identity(self) -> Any:
        """JSON for hashes of evaluation sets that identifies items which are not files."""
        return self.fingerprint()["hash"]


class MissingColumnError(UserError):
    """A source has no column of a name that a key of the config gives.

    Attributes:
      fault: says so, with the columns that there are, but not what to set.
    """

    def __init__(self, fault: str, keys: str) -> None:
        super().__init__(f"{fault}; set {keys}.")
        self.fault, self.keys = fault, keys

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Exceptions pickle by their message alone; this one has two parts."""
        return type(self), (self.fault, self.keys)


class NotOfferedError(UserError):
    """A kind of sources does not open pairs, or labelled items."""


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """Keys of config group `data` that sources may use.

    Attributes:
      dir: root of TFDS data sets, "" for the default.
      image_key: feature of a record, or column of a table, with the image.
      text_keys: those with captions.
      tags_key: that with keywords, or "".
    """

    dir: str = ""
    image_key: str = "image"
    text_keys: Sequence[str] = ("text",)
    tags_key: str = ""


class SourceKind:
    """A kind of sources: those whose specs begin with its key in `sources.SOURCES`, or with "package.module:Class".

    Attributes:
      pair_specs: {spec: what it reads} of image-text pairs, for error messages and --help; empty if it opens none.
      labelled_specs: likewise of labelled items.
      split_specs: likewise of labelled items in several splits, each of which is named SPEC/SPLIT.
      labelled_items: what labelled items are, "image" or "text".
      suffixes: endings of the files that it reads, to suggest a spec for a path.
    """

    pair_specs: ClassVar[Mapping[str, str]] = {}
    labelled_specs: ClassVar[Mapping[str, str]] = {}
    split_specs: ClassVar[Mapping[str, str]] = {}
    labelled_items: ClassVar[str] = "image"
    suffixes: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def open_pairs(cls, rest: str, options: SourceOptions) -> Source:
        """Open image-text pairs; `rest` is the spec without what names the kind.

        Raises:
          UserError: names what is wrong with `rest`, an option or a file.
        """
        raise NotOfferedError("image-text pairs")

    @classmethod
    def open_labelled(cls, rest: str, options: SourceOptions) -> LabelledSource:
        """Open labelled items; arguments and errors are those of `open_pairs`."""
        raise NotOfferedError("labelled items")

    @classmethod
    def extras(cls, rest: str) -> tuple[str, ...]:
        """Extras of this package (setup.py) that the source `rest` is read with; nothing is opened."""
        return ()

    @classmethod
    def has_split(cls, rest: str, split: str, options: SourceOptions) -> bool:
        """Whether the source `rest` has a split of this name; called for kinds with `split_specs` only."""
        return False

    @classmethod
    def reads(cls, path: str) -> bool:
        """Whether a path without a prefix is most likely of this kind."""
        return path.endswith(cls.suffixes) and not os.path.isdir(path)
