"""Sets of labelled images and texts: zero-shot classification, probes, and tests of fine-tuned classifiers.

NAME, NAME@PATH, SOURCE, zeroshot/SOURCE, zeroshot/holdout[@RUN], babel/LANGUAGE@FILE, imagenet/LANGUAGE@FOLDER,
probe/NAME, probe/SOURCE, finetuned/SOURCE; NAME is in `known_sets`, and SOURCE a source of labelled items, of probes
without its split.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from xclip_jax.core import imports
from xclip_jax.core.console import log0
from xclip_jax.core.errors import UserError
from xclip_jax.data import holdout, sources
from xclip_jax.data.base import SourceOptions, choose
from xclip_jax.data.config import DataConfig
from xclip_jax.data.labelled import check_one_class
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.readers import wds
from xclip_jax.evaluators import prompts
from xclip_jax.evaluators.base import SetKind, is_holdout, joined, pictures
from xclip_jax.evaluators.encoder import MAX_UNREADABLE
from xclip_jax.evaluators.probe import ClassificationSet, ProbeSet, renumber
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.results import Provenance, contents, digest
from xclip_jax.evaluators.retrieval import RetrievalSet
from xclip_jax.evaluators.sets.custom import captioned, published_layout, read_json
from xclip_jax.evaluators.sets.known_sets import ENTRIES, PAPER, Content, Entry, read, read_tfds
from xclip_jax.evaluators.zeroshot import ZeroShotSet

PREFIX = "zeroshot/"
FINETUNED = "finetuned/"
WDS = "wds:"
BABEL = "babel/"
TRANSLATED = (BABEL, "imagenet/")
_IMAGES = [name for name in sources.SOURCES if sources.has_labels(f"{name}:x", "image")]


def read_source(
    spec: str, data_dir: str, image_column: str = SourceOptions.image_column, *, one_class: bool = False
) -> Content:
    """Open labelled images; `image_column` is their default column, `one_class` refuses several labels per image."""
    source = sources.open_labelled(spec, SourceOptions(data_dir, image_column))
    if source.key != "image" or not source.names:
        raise UserError(f"{spec}: expected images in classes, got {source.key}s; use another source.")
    if one_class:
        check_one_class(spec, source)
    data = sources.parse(spec).rest
    names = list(source.names)
    return Content(source.items, source.labels(), names, data, source.version, "", source.identity, source.templates)


def read_held_out(spec: str, data: DataConfig) -> Content:
    """Open the labelled images that `data.holdout` keeps out of a run's training."""
    names = ", ".join(data.sources)
    whole = [read_source(source, data.dir, data.image_column, one_class=True) for source in data.sources]
    classes = sorted({name for part in whole for name in part.classes})
    parts = []
    for part in whole:
        positions = holdout.selected(part.images, data.holdout)
        labels = renumber(part.labels[positions], part.classes, classes, spec)
        parts.append(dataclasses.replace(part, images=choose(part.images, positions), labels=labels))
    images = joined([part.images for part in parts])
    if not len(images):
        raise UserError(f"{spec}: none of the labelled images of {names} is held out.")
    labels = np.concatenate([part.labels for part in parts])
    identity = list(map(holdout.image_hash, images))
    return Content(images, labels, classes, names, split=f"held out, {data.holdout:g}", identity=identity)


def _babel(path: pathlib.Path, language: str) -> tuple[Sequence[int], list[str], list[str]]:
    """Read Babel-ImageNet's files (arXiv 2306.08658): numbers, names and templates of the classes with a name.

    English has OpenAI's names and templates, like the authors' code, not BabelNet's.
    """
    language = language.upper()
    numbers, names = read_json(path)[language]
    if language == "EN":
        names = prompts.published("imagenet1k")
        return range(len(names)), names, prompts.templates("openai80")
    translated = path.with_name("nllb_dist13b_prompts.json")
    texts = read_json(translated).get(language) if translated.is_file() else None
    return numbers, names, [text.replace("{}", "{c}") for text in texts or ["{}"]]


