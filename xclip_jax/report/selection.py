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
class Panel:
    """A zero-shot set to show: its name in `evaluators.registry`, a title and a sentence that may say {ways}."""

    spec: str
    title: str
    sentence: str


@dataclasses.dataclass
class Picked:
    """Sets, each at the model's size and at `SHOWN`.

    Attributes:
      zeroshot: for classification, with what to say about them.
      retrieval: one for retrieval, where there is any.
      credits: who made the images.
      queries: texts to search the images with.
      missing: what could not be read, and what to do about it.
    """

    zeroshot: list[tuple[Panel, ZeroShotSet, ZeroShotSet]] = dataclasses.field(default_factory=list)
    retrieval: tuple[RetrievalSet, RetrievalSet] | None = None
    credits: list[str] = dataclasses.field(default_factory=list)
    queries: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)

    def add_kind(self, kind: type[SetKind]) -> None:
        """Adds the credit and the queries of a kind of sets, once."""
        self.credits += [kind.credit] if kind.credit and kind.credit not in self.credits else []
        self.queries += [query for query in kind.queries if query not in self.queries]


def pick(
    specs: Sequence[str], prepare: Preprocessing, data_dir: str | None, data: loader.DataConfig | None, seed: int
) -> Picked:
    """The sets to show of `specs`: those that have a panel, else the first for classification, and one for retrieval.

    Args:
      specs: names of evaluation sets.
      prepare: how the model wants its images.
      data_dir: root of TFDS data sets, None for the default.
      data: of the training pairs, which serve where none of the sets can be read.
      seed: decides which training pairs.
    """
    picked = Picked()
    kinds = {spec: registry.check(spec) for spec in dict.fromkeys(specs)}
    panels = {spec: panel for kind in kinds.values() for spec, panel in kind.panels.items() if spec in kinds}
    shows = {spec: kind.shows(spec) for spec, kind in kinds.items()}
    for spec in [*panels, *(spec for spec in kinds if spec not in panels and shows[spec])]:
        if picked.retrieval if shows[spec] == "captions" else len(picked.zeroshot) == (len(panels) or ZEROSHOT_SETS):
            continue
        try:
            sets = [registry.load(spec, way, data_dir) for way in (prepare, prepare.at(SHOWN))]
        except UserError as error:
            picked.missing += [str(error)] if str(error) not in picked.missing else []
            continue
        if shows[spec] == "captions":
            picked.retrieval = sets[0], sets[1]
        elif np.ndim(sets[0].labels) == 1:
            title, sentence = panels.get(spec) or (spec, "The model chooses among {ways} names.")
            picked.zeroshot.append((Panel(spec, title, sentence), _few_prompts(sets[0]), sets[1]))
        picked.add_kind(kinds[spec])
    if data is not None and not picked.zeroshot and not picked.retrieval:
        _training_pairs(picked, data, prepare, seed)
    return picked


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
    if any(spec.startswith("demo:") for spec in data.sources):
        picked.add_kind(registry.SETS["emoji"])
    title = "training pairs, which the model has seen"
    picked.retrieval = tuple(RetrievalSet(title, [pair[side] for pair in images], captions) for side in (0, 1))
