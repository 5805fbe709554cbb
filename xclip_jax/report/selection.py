"""Selects the images and texts of a report from the run's evaluation sets, or else from its training pairs.

Large sets are cut down, so that a report takes no longer than the evaluation did.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from xclip_jax.core.errors import BadSample, UserError, describe
from xclip_jax.data import holdout, loader, sources
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators import registry, tables
from xclip_jax.evaluators.base import SetKind
from xclip_jax.evaluators.prompts import PROFILES, Profile
from xclip_jax.evaluators.retrieval import RetrievalSet
from xclip_jax.evaluators.sets.own import is_holdout
from xclip_jax.evaluators.zeroshot import ZeroShotSet

SHOWN = 96  # side of an image on the page, pixels
POOL = 1000  # images of a set
PROMPTS = 6000  # texts of a set's classes
PAIRS = 400  # training pairs, without a set
ZEROSHOT_SETS = 3  # without a panel


@dataclasses.dataclass
class Selection:
    """Sets, each at the model's size and at `SHOWN`.

    Attributes:
      zeroshot: title, sentence, which may have {num_classes}, and both sizes of sets for classification.
      retrieval: one for retrieval, or None.
      credits: of the images' authors.
      queries: texts to search the images with.
      missing: sentences on sets that could not be read, with the remedy.
    """

    zeroshot: list[tuple[str, str, ZeroShotSet, ZeroShotSet]] = dataclasses.field(default_factory=list)
    retrieval: tuple[RetrievalSet, RetrievalSet] | None = None
    credits: list[str] = dataclasses.field(default_factory=list)
    queries: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)

    def add_kind(self, kind: type[SetKind]) -> None:
        """Add the credit and the queries of a kind of sets, once."""
        self.credits += [kind.credit] if kind.credit and kind.credit not in self.credits else []
        self.queries += [query for query in kind.queries if query not in self.queries]


def select(
    specs: Sequence[str],
    prepare: Preprocessing,
    data_dir: str | None,
    data: loader.DataConfig | None,
    seed: int,
    profile: Profile = PROFILES["openai"],
    data_seed: int = 0,
    pairs: bool = True,
) -> Selection:
    """Select the sets to show: those with a panel, else the first for classification, and one for retrieval.

    Args:
      specs: names of evaluation sets.
      prepare: preprocessing of the model.
      data_dir: root of TFDS data sets, None (or "") for the root in `data`.
      data: of the training pairs, which are shown where none of the sets can be read; held-out ones are a set.
      seed: of the training pairs that are drawn.
      profile: templates and class names.
      data_seed: of the run, which seeds `data.subset` and `data.caption_noise` of the training pairs.
      pairs: whether `data` are pairs; labelled items are not shown.
    """
    selection = Selection()
    kinds = {spec: registry.check(spec) for spec in dict.fromkeys(specs)}
    panels = {spec: panel for kind in kinds.values() for spec, panel in kind.panels.items() if spec in kinds}
    shows = {spec: kind.shows(spec) for spec, kind in kinds.items()}
    for spec in [*panels, *(spec for spec in kinds if spec not in panels and shows[spec])]:
        if (
            selection.retrieval
            if shows[spec] == "captions"
            else len(selection.zeroshot) == (len(panels) or ZEROSHOT_SETS)
        ):
            continue
        try:
            sets = [registry.load(spec, view, data_dir, profile, data) for view in (prepare, prepare.with_size(SHOWN))]
        except (UserError, OSError) as error:
            selection.missing += [str(error)] if str(error) not in selection.missing else []
            continue
        if shows[spec] == "captions":
            selection.retrieval = sets[0], sets[1]
        elif np.ndim(sets[0].labels) == 1:
            title, sentence = panels.get(spec) or (_title(spec), "The model chooses among {num_classes} names.")
            selection.zeroshot.append((title, sentence, _few_prompts(sets[0]), sets[1]))
        selection.add_kind(kinds[spec])
    if data is None or selection.zeroshot or selection.retrieval:
        return selection
    if not pairs:
        selection.missing.append(
            "the run learned from labelled items, not from pairs, so none of them are shown; name sets with --sets."
        )
    else:
        _training_pairs(selection, dataclasses.replace(data, dir=data_dir or data.dir), prepare, seed, data_seed)
    return selection


def _title(spec: str) -> str:
    """Return the title of a set for classification without a panel."""
    name = spec.removeprefix("zeroshot/")
    return f"{tables.shorten([name])[name]}: which class" if is_holdout(spec, "zeroshot/") else spec


def _few_prompts(data: ZeroShotSet) -> ZeroShotSet:
    """Return the set with at most `PROMPTS` prompts, equally many of each class."""
    if sum(map(len, data.prompts)) <= PROMPTS:
        return data
    each = max(1, PROMPTS // len(data.prompts))
    return dataclasses.replace(data, prompts=[prompts[:each] for prompts in data.prompts])


def of_different_classes(labels: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Return the indices of at most `n` images of different classes, in random order."""
    order = rng.permutation(len(labels))
    _, first = np.unique(labels[order], return_index=True)
    return order[np.sort(first)][:n]


def subset(data: ZeroShotSet, keep: np.ndarray) -> ZeroShotSet:
    """Return the part of a set with the indices `keep`, its images decoded."""
    images = [data.images[i] for i in keep]
    return dataclasses.replace(data, images=images, labels=np.asarray(data.labels)[keep], groups={})


def readable(data: ZeroShotSet | RetrievalSet, indices: np.ndarray, missing: list[str]) -> np.ndarray:
    """Return the `indices` of images that can be decoded; a sentence on the others is added to `missing`.

    Raises:
      UserError: none can be decoded.
    """
    kept, errors = [], []
    for i in indices:
        try:
            data.images[i]
            kept.append(i)
        except BadSample as error:
            errors.append(describe(error))
    if not kept:
        raise UserError(f"none of {len(indices)} images of {data.name} can be read; the first: {errors[0]}.")
    if errors:
        missing.append(
            f"{len(errors):,} of {len(indices):,} images drawn from {data.name} cannot be read and are left out; the "
            f"first: {errors[0]}."
        )
    return np.array(kept)


def _training_pairs(
    selection: Selection, data: loader.DataConfig, prepare: Preprocessing, seed: int, data_seed: int
) -> None:
    """Add training pairs, drawn by the seed, for a run without evaluation sets."""
    try:
        opened = holdout.apply_controls(sources.open_sources(data), data, data_seed)
    except (UserError, OSError) as error:
        selection.missing.append(str(error))
        return
    source_of = np.repeat(np.arange(len(opened)), [len(source) for source in opened])
    starts = np.cumsum([0, *map(len, opened)])
    images, captions = [], []
    for i in np.random.default_rng(seed).permutation(len(source_of))[:PAIRS]:
        try:
            record = opened[source_of[i]][int(i - starts[source_of[i]])]
            images.append([view(record["image"]) for view in (prepare, prepare.with_size(SHOWN))])
        except BadSample:
            continue
        captions.append(record["text"][:5])
    if not images:
        selection.missing.append("None of the training pairs could be read.")
        return
    source_types = {spec.partition(":")[0] for spec in data.sources}
    for kind in registry.KINDS.values():
        if source_types & set(kind.sources):
            selection.add_kind(kind)
    title = "training pairs, on which the model was trained"
    at_both_sizes = ([pair[size] for pair in images] for size in (0, 1))
    for_model, shown = (RetrievalSet(title, views, captions) for views in at_both_sizes)
    selection.retrieval = for_model, shown
