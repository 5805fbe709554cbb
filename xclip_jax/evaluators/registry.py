"""Named evaluation sets: the one place to add another. `SETS` maps each name to a function that makes the set.

The sets of the demo, `xclip_jax.data.demo` (`emoji/...`); three artists drew the pictures, results are means over them:

    validation_concepts, test_concepts      pictures of concepts that nobody saw, among 100 and 200 such concepts; a
                                            class's embedding is the mean over its prompts, "name, tag, tag, tag" with
                                            each of its tags in front once, and each tag alone
    ..._concepts_one_prompt                 the same with the one prompt "name, tag, tag, tag"
    validation_rendering, test_rendering    a known concept as an artist drew it whose picture was kept out of
                                            training, among the names of all concepts
    test_rendering_flags, _animals_food, _rest    the same for one group, among the group's names alone
    test_rendering_flags_all_names          flags among all names
    test_line, test_line_concepts           line drawings, a style never trained on: all names; the 200 unseen concepts
    validation_retrieval, test_retrieval    the pictures of ..._rendering with name and aliases as captions
    test_probe                              visual: category and subcategory by a linear probe and by neighbours,
                                            trained on the training pictures, tested on test_concepts; C is chosen on
                                            validation_concepts
    test_aliases, test_translations         textual: the 200 test concepts' names, found by an alias; by the name in
                                            five other languages, which training never showed
    test_text_probe                         textual: the category by a linear probe on names, split as test_probe
"""

import dataclasses
import difflib
import functools
import pathlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from xclip_jax.data import demo
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.errors import BadSample, UserError, describe, one_of
from xclip_jax.evaluators import classification, file_datasets, zeroshot_datasets
from xclip_jax.evaluators.base import Evaluator, Layout
from xclip_jax.evaluators.classification import Finetuned, LabelledSet
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.evaluators.probe import Probe, ProbeSet, Sweep
from xclip_jax.evaluators.prompts import PROFILES, Profile
from xclip_jax.evaluators.provenance import SHIFTED, VALIDATION, Card, digest
from xclip_jax.evaluators.result import Result
from xclip_jax.evaluators.retrieval import Retrieval, RetrievalSet
from xclip_jax.evaluators.text import Similarity, SimilaritySet, TextRetrieval, TextRetrievalSet
from xclip_jax.evaluators.zeroshot import ZeroShot, ZeroShotSet
from xclip_jax.metrics import say

Record = dict[str, Any]
AnySet = ZeroShotSet | RetrievalSet | ProbeSet | SimilaritySet | TextRetrievalSet | LabelledSet
Maker = Callable[[str, Preprocessing, str | None], AnySet]

_UNCATEGORISED = {"flags": "Flags"}  # the newest flags are missing from the table of categories
_SWEEP = Sweep(halvings=0, tolerance=1e-4)  # of the demo, where seconds matter: coarse, from 1e-6 to 1e6
_TRIED = 8  # images of a set that `open_all` decodes
_SAID = 3  # unreadable images that `measure` names


def load(
    spec: str, prepare: Preprocessing | int, data_dir: str | None = None, profile: Profile = PROFILES["openai"]
) -> AnySet:
    """The set named `spec`, its images square and uint8.

    Args:
      spec: one of `SETS`, or what `zeroshot_datasets` and `file_datasets` read.
      prepare: how the model wants its images; a number for CLIP's way, at that size.
      data_dir: root of TFDS data sets, None (or "") for the default; the demo's is prepared there on first use.
      profile: protocol of the published sets.

    Raises:
      UserError: an unknown `spec`; the message has those that are spelled like it.
    """
    check(spec)
    if spec in SETS:
        return SETS[spec](spec, Profile().preprocessing(prepare), data_dir or None)
    reader = zeroshot_datasets
    if spec.startswith(classification.PREFIX):
        reader = classification
    elif file_datasets.check(spec):
        reader = file_datasets
    return reader.load(spec, prepare, data_dir or None, profile)


