"""Retrieval on your own image-text pairs: a source, or the pairs that a run holds out of its training.

retrieval/SOURCE[?image=COLUMN&text=COLUMN]     all pairs of a source or path; the columns image and text by default
retrieval/holdout[@RUN]                         the pairs that `data.holdout` of the model's run, or another, keeps out

Pairs whose images have the same bytes are one item with all of their captions, equal ones too.
"""

import contextlib
import dataclasses
import urllib.parse
from collections.abc import Sequence
from typing import Any

import numpy as np

from xclip_jax.core import fields, imports
from xclip_jax.core.console import log0
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunReader
from xclip_jax.data import holdout, sources
from xclip_jax.data.base import MissingColumnError, display_name, field
from xclip_jax.data.config import DataConfig
from xclip_jax.data.holdout import Subset
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators.base import HELD_OUT, SetKind, joined, pictures
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.results import Provenance, digest
from xclip_jax.evaluators.retrieval import RetrievalSet

PREFIX = "retrieval/"
_COLUMNS = "?image=COLUMN&text=COLUMN"


def is_holdout(spec: str, prefix: str) -> bool:
    """Whether `spec` is "holdout" or "holdout@RUN" after `prefix`."""
    return spec.startswith(prefix) and spec.removeprefix(prefix).partition("@")[0] == HELD_OUT


def held_out_data(spec: str, data: DataConfig) -> DataConfig:
    """Return the `data` group of the run that holds out the pairs of `spec`: FAMILY/holdout or FAMILY/holdout@RUN."""
    name, at, run = spec.partition("@")
    if at:
        content = RunReader(run).read_config() if run else None
        if content is None:
            raise UserError(f"{spec}: {run!r} is not the folder of a run; write {name}@RUN.")
        data = fields.read_group(DataConfig, content["config"]["data"], "data", [])
    if not data.holdout or not data.sources:
        whose = f"the run {run!r}" if at else "this model"
        raise UserError(f"{spec}: {whose} holds out no pairs (data.holdout); name another run, {name}@RUN.")
    return data


def query_columns(name: str) -> tuple[str, dict[str, list[str]]]:
    """Split "?image=COLUMN&text=COLUMN" from a source's spec; return the spec, and the columns by key.

    In names %26 is & and %2C a comma. A question mark with another meaning, such as in a pattern of files, stays.
    """
    source_name, _, query = name.rpartition("?")
    columns = urllib.parse.parse_qs(query)
    return (source_name, columns) if source_name and columns.keys() & {"image", "text"} else (name, {})


def named_columns(name: str, data: DataConfig) -> tuple[str, DataConfig]:
    """Return the spec of `query_columns`, and `data` with its columns: image and text unless the spec names others.

    The columns of the model's training pairs do not matter, so that every model is evaluated on the same pairs.
    """
    source_name, columns = query_columns(name)
    if columns.keys() - {"image", "text"}:
        source_name, columns = name, {}
    image_column = columns.get("image", [DataConfig.image_column])[0]
    text_columns = tuple(columns.get("text", DataConfig.text_columns))
    return source_name, dataclasses.replace(data, image_column=image_column, text_columns=text_columns, tags_key="")


def captions_by_image(parts: Sequence[holdout.Pairs]) -> tuple[dict[str, list[str]], list[np.ndarray]]:
    """Return {hash of an image: its captions}, and for each part the positions of new images.

    Captions of one image are often separate pairs, such as rows of a CSV file. All of them are right answers and
    queries, equal ones too, the convention of Flickr8k and COCO.
    """
    captions: dict[str, list[str]] = {}
    positions = []
    for part in parts:
        new = []
        for i, (digits, texts) in enumerate(zip(part.hashes, part.captions, strict=True)):
            if digits not in captions:
                new.append(i)
            captions.setdefault(digits, []).extend(texts)
        positions.append(np.array(new, int))
    return captions, positions


