"""Registry of evaluation sets and evaluators: opens sets by their names and runs evaluators.

The prefix of a set's name selects a kind in `KINDS`; the prefix "package.module:Class" selects another package's
`SetKind`. A set names its evaluator: a key of `EVALUATORS`, or "package.module:Class".
"""

import collections
import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from xclip_jax.core import console
from xclip_jax.core.console import log0
from xclip_jax.core.errors import UserError, describe, redact
from xclip_jax.core.imports import LazyClassTable, class_name, import_class, is_imported
from xclip_jax.data.config import DataConfig
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators.base import Evaluator, Layout, SetKind, held_out_data
from xclip_jax.evaluators.encoder import Encoder, TooManyUnreadable
from xclip_jax.evaluators.prompts import PROFILES, Profile
from xclip_jax.evaluators.results import Result
from xclip_jax.models.two_towers import Variables

_ROOM = "xclip_jax.evaluators"
KINDS: Mapping[str, type[SetKind]] = LazyClassTable(
    SetKind,
    {
        "emoji": "xclip_jax.demo.emoji_sets:EmojiSets",
        "classes": f"{_ROOM}.sets.classification:ClassSets",
        "files": f"{_ROOM}.sets.files:FileSets",
        "pairs": f"{_ROOM}.sets.custom:PairSets",
        "choice": f"{_ROOM}.sets.choice_sets:ChoiceSets",
        "probes": f"{_ROOM}.sets.classification:ProbeSets",
        "dense": f"{_ROOM}.sets.known_sets:DenseSets",
        "finetuned": f"{_ROOM}.sets.classification:FinetunedSets",
    },
)
EVALUATORS: Mapping[str, type[Evaluator]] = LazyClassTable(
    Evaluator,
    {
        "zeroshot": f"{_ROOM}.zeroshot:ZeroShot",
        "retrieval": f"{_ROOM}.retrieval:Retrieval",
        "choice": f"{_ROOM}.choice:Choice",
        "probe": f"{_ROOM}.probe:Probe",
        "classifier": f"{_ROOM}.probe:ClassifierEvaluator",
        "text_retrieval": f"{_ROOM}.retrieval:TextRetrieval",
        "similarity": f"{_ROOM}.retrieval:SentenceSimilarity",
        "dense": f"{_ROOM}.dense:DenseProbe",
    },
)


def load(
    spec: str,
    prepare: Preprocessing | int,
    data_dir: str | None = None,
    profile: Profile = PROFILES["openai"],
    data: DataConfig | None = None,
) -> Any:
    """Open the set named `spec`, its images square and uint8.

    Args:
      spec: name of the set.
      prepare: preprocessing of the model's images; a number for CLIP's at that size.
      data_dir: root of TFDS data sets, None or "" for `data.dir`; the demo is prepared there on first use.
      profile: protocol of the published sets.
      data: group `data` of the model's run, with the columns of pairs.
    """
    kind = check(spec)
    data = held_out_data(spec, data or DataConfig())
    prepare = Preprocessing(prepare) if isinstance(prepare, int) else prepare
    return kind.load(spec, prepare, dataclasses.replace(data, dir=data_dir or data.dir), profile)


def check(spec: str) -> type[SetKind]:
    """Return the kind of the set `spec`; raise `UserError` if the name is unknown."""
    prefix = re.split("[/:@]", spec, maxsplit=1)[0]
    kind = next((kind for kind in KINDS.values() if prefix in kind.prefixes), None)
    if kind is None and (name := class_name(spec)):
        kind = import_class(name, SetKind, "evaluation set")
    if kind and kind.knows(spec):
        return kind
    raise UserError(
        f"unknown evaluation set {spec!r}. docs/evaluate.md lists the names; your own images are folder:PATH, csv:PATH "
        f"or probe/folder:PATH, your own pairs retrieval/PATH, if the path exists."
    )


def all_suites() -> dict[str, Sequence[str]]:
    """Return {suite: sets} of all kinds."""
    return {name: sets for kind in KINDS.values() for name, sets in kind.suites.items()}


def _is_known(name: str) -> bool:
    try:
        return name in all_suites() or bool(class_name(name) or check(name))
    except UserError:
        return False


def split_names(text: str) -> list[str]:
    """Split names of sets and suites joined by commas.

    A comma in braces belongs to its name, and so does one in a path or address, if no name follows.
    """
    names: list[str] = []
    for part in re.split(r",(?![^{}]*\})", text):
        longer = f"{names[-1]},{part}" if names and part.strip() else ""
        if longer and not _is_known(part.strip()) and _is_known(longer.strip()):
            names[-1] = longer
        else:
            names.append(part)
    return [name.strip() for name in names]


