"""Config group `data`."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from xclip_jax.core.errors import UserError
from xclip_jax.core.fields import Check, at_least, between, choice, fraction_below_one, key, not_empty
from xclip_jax.data import images, transforms
from xclip_jax.data.length_groups import AUTO, LengthGroups
from xclip_jax.data.preprocessing import Triple, mean_std


def _accepted_by(parse: Callable[[Any], object]) -> Callable[[Any], bool]:
    def accepts(value: Any) -> bool:
        try:
            parse(value)
        except UserError:
            return False
        return True

    return accepts


_STATISTICS = Check(
    f"{', '.join(map(repr, transforms.STATISTICS))}, or mean and deviation by channel, ((r, g, b), (r, g, b)), "
    "deviations above 0",
    _accepted_by(mean_std),
)
_GROUPS = Check("'auto', 'full' or rising TOKENS:SHARE pairs such as '24:0.6,40:0.9'", _accepted_by(LengthGroups.parse))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Config group `data`: sources, the drawing of images and captions from them, and reading speed."""

    sources: Sequence[str] = key(
        (),
        "sources to mix, each KIND:REST such as folder:PATH; image-text pairs, or labelled items for fine-tuning",
        resume="free",
        host="own",
    )
    weights: Sequence[float] = key((), "share of samples from each source; empty: every sample once per epoch")
    holdout: float = key(
        0.0,
        "share of pairs to keep out of training, chosen by a hash of the image; evaluated as retrieval/holdout",
        fraction_below_one(),
    )
    spread_duplicate_captions: bool = key(
        False, "spread equal captions, which are false negatives, over each epoch; reads all captions at the start"
    )
    dir: str = key("", "root of TFDS data sets; empty for the default", resume="free", host="own")
    batch: int = key(4096, "b, pairs of the global batch", at_least(1), card="batch")
    tokenizer: str = key("clip", "clip, bytes or the path of a tokenizer file", not_empty(), resume="free", host="own")
    length_groups: str = key(
        AUTO,
        "TOKENS:SHARE,...: cut up to this share of a device's texts, the shortest ones, to this length, which changes "
        "no result; auto chooses by the data, full cuts none",
        _GROUPS,
        resume="free",
    )
    image_column: str = key("image", "feature of a record or column of a table; unused for tars and folders")
    text_columns: Sequence[str] = key(
        ("text",), "captions, of which one is drawn each time; in tars text is the .txt file, else a field of .json"
    )
    tags_key: str = key("", "keywords of a record; empty for none")
    tags: int = key(0, "at most this many keywords, in random order, go into a caption", at_least(0))
    tags_append_prob: float = key(0.5, "share of captions with keywords after them", between(0, 1))
    tags_only_prob: float = key(0.0, "share of captions that consist of keywords only", between(0, 1))
    crop_scale: tuple[float, float] = key(
        (0.5, 1.0), "smallest and largest area of a training crop over the image's", card="images"
    )
    resample: str = key(
        "area", "how a crop is resized; area is the fast one", choice(transforms.RESAMPLE), card="images"
    )
    flip_prob: float = key(0.0, "probability of a horizontal flip", between(0, 1), card="images")
    color_jitter: float = key(
        0.0, "strength of random brightness, contrast and saturation", between(0, 1), card="images"
    )
    normalization: str | tuple[Triple, Triple] = key(
        "imagenet", "name of mean and deviation of pixels, or both by channel, ((r, g, b), (r, g, b))", _STATISTICS
    )
    background: str = key(
        images.WHITE,
        "white lays transparent images on white before resizing; drop_alpha reads the colours hidden under the "
        "transparency like open_clip, and resizes evaluated images first",
        choice(images.BACKGROUNDS),
    )
    exif_rotation: bool = key(
        True, "rotate images by their EXIF tag wherever the model is used; open_clip and transformers do not"
    )
    cache: bool = key(False, "keep decoded images in memory")
    threads: int = key(16, "batches that this process reads at once", at_least(1), resume="free", host="own")
    max_bad_fraction: float = key(0.05, "a larger share of bad samples stops the run", between(0, 1), resume="free")

    def conflicts(self) -> Iterator[str]:
        """Yield values that contradict each other."""
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            yield f"crop_scale is {self.crop_scale}; expected 0 < smallest <= largest <= 1"
        if self.weights and len(self.weights) != len(self.sources):
            yield f"weights has {len(self.weights)} values for {len(self.sources)} sources; give one for each, or none"
        if any(weight <= 0 for weight in self.weights):
            yield f"weights is {self.weights}; expected values above 0; leave out sources without a share"
        if self.tags_append_prob + self.tags_only_prob > 1:
            probs = f"tags_append_prob {self.tags_append_prob} and tags_only_prob {self.tags_only_prob}"
            yield f"{probs} must not exceed 1 together"