def _clip_benchmark(folder: pathlib.Path, language: str) -> tuple[Sequence[int], list[str], list[str]]:
    """Read numbers, names and templates of all classes from clip_benchmark's two files of a language."""
    kinds = ("classnames", "zeroshot_classification_templates")
    names, texts = (read_json(folder / f"{language}_{kind}.json")["imagenet1k"] for kind in kinds)
    prompts.check_templates(texts, f"{language}_{kinds[1]}.json")
    return range(1000), names, texts


def read_translated(spec: str, data_dir: str) -> tuple[Content, str]:
    """Read ImageNet with classes in another language, `babel/LANGUAGE@FILE` or `imagenet/LANGUAGE@FOLDER`.

    FILE is babel_imagenet.json, {language: [numbers of classes, names]}; the prompts, nllb_dist13b_prompts.json, may be
    next to it (default: only the name). FOLDER contains LANGUAGE_classnames.json and
    LANGUAGE_zeroshot_classification_templates.json, {"imagenet1k": [...]}. ImageNet's images are in the folder `val`
    next to these files (default: TFDS). The second result describes the prompts.
    """
    name, _, location = spec.partition("@")
    path = pathlib.Path(location).expanduser()
    reader, folder = (_babel, path.parent) if name.startswith(BABEL) else (_clip_benchmark, path)
    with published_layout(spec, location):
        numbers, classes, templates = reader(path, name.partition("/")[2])
        if len(numbers) != len(classes):
            raise ValueError(f"{len(classes)} names for {len(numbers)} classes")
    content = read(f"imagenet@{folder / 'val'}" if (folder / "val").is_dir() else "imagenet", data_dir)
    position = np.full(len(content.classes), -1)
    with published_layout(spec, location):
        position[numbers] = np.arange(len(numbers))
    kept = np.flatnonzero(position[content.labels] >= 0)
    content = dataclasses.replace(
        content,
        images=choose(content.images, kept.tolist()),
        labels=position[content.labels][kept],
        classes=classes,
        identity=[content.identity, *contents(content.images)],
        templates=templates,
    )
    return content, _described("OpenAI's" if templates == prompts.templates("openai80") else "translated", templates)


def own_set(name: str, content: Content, prepare: Preprocessing, profile: Profile) -> ZeroShotSet:
    """Return the set `name` of labelled images, with the profile's templates and class names.

    If the data set has templates, they and its names stay. Class names for unknown classes are ignored, with a warning
    if the set has none of them: they may name classes of other sets.
    """
    profile = dataclasses.replace(profile, exif_rotation=not name.startswith(WDS))
    templates = content.templates or profile.templates or "dummy"
    description = " | ".join(profile.templates) or "dummy (1)"
    words: list[Any] = [profile.names.get(label, prompts.spaced(label)) for label in content.classes]
    if content.templates:
        prompts.check_templates(content.templates, f"{name}: {wds.TEMPLATES if name.startswith(WDS) else 'templates'}")
        description = _described("the data set's", content.templates)
        words = content.classes
    elif profile.names:
        if set(profile.names) & set(content.classes):
            description += f"; own names {digest(words)}"
        else:
            log0(
                f"WARNING: {name}: none of the class names, such as {min(profile.names)!r}, is among its "
                f"{len(content.classes)} classes, such as {content.classes[0]!r}; its labels are used"
            )
    entry = Entry(metric="map" if np.ndim(content.labels) == 2 else "top1")
    texts = prompts.prompts(words, templates)
    return _make(name, content, entry, texts, description, profile.preprocessing(prepare))


def _described(authors: str, templates: Sequence[str]) -> str:
    """Describe a set's templates, with a digest so that --compare refuses results from edited ones."""
    return f"{authors} ({len(templates)}) {digest(templates)}"


def _make(
    spec: str, content: Content, entry: Entry, texts: list[list[str]], templates: str, prepare: Preprocessing
) -> ZeroShotSet:
    labels = np.asarray(content.labels).tolist()
    card = Provenance(
        data=content.data,
        version=content.version,
        split=content.split,
        split_hash=digest([content.identity, *labels, *content.classes, *contents(content.images)]),
        protocol="mean of normalised prompts, normalised again; cosine; equal scores go to the lowest class",
        templates=templates,
        preprocessing=prepare.resizing,
        metric=entry.metric,
        note=entry.note,
        role=entry.role,
    )
    images = pictures(content.images, prepare)
    return ZeroShotSet(spec, images, content.labels, texts, names=content.classes, card=card)