def check(spec: str, others: Sequence[str] = ()) -> None:
    """Raises `UserError` unless `load` knows `spec`; the message has the names nearest to it, of `others` too."""
    if (
        spec.startswith(classification.PREFIX)
        or zeroshot_datasets.check(spec)
        or file_datasets.check(spec)
        or spec in SETS
    ):
        return
    probe = next((prefix for prefix in ("probe/", "fewshot/") if spec.startswith(prefix)), "")
    known = zeroshot_datasets.ENTRIES if probe else dict.fromkeys([*others, *_PLAIN, *_AT_PATH])
    near = difflib.get_close_matches(spec.removeprefix(probe).partition("@")[0], known, n=3)
    meant = [probe + name + ("" if name in (*_PLAIN, *others) else "@PATH") for name in near]
    hint = f"; did you mean {' or '.join(map(repr, meant))}?" if meant else "."
    raise UserError(
        f"unknown evaluation set {spec!r}{hint} python -m xclip_jax.evaluate --help lists the names; own images are "
        "folder:PATH, csv:PATH or probe/folder:PATH."
    )


def listing() -> str:
    """All names that `load` knows, for people to read."""
    lines = (
        f"suites: {', '.join(SUITES)}",
        f"sets: {', '.join(_PLAIN)}",
        f"sets in files, NAME@PATH: {', '.join(_AT_PATH)}",
        "own data: folder:PATH, one sub-folder a class; csv:PATH, with the columns path and label",
        "probes: probe/NAME, fewshot/NAME, probe/folder:PATH; of a fine-tuned model: finetuned/SOURCE",
    )
    return "\n".join(textwrap.fill(line, 118, subsequent_indent="  ", break_on_hyphens=False) for line in lines)


def split(suite: str) -> list[str]:
    """Names of sets joined by commas; a name whose path exists, commas and all, stands for itself."""
    paths = [pathlib.Path(suite.partition(mark)[2]) for mark in "@:"]
    # In finetuned/glue:TASK@PATH/SPLIT the split is behind the path.
    if any("," in str(path) and path.exists() for whole in paths for path in (whole, whole.parent)):
        return [suite]
    return [name for name in map(str.strip, suite.split(",")) if name]


def profile(name: str) -> Profile:
    """The profile `name`; an unknown one raises `UserError`."""
    one_of("--profile", name, PROFILES)
    return PROFILES[name]


@functools.lru_cache(maxsize=16)
def _emoji(split: str, prepare: Preprocessing, data_dir: str | None) -> tuple[list[np.ndarray], list[Record]]:
    """Images and the rest of the records of a split; kept, because several sets look at the same pictures."""
    builder = demo.prepare(data_dir)
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    images, records = [], []
    for record in (source[i] for i in range(len(source))):
        images.append(prepare(record.pop("image")))
        records.append({key: _text(value) for key, value in record.items()})
    return images, records


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else [item.decode() for item in value]


def _classify(
    name: str,
    prepare: Preprocessing,
    data_dir: str | None,
    *,
    split: str,
    prompts: Callable[[Record], list[str]] | None = None,
    role: str = "",
    group: str = "",
    all_names: bool = False,
) -> ZeroShotSet:
    """The images of `split` among the names of concepts.

    Args:
      name, prepare, data_dir: as in `load`.
      split: of the demo's data set.
      prompts: texts of a concept; by default its name alone.
      role: only concepts of this role, as images and as names.
      group: only concepts of this group, as images and, unless `all_names`, as names.
      all_names: see `group`.
    """
    concepts = {c["id"]: c for c in demo.concepts(demo.prepare(data_dir)) if role in ("", c["role"])}
    classes = {i: c for i, c in concepts.items() if all_names or group in ("", c["group"])}
    images, records = _emoji(split, prepare, data_dir)
    if role or group:
        keep = [i for i, r in enumerate(records) if r["concept"] in concepts and group in ("", r["group"])]
        images, records = [images[i] for i in keep], [records[i] for i in keep]
    index = {concept: i for i, concept in enumerate(classes)}
    vendors = np.array([r["vendor"] for r in records])
    return ZeroShotSet(
        name,
        images,
        np.array([index[r["concept"]] for r in records]),
        [prompts(c) if prompts else [c["name"]] for c in classes.values()],
        {str(v): vendors == v for v in np.unique(vendors)} if len(set(vendors)) > 1 else {},
        [c["name"] for c in classes.values()],
        _card(
            split,
            [(r["vendor"], r["concept"]) for r in records],
            [c["name"] for c in classes.values()],
            protocol="nearest class text by cosine, mean over artists",
            preprocessing=prepare.resizing,
            templates={_prompts: "name and three tags in turn, each tag", _one_prompt: "name and three tags"}.get(
                prompts, "name"
            ),
        ),
        [c["category"] or _UNCATEGORISED.get(c["group"], "Other") for c in classes.values()],
    )


