"""Sets of texts and captions from files in their published layout, NAME@PATH, and some of them from TFDS, NAME.

sts12@FOLDER ... sts16@FOLDER       STS: STS.input.X.txt and STS.gs.X.txt for each subset X
stsb@sts-test.csv, sickr@SICK_test_annotated.txt
mr@, cr@, subj@, mpqa@, sst2@, sst5@, trec@, mrpc@, sicke@FOLDER    SentEval; `trec` reads TFDS
glue/NAME@FOLDER, glue/NAME         GLUE: train.tsv and dev.tsv, or TFDS
coco_retrieval@dataset_coco.json, flickr30k_retrieval@dataset_flickr30k.json    Karpathy's captions; the images are
                                    in the JSON's folder or in the folders that it names
coco_retrieval                      coco_captions of TFDS, whose test split is Karpathy's
"""

import csv
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from xclip_jax.core.errors import UserError
from xclip_jax.data.config import DataConfig
from xclip_jax.data.labelled import Field, Paths
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.readers import glue as tasks
from xclip_jax.data.readers.tfds import lookup, open_tfds
from xclip_jax.data.text import join_surrogates
from xclip_jax.evaluators.base import SetKind
from xclip_jax.evaluators.probe import ProbeSet, Sweep
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.results import Provenance, contents, digest
from xclip_jax.evaluators.retrieval import Pair, RetrievalSet, SimilaritySet
from xclip_jax.evaluators.sets.own import captioned

# SentEval's tasks without splits: files of class 0 and class 1, one sentence a line.
_TWO_FILES = {
    "mr": ("rt-polarity.neg", "rt-polarity.pos"),
    "cr": ("custrev.neg", "custrev.pos"),
    "subj": ("subj.subjective", "subj.objective"),
    "mpqa": ("mpqa.neg", "mpqa.pos"),
}
_SWEEP = Sweep(tuple(2.0**e for e in range(-2, 4)), halvings=0)  # SentEval's C: 2^-2 to 2^3
_FOLDS = 10
_SICK = ("sentence_A", "sentence_B", "relatedness_score")


def _lines(path: pathlib.Path) -> list[str]:
    """Return the lines of a file that are not blank."""
    if not path.is_file():
        raise UserError(f"{str(path)!r} does not exist; expected the files of the published layout.")
    # The oldest of these data sets are Latin-1.
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    # splitlines() would also break at separators that occur within sentences.
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def _rows(path: pathlib.Path) -> list[dict[str, str]]:
    """Return the rows of a tab-separated file with a header; quotes are characters of the sentences."""
    return list(csv.DictReader(_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE))


def _gold(path: pathlib.Path, line: int, text: str) -> float:
    """Return a similarity rated by people; a missing one would make the correlation undefined."""
    try:
        if math.isfinite(value := float(text)):
            return value
    except (ValueError, TypeError):
        pass
    raise UserError(f"{str(path)!r}, line {line}: the similarity is {text!r}, not a number; correct or delete it.")


def sts(name: str, path: pathlib.Path) -> SimilaritySet:
    """Read a year of STS; pairs without a rating, whose line is empty, are left out.

    Raises:
      UserError: no such files, or files of different lengths.
    """
    subsets: dict[str, list[Pair]] = {}
    for file in sorted(path.glob("STS.input.*.txt")) if path.is_dir() else []:
        subset = file.name.removeprefix("STS.input.").removesuffix(".txt")
        gold_file = file.with_name(f"STS.gs.{subset}.txt")
        gold = gold_file.read_text().splitlines() if gold_file.is_file() else []
        texts = [line.split("\t") for line in _lines(file)]
        if len(gold) != len(texts):
            raise UserError(f"{str(file)!r} has {len(texts)} pairs and {str(gold_file)!r} {len(gold)} lines.")
        rated = [(a[0], a[1], line, g) for line, (a, g) in enumerate(zip(texts, gold, strict=True), 1) if g.strip()]
        subsets[subset] = [(a, b, _gold(gold_file, line, g)) for a, b, line, g in rated]
    if not subsets:
        raise UserError(f"{name}: folder {str(path)!r} has no STS.input.*.txt; name the folder of one year.")
    return _similarity(f"{name}@{path}", path.name, subsets)


