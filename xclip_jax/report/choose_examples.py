"""Chooses the evaluation sets of a report and limits their size."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from xclip_jax.core.errors import BadSample, UserError, describe
from xclip_jax.data import loader
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.base import SetKind
from xclip_jax.evaluators.retrieval import RetrievalSet
from xclip_jax.evaluators.zeroshot import ZeroShotSet

SHOWN = 96  # side of an image on the page, pixels
PROMPTS = 6000  # most class texts of a set
ZEROSHOT_SETS = 3  # sets shown if none has a panel


@dataclasses.dataclass
class Selection:
    """Sets to show, each loaded at the model's image size and at `SHOWN`."""

    # (title, sentence, set, set at `SHOWN`); the sentence may contain {num_classes}
    zeroshot: list[tuple[str, str, ZeroShotSet, ZeroShotSet]] = dataclasses.field(default_factory=list)
    retrieval: tuple[RetrievalSet, RetrievalSet] | None = None
    kinds: list[type[SetKind]] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)  # sentences on unreadable sets


def select(
    specs: Sequence[str],
    prepare: Preprocessing,
    data_dir: str | None,
    data: loader.DataConfig | None,
) -> Selection:
    """Select the sets with a panel, or else the first ones for classification, and one for retrieval.

    Args:
      specs: names of evaluation sets.
      prepare: the model's preprocessing.
      data_dir: root of TFDS data sets; None or "" for `data.dir`.
      data: config of the training pairs, for held-out pairs.
    """
    selection = Selection()
    kinds: dict[str, type[SetKind]] = {}
    for spec in dict.fromkeys(specs):
        try:
            kinds[spec] = registry.check(spec)
        except UserError as error:
            selection.missing.append(str(error))
    panels = {spec: panel for kind in kinds.values() for spec, panel in kind.display.panels.items() if spec in kinds}
    shows = {spec: kind.shows(spec) for spec, kind in kinds.items()}
    for spec in [*panels, *(spec for spec in kinds if spec not in panels and shows[spec])]:
        is_retrieval = shows[spec] == "captions"
        if selection.retrieval if is_retrieval else len(selection.zeroshot) == (len(panels) or ZEROSHOT_SETS):
            continue
        try:
            sets = [registry.load(spec, view, data_dir, data=data) for view in (prepare, prepare.with_size(SHOWN))]
        except (UserError, OSError) as error:
            selection.missing += [str(error)] if str(error) not in selection.missing else []
            continue
        if is_retrieval:
            selection.retrieval = (sets[0], sets[1])
        elif np.ndim(sets[0].labels) == 1:
            title, sentence = panels.get(spec) or (spec, "The model chooses among {num_classes} names.")
            prompts = sets[0].prompts
            each = max(1, PROMPTS // len(prompts)) if sum(map(len, prompts)) > PROMPTS else None
            few = dataclasses.replace(sets[0], prompts=[of_class[:each] for of_class in prompts])
            selection.zeroshot.append((title, sentence, few, sets[1]))
        selection.kinds.append(kinds[spec])
    return selection


def readable(data: ZeroShotSet | RetrievalSet, indices: np.ndarray, missing: list[str]) -> np.ndarray:
    """Return the `indices` of decodable images and add a sentence on others to `missing`; raise `UserError` if none."""
    kept = []
    errors = []
    for i in indices:
        try:
            data.images[i]
            kept.append(i)
        except BadSample as error:
            errors.append(describe(error))
    if not kept:
        raise UserError(f"none of {len(indices)} images of {data.name} can be read; the first: {errors[0]}.")
    if errors:
        lost = f"{len(errors):,} of {len(indices):,} images drawn from {data.name} cannot be read and are left out"
        missing.append(f"{lost}; the first: {errors[0]}.")
    return np.array(kept)