def _card(split: str, *items: list[Any], **fields: str) -> Card:
    role = VALIDATION if split.startswith("validation") else SHIFTED if split == "test_line" else ""
    items_hash = digest(x for part in items for x in part)
    return Card("emoji_pairs", str(demo.EmojiPairs.VERSION), split, items_hash, role=role, **fields)


def _retrieve(name: str, prepare: Preprocessing, data_dir: str | None, *, split: str) -> RetrievalSet:
    images, records = _emoji(split, prepare, data_dir)
    captions = [[r["name"], *r["aliases"]] for r in records]
    card = _card(
        split, captions, protocol="recall, any match", preprocessing=prepare.resizing, metric="image_to_text/r1"
    )
    return RetrievalSet(name, images, captions, card)


_ROLES = ("train", "validation_concepts", "test_concepts")  # of concepts, and the splits with their pictures


def _probe(name: str, prepare: Preprocessing, data_dir: str | None) -> ProbeSet:
    """Pictures of known concepts to learn categories from, of unknown ones to choose C and to test.

    To save time one picture of each known concept is learned from, by the artists in turn.
    """
    parts = [_emoji(split, prepare, data_dir) for split in _ROLES]
    # The newest flags are missing from the table of categories.
    kept = [[i for i, r in enumerate(records) if r["category"]] for _, records in parts]
    drawings: dict[str, list[int]] = {}
    for i in kept[0]:
        drawings.setdefault(parts[0][1][i]["concept"], []).append(i)
    kept[0] = sorted(found[turn % len(found)] for turn, (_, found) in enumerate(sorted(drawings.items())))
    images = [[pictures[i] for i in keep] for (pictures, _), keep in zip(parts, kept, strict=True)]
    records = [[found[i] for i in keep] for (_, found), keep in zip(parts, kept, strict=True)]
    card = _card(
        "+".join(_ROLES),
        [(r["vendor"], r["concept"], r["subcategory"]) for part in records for r in part],
        protocol="linear probe (L-BFGS, C of 7 on validation) and 20 neighbours (T 0.07) on features before projection",
        preprocessing=prepare.resizing,
        metric="category/linear/top1",
    )
    tasks = {task: _index([[r[task] for r in part] for part in records]) for task in ("category", "subcategory")}
    return ProbeSet(name, *images, tasks, sweep=_SWEEP, card=card)


def _index(words: list[list[str]]) -> tuple[np.ndarray, ...]:
    """Labels of each part's words, numbered in alphabetical order of the first part's."""
    number = {word: i for i, word in enumerate(sorted(set(words[0])))}
    return tuple(np.array([number[word] for word in part], int) for part in words)


def _text_probe(name: str, prepare: Preprocessing, data_dir: str | None) -> ProbeSet:
    del prepare
    known = [c for c in demo.concepts(demo.prepare(data_dir)) if c["category"]]
    parts = [[c for c in known if c["role"] == role] for role in _ROLES]
    names = [[c["name"] for c in part] for part in parts]
    card = _card(
        "+".join(_ROLES),
        [(c["name"], c["category"]) for part in parts for c in part],
        protocol="linear probe (L-BFGS, C of 7 on validation) on text features before projection",
        metric="linear/top1",
    )
    tasks = {"": _index([[c["category"] for c in part] for part in parts])}
    return ProbeSet(name, *names, tasks, sweep=_SWEEP, neighbours=False, card=card)


