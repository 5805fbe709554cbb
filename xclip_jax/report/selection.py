"""Which pictures and texts a report looks at: the run's evaluation sets, else pairs that it trained on.

Sets of another size than the demo's are cut down, so that a report takes no longer than the evaluation did.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from xclip_jax.data import loader
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.errors import BadSample, UserError
from xclip_jax.evaluators import file_datasets, registry
from xclip_jax.evaluators.retrieval import RetrievalSet
from xclip_jax.evaluators.zeroshot import ZeroShotSet

SHOWN = 96  # side of an image to be looked at, pixels
POOL = 1000  # images of a set
PROMPTS = 6000  # texts of a set's classes
PAIRS = 400  # training pairs, where there is no set


@dataclasses.dataclass(frozen=True)
class Panel:
    """A zero-shot set to show: its name in `evaluators.sets`, a title and a sentence that may say {ways}."""

    spec: str
    title: str
    sentence: str


PANELS = (
    Panel(
        "emoji/test_concepts",
        "Things it has never seen",
        "No picture of these was ever shown in training. The model chooses among {ways} new names, each with up to "
        "three keywords.",
    ),
    Panel(
        "emoji/test_rendering",
        "Known things, drawn by another artist",
        "Training showed other artists' pictures of these, never this one. The model chooses among {ways} names.",
    ),
    Panel(
        "emoji/test_line",
        "Line drawings",
        "Training showed colour pictures only. The model chooses among {ways} names.",
    ),
)


@dataclasses.dataclass
class Picked:
    """Sets, each at the model's size and at `SHOWN`.

    Attributes:
      zeroshot: for classification, with what to say about them.
      retrieval: one for retrieval, where there is any.
      emoji: whether pictures of the demo are among them, whose artists are to be named.
      missing: what could not be read, and what to do about it.
    """

    zeroshot: list[tuple[Panel, ZeroShotSet, ZeroShotSet]] = dataclasses.field(default_factory=list)
    retrieval: tuple[RetrievalSet, RetrievalSet] | None = None
    emoji: bool = False
    missing: list[str] = dataclasses.field(default_factory=list)


def pick(
    specs: Sequence[str], prepare: Preprocessing, data_dir: str | None, data: loader.DataConfig | None, seed: int
) -> Picked:
    """The sets to show of `specs`: those of `PANELS`, else the first three for classification, and one for retrieval.

    Args:
      specs: names of evaluation sets.
      prepare: how the model wants its images.
      data_dir: root of TFDS data sets, None for the default.
      data: of the training pairs, which serve where none of the sets can be read.
      seed: decides which training pairs.
    """
    picked = Picked()
    known = {panel.spec: panel for panel in PANELS if panel.spec in specs}
    for spec in [*known, *(spec for spec in dict.fromkeys(specs) if spec not in known and _has_images(spec))]:
        if picked.retrieval if _is_retrieval(spec) else len(picked.zeroshot) == (len(known) or len(PANELS)):
            continue
        try:
            found, shown = (registry.load(spec, way, data_dir) for way in (prepare, prepare.at(SHOWN)))
        except UserError as error:
            picked.missing += [str(error)] if str(error) not in picked.missing else []
            continue
        picked.emoji |= spec.startswith("emoji/")
        if isinstance(found, RetrievalSet):
            picked.retrieval = found, shown
        elif isinstance(found, ZeroShotSet) and np.ndim(found.labels) == 1:
            panel = known.get(spec) or Panel(spec, spec, "The model chooses among {ways} names.")
            picked.zeroshot.append((panel, _few_prompts(found), shown))
    if data is not None and not picked.zeroshot and not picked.retrieval:
        _training_pairs(picked, data, prepare, seed)
    return picked


def _is_retrieval(spec: str) -> bool:
    return "retrieval" in spec.partition("@")[0]


def _has_images(spec: str) -> bool:
    """Whether a set may be one to classify or to retrieve; others would be loaded for nothing."""
    name = spec.partition("@")[0]
    probes = name.startswith(("probe/", "fewshot/")) or name in file_datasets.READERS
    return not probes and not (name.startswith("emoji/") and any(w in name for w in ("probe", "alias", "transl")))


def _few_prompts(data: ZeroShotSet) -> ZeroShotSet:
    """As many prompts of each class as `PROMPTS` allows."""
    if sum(map(len, data.prompts)) <= PROMPTS:
        return data
    each = max(1, PROMPTS // len(data.prompts))
    return dataclasses.replace(data, prompts=[prompts[:each] for prompts in data.prompts])


def take(data: ZeroShotSet, keep: np.ndarray) -> ZeroShotSet:
    """The images at `keep`, decoded."""
    images = [data.images[i] for i in keep]
    return dataclasses.replace(data, images=images, labels=np.asarray(data.labels)[keep], groups={})


def _training_pairs(picked: Picked, data: loader.DataConfig, prepare: Preprocessing, seed: int) -> None:
    """Pairs that were trained on, drawn by the seed: better than nothing where a run names no set."""
    try:
        found = loader.open_sources(dataclasses.replace(data, cache=False))
    except UserError as error:
        picked.missing.append(str(error))
        return
    of = np.repeat(np.arange(len(found)), [len(source) for source in found])
    starts = np.cumsum([0, *map(len, found)])
    images, captions = [], []
    for i in np.random.default_rng(seed).permutation(len(of))[:PAIRS]:
        try:
            record = found[of[i]][int(i - starts[of[i]])]
            images.append([way(record["image"]) for way in (prepare, prepare.at(SHOWN))])
        except BadSample:
            continue
        captions.append(record["text"][:5])
    if not images:
        picked.missing.append("None of the training pairs could be read.")
        return
    picked.emoji |= any(spec.startswith("demo:") for spec in data.sources)
    title = "training pairs, which the model has seen"
    picked.retrieval = tuple(RetrievalSet(title, [pair[side] for pair in images], captions) for side in (0, 1))