def _read_splits(spec: str, data_dir: str) -> tuple[Entry, list[Content], Any]:
    """Return the entry, two or three splits (training, validation, test), and their identity for the hash."""
    name = spec.partition("/")[2]
    if sources.has_labels(name, "image"):
        source = sources.parse(name)
        has_validation = source.kind.has_split(source.rest, "validation", SourceOptions(data_dir))
        splits = ("train", *["validation"] * has_validation, "test")
        parts = [read_source(f"{name}/{split}", data_dir, one_class=True) for split in splits]
        parts = [dataclasses.replace(part, data=source.rest, split="test") for part in parts]
        identities = [part.identity for part in parts]
        return Entry(), parts, identities if any(identities) else ""
    entry = ENTRIES[name]
    if not (entry.tfds and entry.train):
        raise UserError(f"{name} has no training split for probes in TFDS; write probe/folder:PATH (train and test).")
    splits = (entry.train, *[entry.held] * bool(entry.held), entry.split)
    parts = [read_tfds(entry, split, data_dir) for split in splits]
    return entry, parts, [parts[0].data, parts[0].version, *splits]


def _numbered_alike(spec: str, splits: Sequence[Content]) -> list[Content]:
    """Number the classes of all splits like those of the training images, and further classes after them.

    No probe predicts a class without training and validation images: test images of it count as wrong, and a warning
    names it. `UserError` if more than `MAX_UNREADABLE` of the test images have classes that training does not name.
    """
    known = splits[0].classes
    used = {part.classes[label] for part in splits for label in np.unique(part.labels)}
    classes = [*known, *sorted(used - set(known))]
    *fitted, test = [dataclasses.replace(x, labels=renumber(x.labels, x.classes, classes, spec)) for x in splits]
    lacking = ~np.isin(test.labels, np.concatenate([part.labels for part in fitted]))
    if lacking.any():
        named = ", ".join(repr(classes[label]) for label in np.unique(test.labels[lacking])[:20])
        fault = f"{spec}: {lacking.sum():,} of {len(lacking):,} test images have classes that training lacks: {named}"
        if np.mean(lacking & (test.labels >= len(known))) > MAX_UNREADABLE:
            raise UserError(f"{fault}; add such images to the training split, or leave these classes out.")
        log0(f"WARNING: {fault}; they count as wrong")
    return [*fitted, test]


class ClassSets(SetKind):
    """`NAME` and `NAME@PATH` of the table, `SOURCE` or `zeroshot/SOURCE`, and held-out images."""

    prefixes = (*ENTRIES, *_IMAGES, PREFIX.rstrip("/"), BABEL.rstrip("/"))
    suites: ClassVar = {"paper": (*PAPER, "coco_retrieval")}

    @classmethod
    def load(cls, spec: str, prepare: Preprocessing, data: DataConfig, profile: Profile) -> ZeroShotSet | RetrievalSet:
        if cls.shows(spec) == "captions":
            split = wds.locate(spec.removeprefix(WDS))
            images, captions = wds.open_captions(split)
            origin = {"data": spec.removeprefix(WDS), "split": split.name, "version": split.version}
            return captioned(spec, images, captions, list(images.sizes()), prepare, profile, **origin)
        name = spec.removeprefix(PREFIX)
        if is_holdout(spec):
            with imports.named_by("the config of the run that holds them out"):
                return own_set(name, read_held_out(spec, data), prepare, profile)
        if sources.has_labels(name, "image"):
            return own_set(name, read_source(name, data.dir), prepare, profile)
        if name.startswith(TRANSLATED):
            content, description = read_translated(name, data.dir)
            texts = prompts.prompts(content.classes, content.templates)
            return _make(name, content, Entry(), texts, description, profile.preprocessing(prepare))
        entry = ENTRIES[name.partition("@")[0]]
        content = read(name, data.dir)
        if not entry.names:
            plain = prompts.readable if entry.readable else prompts.spaced
            content = dataclasses.replace(content, classes=list(map(plain, content.classes)))
        words: list[Any] = content.classes
        synonyms = ""
        if entry.templates == "fer2013" and profile.clips:
            words = [prompts.SYNONYMS.get(label, label) for label in words]
            synonyms = ", synonyms"
        used = prompts.chosen(entry.templates, profile)
        description = f"{used} ({len(prompts.templates(used))}{synonyms})"
        return _make(name, content, entry, prompts.prompts(words, used), description, profile.preprocessing(prepare))

    @classmethod
    def knows(cls, spec: str) -> bool:
        name, at, path = spec.removeprefix(PREFIX).partition("@")
        named = (name in ENTRIES and bool(path or not at)) or (name.startswith(TRANSLATED) and bool(path))
        return is_holdout(spec) or named or sources.has_labels(spec.removeprefix(PREFIX), "image")

    @classmethod
    def shows(cls, spec: str) -> str:
        with contextlib.suppress(UserError):  # loading the set reports the fault
            if spec.startswith(WDS) and wds.locate(spec.removeprefix(WDS), fetch=False).type == wds.CAPTIONS:
                return "captions"
        return "classes"


