"""Evaluation sets in clip_benchmark's layout, `wds:PATH` and `wds:hf:ORG/NAME`: zero-shot classification, or retrieval.

See `data.wds` for the layout. Class names and prompts are the data set's own, whatever the profile.
"""

import dataclasses
from typing import Any

from xclip_jax.core.errors import UserError
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.readers import wds
from xclip_jax.evaluators.base import Pictures, SetKind
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.retrieval import RetrievalSet
from xclip_jax.evaluators.sets import zeroshot_datasets
from xclip_jax.evaluators.sets.file_datasets import retrieval_card

PREFIX = "wds:"


class WdsSets(SetKind):
    """`wds:PATH` and `wds:hf:ORG/NAME`."""

    prefixes = (PREFIX.rstrip(":"),)

    @classmethod
    def knows(cls, spec: str) -> bool:
        """Whether something is named; files are not read."""
        return bool(spec.removeprefix(PREFIX))

    @classmethod
    def load(cls, spec: str, prepare: Preprocessing | int, data_dir: str | None, profile: Profile) -> Any:
        """Return a `ZeroShotSet` or, of a data set of captions, a `RetrievalSet`.

        Raises:
          UserError: a data set that cannot be read.
        """
        rest = spec.removeprefix(PREFIX)
        if wds.locate(rest, fetch=False).type != wds.CAPTIONS:
            return zeroshot_datasets.load(spec, prepare, data_dir, profile)
        split, prepare = wds.locate(rest), profile.preprocessing(prepare)
        images, captions = wds.open_captions(split)
        captions = [profile.texts(texts) for texts in captions]
        card = retrieval_card(rest, split.name, list(images.sizes()), captions, prepare, profile)
        card = dataclasses.replace(card, version=split.version)
        return RetrievalSet(spec, Pictures(images, prepare), captions, card)

    @classmethod
    def shows(cls, spec: str) -> str:
        """Return "captions" of a data set that is known to have them."""
        try:
            kind = wds.locate(spec.removeprefix(PREFIX), fetch=False).type
        except UserError:  # loading the set says what is wrong
            kind = wds.CLASSES
        return "captions" if kind == wds.CAPTIONS else "classes"
