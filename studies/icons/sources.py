"""The icons as a source of training pairs: `studies.icons.sources:IconSplits:SPLIT` in `data.sources`."""

from collections.abc import Sequence

import numpy as np

from studies.icons import corpus
from xclip_jax.data.base import SourceKind, SourceOptions
from xclip_jax.data.readers.tfds import TfdsSource, open_prepared

KIND = "studies.icons.sources:IconSplits"


def add_category(caption: str, categories: Sequence[str], rng: np.random.Generator) -> str:
    """Append the category to 30 % of the captions; alone it would name nothing."""
    others = [category for category in categories if category != caption]
    return f"{caption}, {others[0]}" if rng.random() < 0.3 and others else caption


class IconSplits(SourceKind):
    """A split of the icons; the data set is prepared on first use."""

    extras = ("demo",)  # the renderer

    @classmethod
    def open(cls, rest: str, options: SourceOptions) -> TfdsSource:
        """Open the split `rest`."""
        return open_prepared(KIND, corpus.prepare(options.dir or None), rest, options)