def expand_suites(suites: str | Sequence[str]) -> tuple[str, ...]:
    """Return the distinct sets in a sequence of sets and suites, or in a text for `split_names`."""
    named = all_suites()
    parts = split_names(suites) if isinstance(suites, str) else suites
    names = dict.fromkeys(name for part in parts for name in named.get(part, (part,)) if name)
    if not names:
        raise UserError(f"--suite is empty; it must be one of {', '.join(named)} or names of sets.")
    for name in names:
        check(name)
    return tuple(names)


def open_all(
    specs: Sequence[str],
    encoder: Encoder,
    data_dir: str | None = None,
    profile: Profile = PROFILES["openai"],
    data: DataConfig | None = None,
) -> list[Evaluator]:
    """Open the distinct sets `specs`, and return their evaluators; all faults are reported before the model runs."""
    for name, count in collections.Counter(map(redact, specs)).items():
        if count > 1:
            raise UserError(
                f"{name}: {count} sets differ only in the query of their address, which results leave out; evaluate "
                "each by a command of its own, with another --output."
            )
    evaluators = []
    faults = []
    for spec in specs:
        try:
            evaluators.append(evaluator(encoder, load(spec, encoder.preprocessing, data_dir, profile, data)))
        except (UserError, OSError) as error:
            faults.append(describe(error) if spec in str(error) else f"{spec}: {describe(error)}")
    if len(faults) > 1:
        faults.insert(0, f"{len(faults)} of {len(specs)} evaluation sets cannot be opened:")
    if faults:
        raise UserError("\n  ".join(faults))
    return evaluators


def check_class_names(names: Collection[str], evaluators: Sequence[Evaluator]) -> None:
    """Raise `UserError` if class `names` are given, the evaluators' sets have classes, and none has such a name."""
    classes = [name for evaluator in evaluators if names for name in getattr(evaluator.data, "names", ())]
    if classes and not set(names) & set(classes):
        raise UserError(
            f"none of the class names, such as {min(names)!r}, is among the classes of the sets, such as "
            f"{classes[0]!r}; correct the file of names, or add a set with such a class."
        )


def note_failure(evaluator: Evaluator, error: Exception) -> str:
    """Print that `measure` failed, and return the reason; raise `error` if other processes wait in the next set."""
    if jax.process_count() > 1 and not isinstance(error, TooManyUnreadable):
        raise error
    log0(f"{evaluator.name} failed: {type(error).__name__}: {describe(error)}")
    return describe(error)


def measure(evaluator: Evaluator, variables: Variables) -> list[Result]:
    """Run an evaluator. Exactly one result is the headline; "unreadable" counts unreadable images, if any.

    Unreadable images count as wrong, and probes are not trained on them; the log names the first three. Exceptions get
    a note with the evaluator's name.
    """
    console.report_progress()
    unreadable = evaluator.encoder.unreadable
    unreadable.clear()
    try:
        results = evaluator.measure(variables)
        if not results:
            raise UserError("`measure` returned no results; return one or more, see docs/extend.md")
    except Exception as error:
        error.add_note(f"in evaluator {evaluator.name}")
        raise
    if not any(result.headline for result in results):
        # The evaluator lacks the card's metric, such as mAP for single labels: use the first result with a unit.
        main = next((i for i, result in enumerate(results) if result.unit), 0)
        results[main] = dataclasses.replace(results[main], headline=True)
    if unreadable:
        first = [reason or f"image {i}" for i, reason in sorted(unreadable.items())[:3]]
        log0(f"WARNING: {evaluator.name}: {len(unreadable)} unreadable images, first: {'; '.join(first)}")
        results = [*results, evaluator.count("unreadable", len(unreadable))]
    return results


def _evaluator_class(name: str) -> type[Evaluator]:
    return EVALUATORS[name] if name in EVALUATORS else import_class(name, Evaluator, "evaluator")


def evaluator(encoder: Encoder, data: Any) -> Evaluator:
    """Return the evaluator of the set `data`."""
    return _evaluator_class(data.evaluator)(encoder, data)


def layouts(name: str = "") -> Sequence[Layout]:
    """Return the layouts of an evaluator's results; without a name the layouts of all `EVALUATORS`, in display order.

    An evaluator of another package has none unless it is already imported: files of results import nothing.
    """
    if not name:
        return [layout for protocol in EVALUATORS.values() for layout in protocol.layouts]
    try:
        return _evaluator_class(name).layouts if name in EVALUATORS or is_imported(name) else ()
    except UserError:
        return ()