class ProbeSets(SetKind):
    """`probe/NAME` and `probe/SOURCE`."""

    prefixes = ("probe",)

    @classmethod
    def load(cls, spec: str, prepare: Preprocessing, data: DataConfig, profile: Profile) -> ProbeSet:
        entry, content, identity_of_splits = _read_splits(spec, data.dir)
        content = _numbered_alike(spec, content)
        first = content[0]
        if len(content) == 2:
            content.insert(1, Content([], np.array([], int), first.classes, first.data))
        metric = entry.metric if entry.metric == "mean_per_class" else "top1"
        name = spec.partition("/")[2]
        rotated = sources.has_labels(name, "image") and not name.startswith(WDS)
        prepare = dataclasses.replace(profile, exif_rotation=rotated).preprocessing(prepare)
        parts = ([part.labels.tolist(), part.classes, contents(part.images)] for part in content)
        card = Provenance(
            data=first.data,
            version=first.version,
            split=first.split,
            split_hash=digest([identity_of_splits, *parts]),
            protocol="CLIP's linear probe: features before projection, L-BFGS, C by halving on validation, fit on both",
            preprocessing=prepare.resizing,
            metric=f"linear/{metric}",
            note=entry.note,
        )
        train, validation, test = (pictures(part.images, prepare) for part in content)
        return ProbeSet(spec, train, validation, test, {"": [part.labels for part in content]}, card=card)

    @classmethod
    def knows(cls, spec: str) -> bool:
        name = spec.partition("/")[2]
        if sources.has_labels(name, "image"):
            return sources.overrides(sources.parse(name).kind, "has_split")
        return name in ENTRIES


class FinetunedSets(SetKind):
    """`finetuned/SOURCE`: labelled items for a model with a classifier."""

    prefixes = (FINETUNED.rstrip("/"),)

    @classmethod
    def load(cls, spec: str, prepare: Preprocessing, data: DataConfig, profile: Profile) -> ClassificationSet:
        source_spec = spec.removeprefix(FINETUNED)
        source = sources.open_labelled(source_spec, SourceOptions(data.dir, data.image_column))
        check_one_class(source_spec, source)
        labels = source.labels()
        images = source.key == "image"
        listed = contents(source.items) if images else source.items
        prepare = dataclasses.replace(profile, exif_rotation=True).preprocessing(prepare)
        card = Provenance(
            data=source_spec,
            version=source.version,
            split=source_spec.rpartition("/")[2],
            split_hash=digest([source.identity, *labels.tolist(), *source.names, *listed]),
            protocol="the classifier that end-to-end fine-tuning fitted",
            metric=f"finetuned/{source.metrics[0]}",
            preprocessing=prepare.resizing if images else "",
        )
        items = pictures(source.items, prepare) if images else source.items
        return ClassificationSet(spec, items, labels, len(source.names) or 1, card, tuple(source.names))

    @classmethod
    def knows(cls, spec: str) -> bool:
        return spec.startswith(FINETUNED)