def sts_benchmark(name: str, path: pathlib.Path) -> SimilaritySet:
    """Read STS-B's sts-test.csv or sts-dev.csv: genre, file, year, number, score, sentence, sentence, tab-separated."""
    rows = [line.split("\t") for line in _lines(path)]
    if any(len(row) < 7 for row in rows):
        raise UserError(f"{name}: {str(path)!r} does not have 7 columns with tabs between them; expected sts-test.csv.")
    pairs = [(row[5], row[6], _gold(path, line, row[4])) for line, row in enumerate(rows, 1)]
    return _similarity(f"{name}@{path}", path.name, {"": pairs})


def sick(name: str, path: pathlib.Path) -> SimilaritySet:
    """Read SICK-R."""
    rows = _rows(path)
    if not rows or not set(_SICK) <= set(rows[0]):
        raise UserError(f"{name}: {str(path)!r} needs the columns {', '.join(_SICK[:2])} and {_SICK[2]}.")
    pairs = [(r[_SICK[0]], r[_SICK[1]], _gold(path, line, r[_SICK[2]])) for line, r in enumerate(rows, 2)]
    return _similarity(f"{name}@{path}", path.name, {"": pairs})


def _similarity(spec: str, split: str, subsets: Mapping[str, Sequence[Pair]]) -> SimilaritySet:
    name = spec.partition("@")[0]
    card = Provenance(
        data=name,
        split=split,
        split_hash=digest([name, *subsets.values()]),
        metric="spearman_all",
        protocol="cosine, no training; Spearman over all pairs (spearman_all); spearman_mean averages the subsets",
    )
    return SimilaritySet(spec, subsets, card)


def _senteval(spec: str, parts: Sequence[Sequence[tuple[Any, int]]], how: str) -> ProbeSet:
    """Return a probe from (text or pair of texts, label) for training and test, or training, validation and test.

    Without validation items ten folds of the training items choose C.
    """
    train, validation, test = parts if len(parts) == 3 else (parts[0], [], parts[1])
    items = tuple([item for item, _ in part] for part in (train, validation, test))
    labels = tuple(np.array([label for _, label in part], int) for part in (train, validation, test))
    pairs = "difference" if isinstance(items[0][0], tuple) else ""
    features = "[|u - v|, u v] of text features before projection" if pairs else "text features before projection"
    card = Provenance(
        data=spec.partition("@")[0],
        split_hash=digest([*(item for part in items for item in part), *(part.tolist() for part in labels)]),
        metric="linear/top1",
        protocol=f"logistic regression on {features}, C of 2^-2..2^3; {how}",
    )
    folds = 0 if validation else _FOLDS
    options: dict[str, Any] = {"sweep": _SWEEP, "neighbours": False, "pairs": pairs, "folds": folds, "card": card}
    return ProbeSet(spec, items[0], items[1], items[2], {"": labels}, **options)


def senteval(name: str, path: pathlib.Path) -> ProbeSet:
    """Read a SentEval task: two files of sentences, cross-validated as they have no splits, or a file for each split.

    Raises:
      UserError: a file that is missing, or a label without training items.
    """
    if name in _TWO_FILES:
        rows = [(line, label) for label, file in enumerate(_TWO_FILES[name]) for line in _lines(path / file)]
        return _senteval(f"{name}@{path}", [rows, []], "nested, stratified ten-fold cross-validation")
    read, files = _SPLIT_FILES[name]
    parts = [read(path / file) for file in files]
    number = {label: i for i, label in enumerate(sorted({label for _, label in parts[0]}))}
    if unknown := {label for part in parts for _, label in part} - number.keys():
        raise UserError(
            f"{name}: label {min(unknown)!r} is not a training label of {str(path / files[0])!r}; check the files."
        )
    numbered = [[(item, number[label]) for item, label in part] for part in parts]
    return _senteval(f"{name}@{path}", numbered, "own splits" if len(parts) == 3 else _C_BY_FOLDS)


