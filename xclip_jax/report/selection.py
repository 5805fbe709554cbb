"""Which pictures and texts a report looks at: the run's evaluation sets, else pairs that it trained on.

Sets of another size than the demo's are cut down, so that a report takes no longer than the evaluation did.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from xclip_jax.data import loader
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.errors import BadSample, UserError
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.base import SetKind
from xclip_jax.evaluators.retrieval import RetrievalSet
from xclip_jax.evaluators.zeroshot import ZeroShotSet

SHOWN = 96  # side of an image to be looked at, pixels
POOL = 1000  # images of a set
PROMPTS = 6000  # texts of a set's classes
PAIRS = 400  # training pairs, where there is no set
ZEROSHOT_SETS = 3  # where none has a panel


@dataclasses.dataclass(frozen=True)
class ZeroShotPanel:
    """A zero-shot set to show: its name in `evaluators.registry`, a title, a sentence that may have {num_classes}."""

    spec: str
    title: str
    sentence: str


@dataclasses.dataclass
class Selection:
    """Sets, each at the model's size and at `SHOWN`.

    Attributes:
      zeroshot: for classification, with what to say about them.
      retrieval: one for retrieval, where there is any.
      credits: who made the images.
      queries: texts to search the images with.
      missing: what could not be read, and what to do about it.
    """

    zeroshot: list[tuple[ZeroShotPanel, ZeroShotSet, ZeroShotSet]] = dataclasses.field(default_factory=list)
    retrieval: tuple[RetrievalSet, RetrievalSet] | None = None
    credits: list[str] = dataclasses.field(default_factory=list)
    queries: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)

    def add_kind(self, kind: type[SetKind]) -> None:
        """Adds the credit and the queries of a kind of sets, once."""
        self.credits += [kind.credit] if kind.credit and kind.credit not in self.credits else []
        self.queries += [query for query in kind.queries if query not in self.queries]


def select(
    specs: Sequence[str], prepare: Preprocessing, data_dir: str | None, data: loader.DataConfig | None, seed: int
) -> Selection:
    """The sets to show of `specs`: those that have a panel, else the first for classification, and one for retrieval.

    Args:
      specs: names of evaluation sets.
      prepare: how the model wants its images.
      data_dir: root of TFDS data sets, None for the default.
      data: of the training pairs, which serve where none of the sets can be read.
      seed: decides which training pairs.
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
            sets = [registry.load(spec, way, data_dir) for way in (prepare, prepare.at(SHOWN))]
        except UserError as error:
            selection.missing += [str(error)] if str(error) not in selection.missing else []
            continue
        if shows[spec] == "captions":
            selection.retrieval = sets[0], sets[1]
        elif np.ndim(sets[0].labels) == 1:
            title, sentence = panels.get(spec) or (spec, "The model chooses among {num_classes} names.")
            selection.zeroshot.append((ZeroShotPanel(spec, title, sentence), _few_prompts(sets[0]), sets[1]))
        selection.add_kind(kinds[spec])
    if data is not None and not selection.zeroshot and not selection.retrieval:
        _training_pairs(selection, data, prepare, seed)
    return selection


def _few_prompts(data: ZeroShotSet) -> ZeroShotSet:
    """As many prompts of each class as `PROMPTS` allows."""
    if sum(map(len, data.prompts)) <= PROMPTS:
        return data
    each = max(1, PROMPTS // len(data.prompts))
    return dataclasses.replace(data, prompts=[prompts[:each] for prompts in data.prompts])


def subset(data: ZeroShotSet, keep: np.ndarray) -> ZeroShotSet:
    """The images at `keep`, decoded."""
    images = [data.images[i] for i in keep]
    return dataclasses.replace(data, images=images, labels=np.asarray(data.labels)[keep], groups={})


def _training_pairs(selection: Selection, data: loader.DataConfig, prepare: Preprocessing, seed: int) -> None:
    """Pairs that were trained on, drawn by the seed: better than nothing where a run names no set."""
    try:
        sources = loader.open_sources(dataclasses.replace(data, cache=False))
    except UserError as error:
        selection.missing.append(str(error))
        return
    of = np.repeat(np.arange(len(sources)), [len(source) for source in sources])
    starts = np.cumsum([0, *map(len, sources)])
    images, captions = [], []
    for i in np.random.default_rng(seed).permutation(len(of))[:PAIRS]:
        try:
            record = sources[of[i]][int(i - starts[of[i]])]
            images.append([way(record["image"]) for way in (prepare, prepare.at(SHOWN))])
        except BadSample:
            continue
        captions.append(record["text"][:5])
    if not images:
        selection.missing.append("None of the training pairs could be read.")
        return
    source_types = {spec.partition(":")[0] for spec in data.sources}
    for kind in registry.KINDS:
        if source_types & set(kind.sources):
            selection.add_kind(kind)
    title = "training pairs, which the model has seen"
    selection.retrieval = tuple(RetrievalSet(title, [pair[side] for pair in images], captions) for side in (0, 1))
