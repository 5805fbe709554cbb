"""The glyphs as a source of training pairs: `studies.glyphs.sources:GlyphSplits:SPLIT` in `data.sources`."""

from typing import ClassVar

from studies.glyphs import corpus
from xclip_jax.data.base import Form, SourceKind, SourceOptions
from xclip_jax.data.readers.tfds import TfdsSource, open_prepared

KIND = "studies.glyphs.sources:GlyphSplits"


class GlyphSplits(SourceKind):
    """A split of the glyphs; the data set is prepared on first use."""

    forms: ClassVar = {f"{KIND}:SPLIT": Form(pairs="a split of the glyphs, prepared on first use")}

    @classmethod
    def extras(cls, rest: str) -> tuple[str, ...]:
        """Return the extra with fontTools and the renderer."""
        return ("glyphs",)

    @classmethod
    def open(cls, rest: str, options: SourceOptions, labels: bool = False) -> TfdsSource:
        """Open the split `rest`."""
        return open_prepared(KIND, corpus.prepare(options.dir or None), rest, options)
