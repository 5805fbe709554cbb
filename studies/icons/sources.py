"""The icons as a source of training pairs: `studies.icons.sources:IconSplits:SPLIT` in `data.sources`."""

from typing import ClassVar

from studies.icons import corpus
from xclip_jax.data.base import Form, SourceKind, SourceOptions
from xclip_jax.data.readers.tfds import TfdsSource, open_prepared

KIND = "studies.icons.sources:IconSplits"


class IconSplits(SourceKind):
    """A split of the icons; the data set is prepared on first use."""

    forms: ClassVar = {f"{KIND}:SPLIT": Form(pairs="a split of the icons, prepared on first use")}

    @classmethod
    def extras(cls, rest: str) -> tuple[str, ...]:
        """Return the extra with the renderer."""
        return ("demo",)

    @classmethod
    def open(cls, rest: str, options: SourceOptions, labels: bool = False) -> TfdsSource:
        """Open the split `rest`."""
        return open_prepared(KIND, corpus.prepare(options.dir or None), rest, options)
