"""Probes of the published sets: `probe/NAME` and `fewshot/NAME` learn from the training split of `zeroshot_datasets`.

With @PATH they learn from a folder that has train, test and perhaps validation, each with one sub-folder a class. A set
that is not in the table is `probe/SOURCE`, where SOURCE/train, SOURCE/test and perhaps SOURCE/validation are specs of
labelled images (`data.sources`): `probe/folder:PATH`, `probe/tfds:NAME`, `probe/package.module:Class:REST`.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from xclip_jax.core.errors import UserError
from xclip_jax.data import sources
from xclip_jax.data.base import SourceOptions
from xclip_jax.data.labelled import read_files
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators.base import Pictures, SetKind, closest
from xclip_jax.evaluators.probe import ProbeSet
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.results import Provenance, contents, digest
from xclip_jax.evaluators.sets.published_sets import ENTRIES, PAPER, Entry
from xclip_jax.evaluators.sets.zeroshot_datasets import Content, entry_of, identity, read_source, read_tfds
from xclip_jax.evaluators.sets.zeroshot_datasets import check as check_set


def _read_splits(spec: str, data_dir: str | None) -> tuple[Entry, list[Content], Any]:
    """Return the table's entry, training, perhaps validation, and test images, and what identifies those without files.

    Raises:
      UserError: a set without a training split, or that cannot be opened.
    """
    name = spec.partition("/")[2]
    if sources.has_labels(name, "image"):
        source, options = sources.parse(name), SourceOptions(data_dir or "")
        has_validation = source.kind.has_split(source.rest, "validation", options)
        splits = ("train", *["validation"] * has_validation, "test")
        parts = [read_source(f"{name}/{split}", data_dir) for split in splits]
        parts = [dataclasses.replace(part, data=source.rest, split="test") for part in parts]
        identities = [part.identity for part in parts]
        return Entry(), parts, identities if any(identities) else ""
    name, _, path = name.partition("@")
    if not path and not (ENTRIES[name].tfds and ENTRIES[name].train):
        raise UserError(f"{name} has no training split in TFDS; write {spec}@PATH, a folder with train and test.")
    _, entry, _ = entry_of(spec.partition("/")[2])
    if path:
        splits = ("train", *["validation"] * (pathlib.Path(path) / "validation").is_dir(), "test")
        read = [read_files(spec, pathlib.Path(path) / split) for split in splits]
        return entry, [Content(*part, data=path, split="test") for part in read], ""
    splits = (entry.train, *[entry.held] * bool(entry.held), entry.split)
    data = entry.tfds.partition(":")[0]
    parts = []
    for split in splits:
        images, labels, classes, version = read_tfds(name, dataclasses.replace(entry, split=split), data_dir)
        parts.append(Content(images, labels, classes, data, version, entry.split))
    return entry, parts, identity(entry, parts[0].version, *splits)


def load(spec: str, prepare: Preprocessing | int, data_dir: str | None, profile: Profile) -> ProbeSet:
    """Return the set `probe/NAME` or `fewshot/NAME`; the latter learns from 1 %, 10 % and 5 images a class too.

    Raises:
      UserError: a set that cannot be opened or has no training split, or several labels an image.
    """
    entry, content, identity_of_splits = _read_splits(spec, data_dir)
    first = content[0]
    if any(set(part.classes) - set(first.classes) for part in content) or any(
        np.ndim(part.labels) != 1 for part in content
    ):
        raise UserError(f"{spec}: the splits must have the same classes, and each image one of them.")
    # A split may lack a class.
    numbers = {name: i for i, name in enumerate(first.classes)}
    content = [
        dataclasses.replace(part, labels=np.array([numbers[name] for name in part.classes])[part.labels])
        for part in content
    ]
    if len(content) == 2:
        content.insert(1, Content([], np.array([], int), first.classes, first.data))
    metric = entry.metric if entry.metric == "mean_per_class" else "top1"
    prepare = profile.preprocessing(prepare)
    card = Provenance(
        data=first.data,
        version=first.version,
        split=first.split,
        split_hash=digest(
            [
                identity_of_splits,
                *([part.labels.tolist(), part.classes, contents(part.images)] for part in content),
            ]
        ),
        protocol="CLIP's linear probe: features before projection, L-BFGS, C by halving on validation, fit on both",
        preprocessing=prepare.resizing,
        metric=f"linear/{metric}",
        note=entry.note,
    )
    parts = ("1%", "10%", "5-shot") if spec.startswith("fewshot/") else ()
    train, validation, test = content
    return ProbeSet(
        spec,
        Pictures(train.images, prepare, entry.border),
        Pictures(validation.images, prepare, entry.border),
        Pictures(test.images, prepare, entry.border),
        {"": (train.labels, validation.labels, test.labels)},
        parts,
        card=card,
    )


class ProbeSets(SetKind):
    """`probe/NAME`, `fewshot/NAME` and `probe/SOURCE`."""

    prefixes = ("probe", "fewshot")
    usage = f"probes: probe/NAME, fewshot/NAME, {', '.join(f'probe/{spec}' for spec in sources.usage('split_specs'))}"
    load = staticmethod(load)

    @classmethod
    def knows(cls, spec: str) -> bool:
        """Whether the set is known, and a source has splits."""
        name = spec.partition("/")[2]
        if sources.has_labels(name, "image"):
            return bool(sources.parse(name).kind.split_specs)
        return bool(name) and check_set(name)

    @classmethod
    def closest(cls, spec: str) -> list[str]:
        """Names that are spelled like `spec`."""
        prefix, _, name = spec.partition("/")
        return [f"{prefix}/{near}" for near in closest(name, PAPER, ENTRIES)]
