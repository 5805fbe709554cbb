"""Retrieval on image-text pairs of your own: a source, or the pairs that a run holds out of its training.

Pairs of one image, by its bytes, are one item with all of their captions.

`retrieval/SOURCE` has all pairs of a source of `data.sources`: retrieval/folder:PATH, retrieval/csv:PATTERN,
retrieval/tar:PATTERN, retrieval/tfds:NAME/SPLIT. The kind of a plain path, retrieval/PATH, is inferred, as by the
recipe small. Columns other than those of `data.image_key` and `data.text_keys` end its name:
retrieval/csv:PATTERN?image=COLUMN&text=COLUMN. `retrieval/holdout` has the pairs that `data.holdout` of the model's run
keeps out of training, `retrieval/holdout@RUN` those of another run, for models that have none of their own.
"""

import contextlib
import dataclasses
import difflib
import os
import urllib.parse
from collections.abc import Sequence
from typing import Any

import numpy as np

from xclip_jax.core import fields, imports
from xclip_jax.core.console import log0
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.data import holdout, opening, sources
from xclip_jax.data.base import MissingColumnError, Source
from xclip_jax.data.config import DataConfig
from xclip_jax.data.controls import Subset
from xclip_jax.data.labelled import Field
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators.base import HELD_OUT, Joined, Pictures, SetKind
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.results import Provenance, digest
from xclip_jax.evaluators.retrieval import RetrievalSet

PREFIX = "retrieval/"
_COLUMNS = "?image=COLUMN&text=COLUMN"


def names_held_out(spec: str, prefix: str) -> bool:
    """Whether `spec` names held-out pairs: "holdout" or "holdout@RUN" after `prefix`."""
    return spec.startswith(prefix) and spec.removeprefix(prefix).partition("@")[0] == HELD_OUT


def held_out_data(spec: str, data: DataConfig) -> DataConfig:
    """Return the data keys of the run whose pairs `spec`, FAMILY/holdout or FAMILY/holdout@RUN, names.

    Args:
      spec: name of the set.
      data: of the model's own run.

    Raises:
      UserError: a folder that is not a run, or a run without held-out pairs.
    """
    name, at, run = spec.partition("@")
    if at:
        content = RunFolder(run).read_config() if run else None
        if content is None:
            raise UserError(f"{spec}: {run!r} is not the folder of a run; write {name}@RUN.")
        data = fields.read_group(DataConfig, content["config"]["data"], "data", [])
    if not data.holdout or not data.sources:
        whose = f"the run {run!r}" if at else "this model"
        raise UserError(f"{spec}: {whose} holds out no pairs (data.holdout); write {name}@RUN for those of a run.")
    return data


def named_columns(name: str, data: DataConfig) -> tuple[str, DataConfig]:
    """Return a source's spec without the end "?image=COLUMN&text=COLUMN", and `data` with these columns.

    Either may be left out, and `text` given several times; in names %26 is a &, %2C a comma. A ? of another meaning, as
    in a pattern of files, stays.

    Raises:
      UserError: another key beside these, several images, or no column.
    """
    place, _, end = name.rpartition("?")
    columns: dict[str, list[str]] = {}
    for key, _, column in (part.partition("=") for part in end.split("&")):
        columns.setdefault(key, []).append(urllib.parse.unquote(column))
    if not place or not columns.keys() & {"image", "text"}:
        return name, data
    images, texts = columns.get("image", [data.image_key]), columns.get("text", data.text_keys)
    if columns.keys() - {"image", "text"} or len(images) > 1 or not all((*images, *texts)):
        raise UserError(f"{PREFIX}{name} ends in '?{end}'; expected {_COLUMNS}, or one of the two.")
    return place, dataclasses.replace(data, image_key=images[0], text_keys=tuple(texts))


def _pairs(specs: Sequence[str], share: float, data: DataConfig) -> tuple[list[Source], list[holdout.Pairs]]:
    options = opening.source_options(data)
    opened = [sources.open_pairs(spec, options) for spec in specs]
    return opened, [holdout.find(spec, source, share, data) for spec, source in zip(specs, opened, strict=True)]


def firsts(parts: Sequence[holdout.Pairs]) -> list[np.ndarray]:
    """Return of each part the positions of the pairs whose image no earlier pair of all parts has."""
    known: set[str] = set()
    positions = []
    for part in parts:
        first = {digits: i for i, digits in reversed(list(enumerate(part.hashes))) if digits not in known}
        positions.append(np.array(sorted(first.values()), int))
        known |= first.keys()
    return positions


