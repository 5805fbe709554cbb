"""Retrieval on your image-text pairs: a source, or the pairs that a run holds out of its training.

retrieval/SOURCE[?image=COLUMN&text=COLUMN]     all pairs in a source or path; the columns image and text by default
retrieval/holdout[@RUN]                         the pairs held out by `data.holdout` of the model's run, or of RUN

Pairs with the same image bytes are one item with all of their captions, equal ones too, like in Flickr8k and COCO.
"""

import contextlib
import dataclasses
import json
import pathlib
import urllib.parse
from collections.abc import Sequence
from typing import Any

from xclip_jax.core import imports
from xclip_jax.core.console import log0
from xclip_jax.core.errors import UserError
from xclip_jax.core.storage import unreadable_as
from xclip_jax.data import holdout, sources
from xclip_jax.data.base import choose, display_name, field
from xclip_jax.data.config import DataConfig
from xclip_jax.data.holdout import Subset
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators.base import SetKind, is_holdout, joined, pictures
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.results import Provenance, digest
from xclip_jax.evaluators.retrieval import RetrievalSet

PREFIX = "retrieval/"


def published_layout(name: str, location: str) -> contextlib.AbstractContextManager[None]:
    """Turn errors from missing and damaged files, or files in another layout, into one sentence."""
    return unreadable_as(f"{name}: {location!r} is not in the published layout")


def read_json(path: pathlib.Path) -> Any:
    """Return the content of a JSON file in UTF-8."""
    return json.loads(path.read_text(encoding="utf-8"))


def query_columns(name: str) -> tuple[str, dict[str, list[str]]]:
    """Split "?image=COLUMN&text=COLUMN" from a source's spec; return the spec, and the columns by key.

    In names %26 is & and %2C a comma. Other question marks stay, for example in file patterns.
    """
    source_name, _, query = name.rpartition("?")
    columns = urllib.parse.parse_qs(query.replace("+", "%2B"))
    return (source_name, columns) if source_name and columns.keys() & {"image", "text"} else (name, {})


def named_columns(name: str, data: DataConfig) -> tuple[str, DataConfig]:
    """Return the spec from `query_columns`, and `data` with its columns: image and text unless the spec names others.

    The columns of the model's training pairs do not matter, so that every model is evaluated on the same pairs.
    """
    source_name, columns = query_columns(name)
    if columns.keys() - {"image", "text"}:
        source_name, columns = name, {}
    image = columns.get("image", [DataConfig.image_column])[0]
    # An unused weight, since ":2" at the end of a column's name would be taken for one.
    texts = tuple(f"{column}:1" for column in columns.get("text", DataConfig.text_columns))
    return source_name, dataclasses.replace(data, image_column=image, text_columns=texts, caption_transform="")


def captioned(
    name: str,
    images: Sequence[Any],
    captions: Sequence[Sequence[str]],
    ids: Sequence[Any],
    prepare: Preprocessing,
    profile: Profile,
    **origin: str,
) -> RetrievalSet:
    """Return a retrieval set of encoded images, identified by `ids`, with captions changed by the profile."""
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

    @classmethod
    def knows(cls, spec: str) -> bool:
        source_name, _ = named_columns(spec.removeprefix(PREFIX), DataConfig())
        return is_holdout(spec) or bool(sources.spec_from_path(source_name))

    @classmethod
    def load(cls, spec: str, prepare: Preprocessing, data: DataConfig, profile: Profile) -> RetrievalSet:
        """Open the set `spec`; captions get the command's prefix, not the prefix of published sets."""
        name = spec.removeprefix(PREFIX)
        where: Any = contextlib.nullcontext()
        if is_holdout(spec):
            specs = tuple(data.sources)
            share = data.holdout
            where = imports.named_by("the config of the run that holds them out")
        else:
            source_name, data = named_columns(name, data)
            specs = (sources.spec_from_path(source_name),)
            share = 1.0
            name = specs[0] + name.removeprefix(source_name)
        with where:
            opened = [sources.open_pairs(source_spec, sources.source_options(data)) for source_spec in specs]
        parts = [holdout.find(*named, share, data) for named in zip(specs, opened, strict=True)]
        total = sum(map(len, opened))
        bad = sum(part.bad for part in parts)
        if not any(part.captions for part in parts):
            raise UserError(
                f"{spec}: none of the {total} pairs in {', '.join(specs)} can be used; see `xclip-jax check`."
            )
        if bad:
            log0(f"WARNING: {spec}: {bad:,} of the {total:,} pairs cannot be read and are left out")
        profile = dataclasses.replace(profile, prefix=profile.prefix or "", exif_rotation=True)
        images = joined([field(Subset(x, y.indices), "image") for x, y in zip(opened, parts, strict=True)])
        captions: dict[str, list[str]] = {}  # of each image by its hash
        first: dict[str, int] = {}  # its first position
        pairs = [pair for part in parts for pair in zip(part.hashes, part.captions, strict=True)]
        for i, (digits, texts) in enumerate(pairs):
            captions.setdefault(digits, []).extend(texts)
            first.setdefault(digits, i)
        images = choose(images, list(first.values()))
        origin = {"data": ", ".join(specs), "split": f"held out, {share:g}" if share < 1 else ""}
        return captioned(name, images, list(captions.values()), list(captions), prepare, profile, **origin)

    @classmethod
    def shows(cls, spec: str) -> str:
        return "captions"
