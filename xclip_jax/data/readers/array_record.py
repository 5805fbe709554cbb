"""ArrayRecord files of serialized tf.train.Example, the format that TensorFlow's users write; read without it."""

from collections.abc import Sequence
from typing import Any, ClassVar

from xclip_jax.core import storage
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data.base import Record, Source, SourceKind, SourceOptions
from xclip_jax.data.readers.tables import fingerprint, strip_texts
from xclip_jax.data.text import decode_utf8


class ArrayRecordSource(Source):
    """Pairs in ArrayRecord files of tf.train.Example."""

    def __init__(self, pattern: str, image_key: str, text_keys: Sequence[str], tags_key: str = "") -> None:
        """Opens the files.

        Args:
          pattern: see `storage.expand`.
          image_key: feature with the encoded image.
          text_keys: features with captions.
          tags_key: feature with keywords, or "".

        Raises:
          UserError: no such file, or not an ArrayRecord file.
        """
        from array_record.python import array_record_data_source

        self.files = storage.expand(pattern)
        self.image_key, self.text_keys, self.tags_key = image_key, tuple(text_keys), tags_key
        try:
            self._data = array_record_data_source.ArrayRecordDataSource(self.files)
        except Exception as error:  # the library raises bare errors of C++
            raise UserError(f"{pattern!r} cannot be read as ArrayRecord files ({error}).") from error

    def __len__(self) -> int:
        return len(self._data)

    def describe(self, index: int) -> dict[str, str]:
        """Number of the record over all files."""
        return {"row": str(index)}

    def __getitem__(self, index: int) -> Record:
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            example = tf_example_pb2.Example.FromString(self._data[index])  # ty: ignore[missing-attribute]
        except Exception as error:
            raise BadSample("record cannot be read", str(error)) from error
        features = {key: list(value.bytes_list.value) for key, value in example.features.feature.items()}
        if not features.get(self.image_key):
            raise BadSample("no image in the record", f"it has {', '.join(sorted(features))}")

        def strings(keys: Sequence[str]) -> list[str]:
            return strip_texts([decode_utf8(value) for key in keys for value in features.get(key, ())])

        text = strings(self.text_keys)
        if not text:
            raise BadSample("caption is empty")
        tags = strings([self.tags_key])
        return {"image": features[self.image_key][0], "text": text, "tags": tags, "id": str(index)}

    def fingerprint(self) -> dict[str, Any]:
        """Number of records, a hash of the files (see `storage.fingerprint`), and their names and sizes."""
        return fingerprint(len(self), self.files)


class ArrayRecords(SourceKind):
    """`array_record:PATTERN`."""

    pair_specs: ClassVar = {"array_record:PATTERN": "serialized tf.train.Example in ArrayRecord files"}
    suffixes = (".array_record", ".arrayrecord")

    @classmethod
    def open_pairs(cls, rest: str, options: SourceOptions) -> ArrayRecordSource:
        """Open an `ArrayRecordSource`."""
        return ArrayRecordSource(rest, options.image_key, options.text_keys, options.tags_key)