def _read_sst(path: pathlib.Path) -> list[tuple[Any, str]]:
    return [(text, label) for text, label in (line.rsplit("\t", 1) for line in _lines(path))]


def _read_trec(path: pathlib.Path) -> list[tuple[Any, str]]:
    """Read lines such as "DESC:manner How did ..."; the class is the word before the colon."""
    return [(line.partition(" ")[2], line.partition(":")[0]) for line in _lines(path)]


def _read_mrpc(path: pathlib.Path) -> list[tuple[Any, str]]:
    rows = [line.lstrip("\ufeff").split("\t") for line in _lines(path)[1:]]
    return [((row[3], row[4]), row[0]) for row in rows]


def _read_sick(path: pathlib.Path) -> list[tuple[Any, str]]:
    return [((row["sentence_A"], row["sentence_B"]), row["entailment_judgment"]) for row in _rows(path)]


_C_BY_FOLDS = "own splits, C by ten folds of the training items"
_SST = [f"sentiment-{part}" for part in ("train", "dev", "test")]
_SPLIT_FILES: Mapping[str, tuple[Callable[[pathlib.Path], list[tuple[Any, str]]], list[str]]] = {
    "sst2": (_read_sst, _SST),
    "sst5": (_read_sst, _SST),
    "trec": (_read_trec, ["train_5500.label", "TREC_10.label"]),
    "mrpc": (_read_mrpc, ["msr_paraphrase_train.txt", "msr_paraphrase_test.txt"]),
    "sicke": (_read_sick, ["SICK_train.txt", "SICK_trial.txt", "SICK_test_annotated.txt"]),
}


def trec(data_dir: str | None) -> ProbeSet:
    """Read TREC from TFDS."""
    parts = []
    for split in ("train", "test"):
        source, _ = open_tfds("trec", split, data_dir)
        records = (source[i] for i in range(len(source)))
        parts.append([(lookup(record, "text")[0], int(record["label-coarse"])) for record in records])
    return _senteval("trec", parts, _C_BY_FOLDS)


def glue(name: str, folder: str, data_dir: str | None) -> ProbeSet | SimilaritySet:
    """Read a GLUE task, tested on dev because test has no labels: a probe of frozen features, or cosines for STS-B.

    The features of two sentences u and v are [u, v, |u - v|, u v], as in GLUE's baselines.
    """
    task = name.removeprefix("glue/")
    spec = f"{name}@{folder}" if folder else name
    texts, y_test = tasks.read_pairs(task, "validation", folder, data_dir)
    split_hash = digest([*texts, *y_test.tolist()])
    if not tasks.TASKS[task].labels:
        pairs = {"": [(a, b, float(gold)) for (a, b), gold in zip(texts, y_test, strict=True)]}
        data = _similarity(spec, "dev", pairs)
        return dataclasses.replace(data, card=dataclasses.replace(data.card, split_hash=split_hash))
    train, y_train = tasks.read_pairs(task, "train", folder, data_dir)
    two = len(train[0]) == 2
    train, test = ([tuple(parts) if two else parts[0] for parts in side] for side in (train, texts))
    features = "[u, v, |u - v|, u v] of text features" if two else "text features"
    card = Provenance(
        data=name,
        split="dev",
        split_hash=split_hash,
        metric=f"linear/{tasks.TASKS[task].metrics[0]}",
        protocol=f"logistic regression on {features} before projection, C of 2^-2..2^3 on a tenth of train",
        note="frozen features; published GLUE numbers are of fine-tuned towers, see configs/finetune.py",
    )
    return ProbeSet(
        spec,
        train,
        [],
        test,
        {"": (y_train, y_train[:0], y_test)},
        sweep=_SWEEP,
        neighbours=False,
        pairs="all" if two else "",
        card=card,
    )