def _same_meaning(
    name: str, prepare: Preprocessing, data_dir: str | None, *, keys: tuple[str, ...]
) -> TextRetrievalSet:
    """Names of the test concepts and what else each is called at `keys`; what is spelt like the name asks nothing."""
    del prepare
    concepts = [c for c in demo.concepts(demo.prepare(data_dir)) if c["role"] == "test_concepts"]
    found = []
    for key in keys:
        for i, c in enumerate(concepts):
            words = c[key] if isinstance(c[key], list) else [c[key]]
            found += [(key, w, i) for w in words if w and w.casefold() != c["name"].casefold()]
    names, of = [c["name"] for c in concepts], np.array([key for key, *_ in found])
    queries = [(word, i) for _, word, i in found]
    card = _card(
        "test_concepts",
        names,
        queries,
        protocol="recall of names by cosine of text embeddings",
        metric="r1",
    )
    groups = {key: of == key for key in keys if key in of} if len(keys) > 1 else {}
    return TextRetrievalSet(name, names, queries, groups, card)


def _known(split: str, **options: Any) -> Maker:
    return functools.partial(_classify, split=split, **options)


def _one_prompt(concept: Record) -> list[str]:
    return [", ".join([concept["name"], *concept["tags"][:3]])]


def _prompts(concept: Record) -> list[str]:
    """Captions as training writes them: keywords behind the name, and alone."""
    name, tags = concept["name"], concept["tags"]
    turns = [tags[i:] + tags[:i] for i in range(len(tags))]
    return [", ".join([name, *turn[:3]]) for turn in turns or [[]]] + tags


def _unseen(role: str, split: str, prompts: Callable[[Record], list[str]] = _prompts) -> Maker:
    return functools.partial(_classify, split=split, role=role, prompts=prompts)


SETS: Mapping[str, Maker] = {
    "emoji/validation_concepts": _unseen("validation_concepts", "validation_concepts"),
    "emoji/test_concepts": _unseen("test_concepts", "test_concepts"),
    "emoji/validation_concepts_one_prompt": _unseen("validation_concepts", "validation_concepts", _one_prompt),
    "emoji/test_concepts_one_prompt": _unseen("test_concepts", "test_concepts", _one_prompt),
    "emoji/validation_rendering": _known("validation_rendering"),
    "emoji/test_rendering": _known("test_rendering"),
    "emoji/test_rendering_flags": _known("test_rendering", group="flags"),
    "emoji/test_rendering_animals_food": _known("test_rendering", group="animals_food"),
    "emoji/test_rendering_rest": _known("test_rendering", group="rest"),
    "emoji/test_rendering_flags_all_names": _known("test_rendering", group="flags", all_names=True),
    "emoji/test_line": _known("test_line"),
    "emoji/test_line_concepts": _unseen("test_concepts", "test_line"),
    "emoji/validation_retrieval": functools.partial(_retrieve, split="validation_rendering"),
    "emoji/test_retrieval": functools.partial(_retrieve, split="test_rendering"),
    "emoji/test_probe": _probe,
    "emoji/test_aliases": functools.partial(_same_meaning, keys=("aliases",)),
    "emoji/test_translations": functools.partial(_same_meaning, keys=demo.LANGUAGES),
    "emoji/test_text_probe": _text_probe,
}


SUITES: Mapping[str, tuple[str, ...]] = {
    "demo": tuple(name for name in SETS if name.startswith("emoji/test_")),
    "paper": (*zeroshot_datasets.PAPER, "coco_retrieval"),
}


_PLAIN = tuple(dict.fromkeys([*SETS, *zeroshot_datasets.PAPER, *file_datasets.IN_TFDS]))
_AT_PATH = tuple(
    dict.fromkeys([*zeroshot_datasets.ENTRIES, *file_datasets.READERS, *file_datasets.RETRIEVAL, *file_datasets.GLUE])
)


