"""Probes of the published sets: `probe/NAME` and `fewshot/NAME` learn from the training split of `zeroshot_datasets`.

With @PATH they learn from a folder that has train, test and perhaps validation, each with one sub-folder a class;
`probe/folder:PATH` does so for a set that is not in the table.
"""

import dataclasses
import functools
import pathlib

import numpy as np

from xclip_jax.data.labelled import read_files
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.errors import UserError
from xclip_jax.evaluators.base import SetKind, closest
from xclip_jax.evaluators.pictures import Augmented, Pictures
from xclip_jax.evaluators.probe import ProbeSet
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.provenance import Provenance, contents, digest
from xclip_jax.evaluators.zeroshot_datasets import ENTRIES, PAPER, entry_of, identity, read_tfds
from xclip_jax.evaluators.zeroshot_datasets import check as check_set


def load(spec: str, prepare: Preprocessing | int, data_dir: str | None, profile: Profile) -> ProbeSet:
    """The set `probe/NAME` or `fewshot/NAME`; the latter learns from 1 % and 10 % and 5 a class too.

    Raises:
      UserError: as `load`; a set without a training split, or with several labels an image.
    """
    name, _, path = spec.partition("/")[2].partition("@")
    if not path and name in ENTRIES and not (ENTRIES[name].tfds and ENTRIES[name].train):
        raise UserError(f"{name} has no training split in TFDS; write {spec}@PATH, a folder with train and test.")
    name, entry, path = entry_of(spec.partition("/")[2])
    if path:
        held = (pathlib.Path(path) / "validation").is_dir()
        splits = ("train", *["validation"] * held, "test")
        read = [(*read_files(spec, pathlib.Path(path) / split), "") for split in splits]
    else:
        splits = (entry.train, *[entry.held] * bool(entry.held), entry.split)
        read = [read_tfds(name, dataclasses.replace(entry, split=split), data_dir) for split in splits]
    if any(set(part[2]) - set(read[0][2]) for part in read) or any(np.ndim(part[1]) != 1 for part in read):
        raise UserError(f"{spec}: the splits must have the same classes, and each image one of them.")
    # A split may lack a class.
    read = [(part[0], np.array([read[0][2].index(x) for x in part[2]])[part[1]], *part[2:]) for part in read]
    if len(read) == 2:
        read.insert(1, ([], np.array([], int), read[0][2], ""))
    metric = entry.metric if entry.metric == "mean_per_class" else "top1"
    sgd = profile.sgd and spec.startswith("probe/")
    prepare = profile.preprocessing(prepare)
    if sgd:
        prepare = dataclasses.replace(prepare, resize_size=round(prepare.size * 256 / 224))
    views = "crops and flips of each epoch" if profile.augment else "central crops, without its crops and flips"
    card = Provenance(
        data=path or entry.tfds.partition(":")[0],
        version=read[0][3],
        split=entry.split if not path else "test",
        split_hash=digest(
            [
                identity(entry, read[0][3], *splits) if not path else "",
                *([part[1].tolist(), part[2], contents(part[0])] for part in read),
            ]
        ),
        protocol=f"SLIP's linear probe: features before projection, SGD, 90 epochs, lr 0.00625, {views}"
        if sgd
        else "CLIP's linear probe: features before projection, L-BFGS, C by halving on validation, fit on both",
        preprocessing=prepare.resizing,
        metric=f"linear/{metric}",
        note=entry.note,
    )
    parts = ("1%", "10%", "5-shot") if spec.startswith("fewshot/") else ()
    pictures = [Pictures(part[0], prepare, entry.border) for part in read]
    learned = [image for part in read[:2] for image in (part[0],) if len(image)]
    augmented = functools.partial(Augmented, learned, prepare) if sgd and profile.augment else None
    return ProbeSet(
        spec, *pictures, {"": tuple(part[1] for part in read)}, parts, sgd=sgd, augmented=augmented, card=card
    )


class ProbeSets(SetKind):
    """`probe/NAME`, `fewshot/NAME` and `probe/folder:PATH`."""

    prefixes = ("probe", "fewshot")
    usage = "probes: probe/NAME, fewshot/NAME, probe/folder:PATH"
    load = staticmethod(load)

    @classmethod
    def knows(cls, spec: str) -> bool:
        """Whether the set is known; a CSV file has no splits, which probes need."""
        name = spec.partition("/")[2]
        return bool(name) and not name.startswith("csv:") and check_set(name)

    @classmethod
    def closest(cls, spec: str) -> list[str]:
        """Names that are spelled like `spec`."""
        prefix, _, name = spec.partition("/")
        return [f"{prefix}/{near}" for near in closest(name, PAPER, ENTRIES)]