def karpathy(name: str, path: pathlib.Path, prepare: Preprocessing | int, profile: Profile) -> RetrievalSet:
    """Read the test split of COCO or Flickr30k from {"images": [{"filename", "filepath"?, "split", "sentences"}]}.

    Images are in the JSON's folder, in its sub-folder "filepath", or in a sub-folder "images". All captions of an image
    count unless the profile keeps fewer; some images of COCO have six or seven (25,010 in all).

    Raises:
      UserError: a file in another layout, or missing images.
    """
    try:
        records = [r for r in json.loads(path.read_text(encoding="utf-8"))["images"] if r["split"] == "test"]
        captions = [[join_surrogates(s["raw"]) for s in r["sentences"]] for r in records]
        names = [(r.get("filepath", ""), r["filename"]) for r in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{name}: {str(path)!r} is not a JSON file in Karpathy's layout ({type(error).__name__}: {error})."
        ) from error
    files = []
    for folder, file in names:
        options = [path.parent / folder / file, path.parent / file, path.parent / "images" / file]
        existing = next((option for option in options if option.is_file()), None)
        if existing is None:
            raise UserError(f"{name}: image {str(options[0])!r} does not exist; put the images next to the JSON.")
        files.append(existing)
    images = Paths(files)
    # Folders of images differ between copies.
    ids = [(file, size) for (_, file), (_, size) in zip(names, contents(images), strict=True)]
    return captioned(f"{name}@{path}", images, captions, ids, prepare, profile, data=name, split="Karpathy test")


def coco_captions(name: str, data_dir: str | None, prepare: Preprocessing | int, profile: Profile) -> RetrievalSet:
    """Read Karpathy's test split of COCO from TFDS."""
    source, info = open_tfds("coco_captions", "test", data_dir)
    records = [source[i] for i in range(len(source))]
    captions, ids = [lookup(r, "captions/text") for r in records], [int(r["image/id"]) for r in records]
    origin = {"data": name, "split": "test", "version": str(info.version)}
    return captioned(name, Field(source, "image"), captions, ids, prepare, profile, **origin)


READERS: Mapping[str, Callable[[str, pathlib.Path], SimilaritySet | ProbeSet]] = {
    **dict.fromkeys((f"sts{year}" for year in range(12, 17)), sts),
    "stsb": sts_benchmark,
    "sickr": sick,
    **dict.fromkeys((*_TWO_FILES, *_SPLIT_FILES), senteval),
}
GLUE = tuple(f"glue/{task}" for task in tasks.TASKS)
IN_TFDS = ("coco_retrieval", "trec", *GLUE)
RETRIEVAL = ("coco_retrieval", "flickr30k_retrieval")


def check(spec: str) -> bool:
    """Return whether `spec` names a set of this module; the path is not checked."""
    name, _, path = spec.partition("@")
    return (bool(path) and name in (*READERS, *RETRIEVAL, *GLUE)) or spec in IN_TFDS


def load(
    spec: str, prepare: Preprocessing | int, data: DataConfig, profile: Profile
) -> SimilaritySet | ProbeSet | RetrievalSet:
    """Open the set `spec`, see the module's docstring."""
    name, _, location = spec.partition("@")
    path, data_dir = pathlib.Path(location), data.dir or None
    if name in GLUE:
        return glue(name, location, data_dir)
    if spec == "trec":
        return trec(data_dir)
    if name in RETRIEVAL:
        return karpathy(name, path, prepare, profile) if location else coco_captions(name, data_dir, prepare, profile)
    try:
        return READERS[name](name, path)
    except (ValueError, IndexError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: {location!r} is not in the published layout ({error}).") from error


class FileSets(SetKind):
    """Sets of texts and captions in their published layout, and from TFDS."""

    prefixes = tuple(dict.fromkeys([*READERS, *RETRIEVAL, "glue"]))
    names = IN_TFDS
    at_path = (*READERS, *RETRIEVAL, *GLUE)
    knows = staticmethod(check)
    load = staticmethod(load)

    @classmethod
    def shows(cls, spec: str) -> str:
        """Return "captions" for sets of captions."""
        return "captions" if spec.partition("@")[0] in RETRIEVAL else ""