def make(spec: str, encoder: Encoder, data_dir: str | None = None, profile: Profile = PROFILES["openai"]) -> Evaluator:
    """The evaluator of the set named `spec`; arguments and errors are those of `load`."""
    return evaluator(encoder, load(spec, encoder.preprocessing, data_dir, profile))


def open_all(
    specs: Sequence[str], encoder: Encoder, data_dir: str | None = None, profile: Profile = PROFILES["openai"]
) -> list[Evaluator]:
    """The evaluators of all of `specs`, without running the model: what is wrong with any shows before the first one.

    Args:
      specs: names of sets.
      encoder, data_dir, profile: as in `make`.

    Raises:
      UserError: sets that are unknown, missing or damaged, or of which none of some images can be decoded; one line for
        each set.
    """
    evaluators, faults = [], []
    for spec in specs:
        try:
            evaluators.append(make(spec, encoder, data_dir, profile))
            _try_images(evaluators[-1].data)
        except (UserError, OSError) as error:
            named = str(error).startswith((spec, f"{spec.partition('@')[0]}:")) or repr(spec) in str(error)
            faults.append(("" if named else f"{spec}: ") + describe(error))
        except Exception as error:
            error.add_note(f"in evaluation set {spec}")
            raise
    if len(faults) > 1:
        raise UserError("\n  ".join([f"{len(faults)} of {len(specs)} evaluation sets cannot be opened:", *faults]))
    if faults:
        raise UserError(faults[0])
    return evaluators


def _try_images(data: AnySet) -> None:
    """Decodes a few images of each part of a set; raises `UserError` where none of them can be."""
    for part in ("images", "items", "train", "validation", "test"):
        images = getattr(data, part, ())
        indices = np.unique(np.linspace(0, len(images) - 1, _TRIED).astype(int)) if len(images) else []
        errors = []
        for i in indices:
            try:
                images[i]
            except BadSample as error:
                errors.append(error)
        if errors and len(errors) == len(indices):
            raise UserError(f"{data.name}: images cannot be read; of {len(errors)} none was: {describe(errors[0])}")


def measure(evaluator: Evaluator, variables: Any) -> list[Result]:
    """The results of an evaluator, one of them the headline, and how many images could not be read: "unreadable".

    Such images count as wrong, or teach a probe nothing. The first few are named in the log. An exception says in which
    evaluator it was raised.
    """
    encoder = evaluator.encoder
    encoder.unreadable.clear()
    try:
        results = evaluator.measure(variables)
    except Exception as error:
        error.add_note(f"in evaluator {evaluator.name}")
        raise
    if results and not any(result.headline for result in results):
        results = [dataclasses.replace(results[0], headline=True), *results[1:]]
    if encoder.unreadable:
        first = [reason or f"image {i}" for i, reason in sorted(encoder.unreadable.items())[:_SAID]]
        more = f"; and {len(encoder.unreadable) - _SAID} more" if len(encoder.unreadable) > _SAID else ""
        say(f"WARNING: {evaluator.name}: {len(encoder.unreadable)} unreadable images: {'; '.join(first)}{more}")
        results = [*results, evaluator.count("unreadable", len(encoder.unreadable))]
    return results


EVALUATORS: Mapping[str, type[Evaluator]] = {
    "zeroshot": ZeroShot,
    "retrieval": Retrieval,
    "probe": Probe,
    "classifier": Finetuned,
    "text_retrieval": TextRetrieval,
    "similarity": Similarity,
}


def layouts() -> list[Layout]:
    """The tables of all evaluators, in the order in which they are shown."""
    return [layout for evaluator in EVALUATORS.values() for layout in evaluator.layouts]


def evaluator(encoder: Encoder, data: Any) -> Evaluator:
    """The evaluator that a set names: one of `EVALUATORS`, or "package.module:Class"."""
    return EVALUATORS[data.evaluator](encoder, data)