def captions_by_image(parts: Sequence[holdout.Pairs]) -> dict[str, list[str]]:
    """Return the captions of each image by its hash, each once, in the order of the pairs.

    Captions of one image are often one pair each, as the rows of a CSV file: every one of them is right for it.
    """
    texts: dict[str, dict[str, None]] = {}
    for part in parts:
        for digits, captions in zip(part.hashes, part.captions, strict=True):
            texts.setdefault(digits, {}).update(dict.fromkeys(captions))
    return {digits: list(captions) for digits, captions in texts.items()}


def load_pairs(spec: str, prepare: Preprocessing | int, data: DataConfig, profile: Profile) -> RetrievalSet:
    """Return the set `spec`, see the module's docstring.

    Captions are as they are, or have the command's prefix: what the CLIP paper puts before those of its own two sets is
    left out.

    Raises:
      UserError: a source that cannot be opened or has no pairs that can be read, or no held-out pairs.
    """
    name = spec.removeprefix(PREFIX)
    if names_held_out(spec, PREFIX):
        specs, share = tuple(data.sources), data.holdout
    else:
        place, data = named_columns(name, data)
        specs, share = (sources.spec_from_path(place),), 1.0
        name = specs[0] + name.removeprefix(place)
    try:
        with imports.named_by("the config of the run that holds them out") if share < 1 else contextlib.nullcontext():
            opened, parts = _pairs(specs, share, data)
    except MissingColumnError as error:
        if share < 1:
            raise
        raise UserError(f"{spec}: {error.fault}; name its columns, {PREFIX}SOURCE{_COLUMNS}.") from error
    if not any(part.captions for part in parts):
        raise UserError(f"{spec}: none of the {sum(map(len, opened))} pairs of {', '.join(specs)} can be used.")
    if bad := sum(part.bad for part in parts):
        log0(f"WARNING: {spec}: {bad:,} of the {sum(map(len, opened)):,} pairs cannot be read and are left out")
    profile = dataclasses.replace(profile, prefix=profile.prefix or "")
    prepare = profile.preprocessing(prepare)
    by_image = captions_by_image(parts)
    images: list[Any] = [
        Field(Subset(source, part.indices[new]), "image")
        for source, part, new in zip(opened, parts, firsts(parts), strict=True)
    ]
    captions = [profile.texts(texts) for texts in by_image.values()]
    card = Provenance(
        data=", ".join(specs),
        split=f"held out, {share:g}" if share < 1 else "",
        split_hash=digest([*by_image, *captions]),
        protocol=f"recall, any match; {f'first {profile.captions}' if profile.captions else 'all'} captions of each "
        f"image{', in lower case' if profile.lower else ''}",
        templates=f"{profile.prefix}CAPTION",
        preprocessing=prepare.resizing,
        metric="image_to_text/r1",
    )
    return RetrievalSet(name, Pictures(Joined(images), prepare), captions, card)


class PairSets(SetKind):
    """`retrieval/SOURCE` and `retrieval/holdout`."""

    prefixes = (PREFIX.rstrip("/"),)
    names = (PREFIX + HELD_OUT,)
    usage = (
        f"own pairs: {', '.join(f'{PREFIX}{spec}' for spec in sources.usage())}, of other columns "
        f"{PREFIX}SOURCE{_COLUMNS}; {PREFIX}{HELD_OUT}[@RUN]"
    )

    @classmethod
    def knows(cls, spec: str) -> bool:
        """Whether it names held-out pairs, a source or a path that one reads; nothing is opened.

        Raises:
          UserError: a path of which no kind of source is known, one that does not exist and is not spelled like
            the held-out pairs, or columns that are named wrongly.
        """
        if names_held_out(spec, PREFIX):
            return True
        place, _ = named_columns(spec.removeprefix(PREFIX), DataConfig())
        try:
            return bool(sources.spec_from_path(place))
        except UserError:
            if os.path.isabs(place) or os.path.exists(place):
                raise
            if place and ":" not in place and not difflib.get_close_matches(place, [HELD_OUT]):
                raise UserError(f"{spec}: no file or folder {place!r}; check the path.") from None
            return False

    @classmethod
    def data_of(cls, spec: str, data: DataConfig) -> DataConfig:
        """Return `data`, or those of the run that holds the pairs out."""
        return held_out_data(spec, data) if names_held_out(spec, PREFIX) else data

    @classmethod
    def load(cls, spec: str, prepare: Preprocessing | int, data_dir: str | None, profile: Profile) -> RetrievalSet:
        """Return the set of `load_pairs`; the keys of `data` have their defaults."""
        return load_pairs(spec, prepare, DataConfig(dir=data_dir or ""), profile)

    open = staticmethod(load_pairs)

    @classmethod
    def shows(cls, spec: str) -> str:
        """All of them have captions."""
        return "captions"
