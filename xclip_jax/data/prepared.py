"""Data sets that this project makes itself: prepared by TFDS when they are first read, and their records."""

import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import tensorflow_datasets as tfds

from xclip_jax.data import assets

B = TypeVar("B", bound=tfds.core.DatasetBuilder)


def prepare(make: Callable[[str], B], data_dir: str | os.PathLike | None, check: Callable[[], Any]) -> B:
    """Return a builder whose data set is prepared as array_record files; prepares it where that has not been done.

    An interrupted preparation leaves nothing under the data set's name.

    Args:
      make: root of TFDS data sets -> builder.
      data_dir: that root; by default $TFDS_DATA_DIR, else `tfds` in the cache of `assets.cache_dir`.
      check: raises what would prevent the preparation, before TFDS announces it.
    """
    root = os.fspath(data_dir or os.environ.get("TFDS_DATA_DIR") or assets.cache_dir() / "tfds")
    builder = make(root)
    # Its nested bars, a dozen for these few seconds, would hide the lines that report progress.
    tfds.disable_progress_bar()
    if not builder.is_prepared():
        check()
    try:
        builder.download_and_prepare()
    except OSError:
        # The final rename fails where another process was faster; what it wrote is the same.
        if not builder.data_path.exists():
            raise
        builder = make(root)
    return builder


def records(builder: tfds.core.DatasetBuilder, split: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the encoded image of each record of a split, and its other features, which are texts and lists of texts."""
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    for record in (source[i] for i in range(len(source))):
        image = record.pop("image")
        yield image, {key: _text(value) for key, value in record.items()}


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else [item.decode() for item in value]
