"""Evaluation sets by their names, and the evaluators that go with them: the one place to add a kind of either.

A set's name begins with one of the prefixes in `SETS`; the rest is up to its kind. "package.module:Class", with or
without more behind it, is a `SetKind` of somebody else's. Likewise a set names its evaluator: one of `EVALUATORS`, or
"package.module:Class".
"""

import dataclasses
import importlib
import pathlib
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xclip_jax.console import log0
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.errors import BadSample, UserError, describe, one_of
from xclip_jax.evaluators.base import Evaluator, Layout, SetKind, closest
from xclip_jax.evaluators.classification import ClassifierEvaluator, FinetunedSets
from xclip_jax.evaluators.emoji_sets import TESTS, EmojiSets
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.evaluators.file_datasets import FileSets
from xclip_jax.evaluators.icon_sets import IconSets
from xclip_jax.evaluators.probe import Probe
from xclip_jax.evaluators.probe_datasets import ProbeSets
from xclip_jax.evaluators.prompts import PROFILES, Profile
from xclip_jax.evaluators.result import Result
from xclip_jax.evaluators.retrieval import Retrieval
from xclip_jax.evaluators.text import Similarity, TextRetrieval
from xclip_jax.evaluators.zeroshot import ZeroShot
from xclip_jax.evaluators.zeroshot_datasets import PAPER, PublishedSets

KINDS: tuple[type[SetKind], ...] = (EmojiSets, IconSets, PublishedSets, FileSets, ProbeSets, FinetunedSets)
SETS: Mapping[str, type[SetKind]] = {prefix: kind for kind in KINDS for prefix in kind.prefixes}
EVALUATORS: Mapping[str, type[Evaluator]] = {
    "zeroshot": ZeroShot,
    "retrieval": Retrieval,
    "probe": Probe,
    "classifier": ClassifierEvaluator,
    "text_retrieval": TextRetrieval,
    "similarity": Similarity,
}
SUITES: Mapping[str, tuple[str, ...]] = {"demo": TESTS, "paper": (*PAPER, "coco_retrieval")}

_IMPORTED = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*):([A-Za-z_]\w*)")
_TRIED = 8  # images of a set that `open_all` decodes
_SAID = 3  # unreadable images that `measure` names


def load(
    spec: str, prepare: Preprocessing | int, data_dir: str | None = None, profile: Profile = PROFILES["openai"]
) -> Any:
    """The set named `spec`, its images square and uint8.

    Args:
      spec: a name that one of `SETS` knows.
      prepare: how the model wants its images; a number for CLIP's way, at that size.
      data_dir: root of TFDS data sets, None (or "") for the default; the demo's is prepared there on first use.
      profile: protocol of the published sets.

    Raises:
      UserError: an unknown `spec`; the message has those that are spelled like it.
    """
    return check(spec).load(spec, prepare, data_dir or None, profile)


def check(spec: str, others: Sequence[str] = ()) -> type[SetKind]:
    """Return the kind of the set `spec`.

    Raises:
      UserError: an unknown name; the message has the names nearest to it, of `others` too.
    """
    kind = SETS.get(re.split("[/:@]", spec, maxsplit=1)[0]) or _imported(spec, SetKind)
    if kind and kind.knows(spec):
        return kind
    near = kind.closest(spec) if kind else closest(spec, [*others, *_all("names")], _all("at_path"))
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    raise UserError(
        f"unknown evaluation set {spec!r}{hint} python -m xclip_jax.evaluate --help lists the names; own images are "
        "folder:PATH, csv:PATH or probe/folder:PATH."
    )


def _all(attribute: str) -> list[str]:
    """`names` or `at_path` of all kinds."""
    return list(dict.fromkeys(name for kind in KINDS for name in getattr(kind, attribute)))


def _imported(name: str, base: type) -> Any:
    """The class that `name` begins with, as "package.module:Class"; None where it is not of this form.

    Raises:
      UserError: a module that cannot be imported, or that lacks a `base` of this name.
    """
    match = _IMPORTED.match(name)
    if match is None:
        return None
    module, attribute = match.groups()
    try:
        value = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        # Nothing of this name is installed; a module that is, and lacks another one, has a fault of its own.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"unknown evaluation set or evaluator {name!r}: module {module!r} cannot be imported; install its package "
            "or put its folder on PYTHONPATH."
        ) from error
    if not (isinstance(value, type) and issubclass(value, base)):
        raise UserError(f"{module}:{attribute} is not a subclass of xclip_jax.evaluators.base.{base.__name__}.")
    return value


def listing() -> str:
    """All names that `load` knows, for people to read."""
    lines = (
        f"suites: {', '.join(SUITES)}",
        f"sets: {', '.join(_all('names'))}",
        f"sets in files, NAME@PATH: {', '.join(_all('at_path'))}",
        *(kind.usage for kind in KINDS if kind.usage),
        "of another package: package.module:Class",
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


def _try_images(data: Any) -> None:
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
        log0(f"WARNING: {evaluator.name}: {len(encoder.unreadable)} unreadable images: {'; '.join(first)}{more}")
        results = [*results, evaluator.count("unreadable", len(encoder.unreadable))]
    return results


def layouts() -> list[Layout]:
    """The tables of all evaluators, in the order in which they are shown."""
    return [layout for evaluator in EVALUATORS.values() for layout in evaluator.layouts]


def evaluator(encoder: Encoder, data: Any) -> Evaluator:
    """The evaluator that the set `data` names."""
    protocol = EVALUATORS.get(data.evaluator) or _imported(data.evaluator, Evaluator)
    if protocol is None:
        raise UserError(
            f"{data.name}: unknown evaluator {data.evaluator!r}; expected {', '.join(EVALUATORS)} or "
            "package.module:Class."
        )
    return protocol(encoder, data)
