"""Config group `data`."""

import dataclasses
import re
from collections.abc import Iterator, Sequence

from xclip_jax.core.fields import Check, at_least, between, choice, fraction_below_one, key, not_empty
from xclip_jax.data import images, transforms
from xclip_jax.data.length_groups import AUTO, FULL
from xclip_jax.data.preprocessing import Triple


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
    drop: str = key("", "file by xclip-jax check --suspects with captions to leave out", resume="free", host="own")
    drop_threshold: float = key(0.0, "only captions of lower probability or higher cross-entropy; 0: all", at_least(0))
    spread_duplicate_captions: bool = key(
        False, "spread equal captions, which are false negatives, over each epoch; reads all captions at the start"
    )
    dir: str = key("", "root of TFDS data sets; empty for the default", resume="free", host="own")
    batch: int = key(4096, "b, pairs of the global batch", at_least(1), card="batch")
    tokenizer: str = key("clip", "clip, bytes or the path of a tokenizer file", not_empty(), resume="free", host="own")
    length_groups: str = key(
        AUTO,
        "auto cuts most texts of a device to shorter lengths, which it chooses by the data and which change no result; "
        "full cuts none",
        choice((AUTO, FULL)),
        resume="free",
    )
    image_column: str = key("image", "feature of a record or column of a table; unused for tars and folders")
    text_columns: Sequence[str] = key(
        ("text",), "captions to draw, COLUMN or COLUMN:WEIGHT; in tars text is the .txt file, else a field of .json"
    )
    negatives: int = key(0, "wrong texts drawn for each pair, hard negatives for clip and siglip", at_least(0))
    negative_columns: Sequence[str] = key((), "columns of wrong texts, in tars fields of .json, in folders *.NAME.txt")
    caption_transform: str = key(
        "",
        "function that changes each drawn text, and the field of a record that it gets with captions; empty for none",
        Check("'package.module:function:FIELD' or empty", lambda value: not value or value.count(":") >= 2),
    )
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
        "imagenet",
        "mean and deviation of pixels: clip, imagenet, half, or both by channel, ((r, g, b), (r, g, b))",
    )
    decoding: str = key(
        "xclip",
        "wherever the model is used, xclip lays transparent images on white and rotates images by their EXIF tag; "
        "transformers, like its version 5.21, does not rotate them; open_clip does neither and shows colours hidden "
        "under the transparency",
        choice(images.DECODINGS),
    )
    cache: bool = key(False, "keep decoded images in memory")
    threads: int = key(16, "batches that this process reads at once", at_least(1), resume="free", host="own")
    max_bad_fraction: float = key(0.05, "a larger share of bad samples stops the run", between(0, 1), resume="free")

    @property
    def text_weights(self) -> dict[str, float]:
        """Return {column: weight} of `text_columns`, each COLUMN:WEIGHT, or COLUMN with the weight 0."""
        matches = [re.fullmatch(r"(.*?)(?::(\d*\.?\d+))?", column, re.S) for column in self.text_columns]
        return {match[1]: float(match[2] or 0) for match in matches if match}

    def conflicts(self) -> Iterator[str]:
        """Yield values that contradict each other."""
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            yield f"crop_scale is {self.crop_scale}; expected 0 < smallest <= largest <= 1"
        plain = sum(column in self.text_weights for column in self.text_columns)
        if plain not in (0, len(self.text_columns)) or len(self.text_weights) < len(self.text_columns):
            yield f"text_columns is {self.text_columns}; expected different columns, all or none with COLUMN:WEIGHT"
        if self.weights and (len(self.weights) != len(self.sources) or min(self.weights) <= 0):
            yield f"weights is {self.weights}; expected one value above 0 for each of the {len(self.sources)} sources"
        if bool(self.negatives) != bool(self.negative_columns):
            yield f"negatives is {self.negatives} and negative_columns {self.negative_columns}; set both or neither"
