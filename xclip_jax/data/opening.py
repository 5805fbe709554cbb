"""Opens the sources of a run, and checks that its batches can be made of them."""

import math
from collections.abc import Sequence

from xclip_jax.core.errors import UserError
from xclip_jax.data import holdout, labelled, sources
from xclip_jax.data.base import Source, SourceOptions
from xclip_jax.data.config import DataConfig


def source_options(config: DataConfig) -> SourceOptions:
    """Return the keys of `config` that sources use."""
    return SourceOptions(config.dir, config.image_key, tuple(config.text_keys), config.tags_key)


def open_sources(config: DataConfig, classes: int = 0, fields: Sequence[str] | None = None) -> list[Source]:
    """Open the sources of `config`, without the pairs that `config.holdout` holds out.

    Args:
      config: their specs and options.
      classes: number of classes of labelled sources; 0 for pairs.
      fields: those of training batches, of "image", "text" and "label"; None where nothing is trained.

    Raises:
      labelled.MismatchError: labelled sources that do not fit `classes` or `fields`.
      UserError: a source that cannot be opened, keys that contradict each other, labelled sources that do not fit each
        other, and for training fewer pairs than a batch has.
    """
    sources.parse_all(config.sources)
    options = source_options(config)
    opened: list[Source]
    if classes:
        if config.spread_duplicate_captions:
            raise UserError(
                "data.spread_duplicate_captions compares captions, and labelled items have none: set it to False."
            )
        if config.holdout:
            raise UserError("data.holdout holds out pairs; of labelled items evaluate another split, and set it to 0.")
        items = [sources.open_labelled(spec, options) for spec in config.sources]
        labelled.check_sources(config.sources, items, classes, fields)
        opened = list(items)
    else:
        opened = [sources.open_pairs(spec, options) for spec in config.sources]
    if empty := [spec for spec, source in zip(config.sources, opened, strict=True) if not len(source)]:
        raise UserError(f"source {empty[0]!r} has nothing in it; leave it out of data.sources, or name another split.")
    if classes:
        return opened
    if config.holdout:
        opened = holdout.training_part(config.sources, opened, config)
    if fields is not None and config.batch > (pairs := sum(map(len, opened))):
        which = "that data.holdout leaves" if config.holdout else "of data.sources"
        raise UserError(
            f"data.batch={config.batch} exceeds the {pairs} pairs {which}: a batch would contain pairs several times, "
            f"as their own negatives. Set data.batch to at most {pairs}, or add pairs."
        )
    if fields is not None and config.weights:
        _check_shares(config, opened)
    return opened


def _check_shares(config: DataConfig, opened: Sequence[Source]) -> None:
    """Raise a `UserError` where a batch's share of a source, by `data.weights`, has more pairs than the source."""
    for spec, source, weight in zip(config.sources, opened, config.weights, strict=True):
        pairs = max(round(config.subset * len(source)), 1)
        share = math.ceil(config.batch * weight / sum(config.weights))
        if share > pairs:
            raise UserError(
                f"data.weights gives {spec!r}, of {pairs} pairs, {share} of a batch of {config.batch}: a batch would "
                "contain pairs several times, as their own negatives. Lower its weight or data.batch, or add pairs."
            )
