"""Files that are not code: other projects' files in this package, the cache, and data sets that TFDS prepares in it."""

import importlib.resources
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

B = TypeVar("B", bound="tfds.core.DatasetBuilder")


def third_party(name: str) -> bytes:
    """Return a file of another project that is distributed with this package; see `third_party/README.md`."""
    return (importlib.resources.files("xclip_jax.data") / "third_party" / name).read_bytes()


def cache_dir() -> pathlib.Path:
    """Return the folder of downloads and prepared data: $XCLIP_CACHE, else ~/.cache/xclip_jax. It may not exist yet."""
    return pathlib.Path(os.environ.get("XCLIP_CACHE") or "~/.cache/xclip_jax").expanduser()


def prepare_dataset(make: Callable[[str], B], data_dir: str | os.PathLike | None, check: Callable[[], Any]) -> B:
    """Return a builder whose data set is prepared as array_record files, and prepare it if that has not been done.

    An interrupted preparation leaves nothing under the data set's name.

    Args:
      make: root of TFDS data sets -> builder.
      data_dir: the root; by default $TFDS_DATA_DIR, else `tfds` in `cache_dir`.
      check: raises what would prevent the preparation, before TFDS announces it.
    """
    import tensorflow_datasets as tfds

    root = os.fspath(data_dir or os.environ.get("TFDS_DATA_DIR") or cache_dir() / "tfds")
    builder = make(root)
    # Its nested bars, a dozen for these few seconds, would hide the lines that report progress.
    tfds.disable_progress_bar()
    if not builder.is_prepared():
        check()
    try:
        builder.download_and_prepare()
    except OSError:
        # The final rename fails if another process was faster; it wrote the same files.
        if not builder.data_path.exists():
            raise
        builder = make(root)
    return builder


def encoded_records(builder: "tfds.core.DatasetBuilder", split: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the encoded image of each record of a split, and its other features, which are texts and lists of texts."""
    import tensorflow_datasets as tfds

    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    for record in (source[i] for i in range(len(source))):
        image = record.pop("image")
        yield image, {key: _decoded(value) for key, value in record.items()}


def _decoded(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else [item.decode() for item in value]