def load_pairs(spec: str, prepare: Preprocessing, data: DataConfig, profile: Profile) -> RetrievalSet:
    """Open the set `spec`; its captions have the prefix of the command, not the one of the published sets."""
    name = spec.removeprefix(PREFIX)
    if is_holdout(spec, PREFIX):
        specs = tuple(data.sources)
        share = data.holdout
    else:
        source_name, data = named_columns(name, data)
        specs = (sources.spec_from_path(source_name),)
        share = 1.0
        name = specs[0] + name.removeprefix(source_name)
    try:
        with imports.named_by("the config of the run that holds them out") if share < 1 else contextlib.nullcontext():
            opened = [sources.open_pairs(spec, sources.source_options(data)) for spec in specs]
            parts = [holdout.find(name, source, share, data) for name, source in zip(specs, opened, strict=True)]
    except MissingColumnError as error:
        if share < 1:
            raise
        raise UserError(f"{spec}: {error.fault}; name its columns, {PREFIX}SOURCE{_COLUMNS}.") from error
    if not any(part.captions for part in parts):
        raise UserError(
            f"{spec}: none of the {sum(map(len, opened))} pairs of {', '.join(specs)} can be used; `xclip-jax check` "
            "says why."
        )
    if bad := sum(part.bad for part in parts):
        log0(f"WARNING: {spec}: {bad:,} of the {sum(map(len, opened)):,} pairs cannot be read and are left out")
    profile = dataclasses.replace(profile, prefix=profile.prefix or "", exif_rotation=True)
    by_image, positions = captions_by_image(parts)
    each = zip(opened, parts, positions, strict=True)
    images: list[Any] = [field(Subset(source, part.indices[new]), "image") for source, part, new in each]
    origin = {"data": ", ".join(specs), "split": f"held out, {share:g}" if share < 1 else ""}
    return captioned(name, joined(images), list(by_image.values()), list(by_image), prepare, profile, **origin)


def captioned(
    name: str,
    images: Sequence[Any],
    captions: Sequence[Sequence[str]],
    ids: Sequence[Any],
    prepare: Preprocessing,
    profile: Profile,
    **origin: str,
) -> RetrievalSet:
    """Return a retrieval set of encoded images, identified by `ids`, and their captions as the profile changes them."""
    prepare = profile.preprocessing(prepare)
    texts = [profile.texts(of_image) for of_image in captions]
    for i, of_image in enumerate(texts):
        if not of_image:
            raise UserError(f"{name}: {display_name(images, i)} has no caption; add one, or leave the image out.")
    kept = f"first {profile.captions}" if profile.captions else "all"
    card = Provenance(
        **origin,
        split_hash=digest([*ids, *texts]),
        protocol=f"recall, any match; {kept} captions of each image{', in lower case' if profile.lower else ''}",
        templates=f"{profile.caption_prefix}CAPTION",
        preprocessing=prepare.resizing,
        metric="image_to_text/r1",
    )
    return RetrievalSet(name, pictures(images, prepare), texts, card)


class PairSets(SetKind):
    """`retrieval/SOURCE` and `retrieval/holdout`."""

    prefixes = (PREFIX.rstrip("/"),)
    names = (PREFIX + HELD_OUT,)
    usage = (
        f"own pairs: {', '.join(f'{PREFIX}{spec}' for spec in sources.PAIRS)}, with other columns "
        f"{PREFIX}SOURCE{_COLUMNS}; {PREFIX}{HELD_OUT}[@RUN]"
    )

    @classmethod
    def knows(cls, spec: str) -> bool:
        """Whether `spec` names held-out pairs, a source, or a path that a source reads; nothing is opened."""
        if is_holdout(spec, PREFIX):
            return True
        return bool(sources.spec_from_path(named_columns(spec.removeprefix(PREFIX), DataConfig())[0]))

    @classmethod
    def data_of(cls, spec: str, data: DataConfig) -> DataConfig:
        """Return `data`, or the group of the run that holds out the pairs."""
        return held_out_data(spec, data) if is_holdout(spec, PREFIX) else data

    load = staticmethod(load_pairs)

    @classmethod
    def shows(cls, spec: str) -> str:
        """Return "captions"."""
        return "captions"
