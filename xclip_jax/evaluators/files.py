"""Sets of text and retrieval from files in their published layout: STS, SentEval, GLUE, Karpathy's captions.

`NAME@PATH` names them: `sts12@FOLDER` to `sts16@FOLDER` (STS.input.X.txt beside STS.gs.X.txt), `stsb@sts-test.csv`,
`sickr@SICK_test_annotated.txt`, `mr@FOLDER` and its like (SentEval), `glue/sst2@FOLDER` (train.tsv, dev.tsv), and
`coco_retrieval@dataset_coco.json`, `flickr30k_retrieval@dataset_flickr30k.json`, whose images lie beside the JSON or in
folders named there. `coco_retrieval` alone reads TFDS's `coco_captions`, whose test split is Karpathy's.
"""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from xclip_jax.data.labelled import Field, Paths
from xclip_jax.data.sources import lookup, open_tfds
from xclip_jax.errors import UserError
from xclip_jax.evaluators.card import Card, digest
from xclip_jax.evaluators.catalogue import Pictures
from xclip_jax.evaluators.names import Profile
from xclip_jax.evaluators.probe import ProbeSet, Sweep
from xclip_jax.evaluators.retrieval import RetrievalSet
from xclip_jax.evaluators.text import Pair, SimilaritySet

# SentEval's single-sentence tasks: files of class 0 and class 1, one sentence a line.
_SENTEVAL = {
    "mr": ("rt-polarity.neg", "rt-polarity.pos"),
    "cr": ("custrev.neg", "custrev.pos"),
    "subj": ("subj.subjective", "subj.objective"),
    "mpqa": ("mpqa.neg", "mpqa.pos"),
}
# GLUE's tasks of one sentence or two: columns of the text(s) and of the label; a file without a header has none.
_GLUE: Mapping[str, tuple[tuple[str, ...], str, str]] = {
    "cola": (("3",), "1", "linear/matthews"),
    "sst2": (("sentence",), "label", "linear/top1"),
    "mrpc": (("#1 String", "#2 String"), "Quality", "linear/top1"),
    "qqp": (("question1", "question2"), "is_duplicate", "linear/top1"),
    "qnli": (("question", "sentence"), "label", "linear/top1"),
    "rte": (("sentence1", "sentence2"), "label", "linear/top1"),
    "mnli": (("sentence1", "sentence2"), "gold_label", "linear/top1"),
}
_SWEEP = Sweep(tuple(2.0**e for e in range(-2, 4)), halvings=0)  # SentEval's C: 2^-2 to 2^3


def _lines(path: pathlib.Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"{str(path)!r} does not exist; it is a file of the published layout.")
    # Files of the nineties are Latin-1.
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    # splitlines() would also break at separators that occur within sentences.
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def _rows(path: pathlib.Path) -> list[dict[str, str]]:
    """Rows of a tab-separated file with a header; without quotes, which occur in sentences."""
    return list(csv.DictReader(_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE))


def sts(name: str, path: pathlib.Path) -> SimilaritySet:
    """A year of STS: STS.input.X.txt and STS.gs.X.txt of the folder are subset X; pairs without gold are left out.

    Raises:
      UserError: no such files, or a different number of lines.
    """
    subsets: dict[str, list[Pair]] = {}
    for file in sorted(path.glob("STS.input.*.txt")) if path.is_dir() else []:
        subset = file.name.removeprefix("STS.input.").removesuffix(".txt")
        gold_file = file.with_name(f"STS.gs.{subset}.txt")
        # Lines of the gold are empty where nobody judged the pair.
        gold = gold_file.read_text().splitlines() if gold_file.is_file() else []
        texts = [line.split("\t") for line in _lines(file)]
        if len(gold) != len(texts):
            raise UserError(f"{str(file)!r} has {len(texts)} pairs and {str(gold_file)!r} {len(gold)} lines.")
        pairs = [(a[0], a[1], float(g)) for a, g in zip(texts, gold, strict=True) if g.strip()]
        subsets[subset] = pairs
    if not subsets:
        raise UserError(f"{name}: folder {str(path)!r} holds no STS.input.*.txt; name the folder of one year.")
    return SimilaritySet(f"{name}@{path}", subsets, _similar(name, path, subsets))


def sts_benchmark(name: str, path: pathlib.Path) -> SimilaritySet:
    """STS-B's sts-test.csv or sts-dev.csv: genre, file, year, number, score, sentence, sentence, tab-separated."""
    rows = [line.split("\t") for line in _lines(path)]
    if any(len(row) < 7 for row in rows):
        raise UserError(f"{name}: {str(path)!r} must have 7 columns with tabs between them, as sts-test.csv has.")
    pairs = {"": [(row[5], row[6], float(row[4])) for row in rows]}
    return SimilaritySet(f"{name}@{path}", pairs, _similar(name, path, pairs))


def sick(name: str, path: pathlib.Path) -> SimilaritySet:
    """SICK-R: columns sentence_A, sentence_B and relatedness_score."""
    rows = _rows(path)
    if not rows or not {"sentence_A", "sentence_B", "relatedness_score"} <= set(rows[0]):
        raise UserError(f"{name}: {str(path)!r} needs the columns sentence_A, sentence_B and relatedness_score.")
    pairs = {"": [(r["sentence_A"], r["sentence_B"], float(r["relatedness_score"])) for r in rows]}
    return SimilaritySet(f"{name}@{path}", pairs, _similar(name, path, pairs))


def _similar(name: str, path: pathlib.Path, subsets: Mapping[str, Sequence[Pair]]) -> Card:
    return Card(
        data=name, split=path.name, split_hash=digest([name, *subsets.values()]), metric="spearman_all",
        protocol="cosine, no training; Spearman over all pairs (spearman_all); spearman_mean averages the subsets",
    )


def senteval(name: str, path: pathlib.Path) -> ProbeSet:
    """MR, CR, SUBJ or MPQA: a linear probe on one split by tenths (seed 0), not SentEval's ten nested folds."""
    texts, labels = [], []
    for label, file in enumerate(_SENTEVAL[name]):
        lines = _lines(path / file)
        texts += lines
        labels += [label] * len(lines)
    order = np.random.default_rng(0).permutation(len(texts))
    tenth = max(1, len(order) // 10)
    parts = (order[2 * tenth :], order[tenth : 2 * tenth], order[:tenth])
    y = np.array(labels)
    card = Card(
        data=name, split_hash=digest([*texts]), metric="linear/top1", note="one of ten folds, not the mean of ten",
        protocol="logistic regression on text features before projection, C of 2^-2..2^3 on a tenth, tested on a tenth",
    )
    return ProbeSet(
        f"{name}@{path}", *([texts[i] for i in part] for part in parts), {"": tuple(y[part] for part in parts)},
        sweep=_SWEEP, neighbours=False, card=card,
    )


def glue(name: str, path: pathlib.Path) -> ProbeSet:
    """A GLUE task from train.tsv and dev.tsv: a linear probe on frozen features, tested on dev, as test has no labels.

    Two sentences are one text with a space between them, as a causal tower reads them.
    """
    columns, key, metric = _GLUE[name.removeprefix("glue/")]
    dev = path / ("dev_matched.tsv" if name == "glue/mnli" else "dev.tsv")
    parts = []
    for file in (path / "train.tsv", dev):
        if key.isdigit():  # CoLA has no header
            rows = [dict(enumerate(line.split("\t"))) for line in _lines(file)]
            rows = [{str(k): v for k, v in row.items()} for row in rows]
        else:
            rows = _rows(file)
        if not rows or not {*columns, key} <= set(rows[0]):
            raise UserError(f"{name}: {str(file)!r} needs the columns {', '.join((*columns, key))}.")
        parts.append([(" ".join(row[c] or "" for c in columns), row[key]) for row in rows if row[key]])
    number = {label: i for i, label in enumerate(sorted({label for _, label in parts[0]}))}
    strange = {label for _, label in parts[1]} - set(number)
    if strange:
        raise UserError(f"{name}: label {min(strange)!r} of {str(dev)!r} is not in train.tsv.")
    train, test = ([text for text, _ in part] for part in parts)
    y_train, y_test = (np.array([number[label] for _, label in part]) for part in parts)
    card = Card(
        data=name, split="dev", split_hash=digest(parts[1]), metric=metric,
        protocol="logistic regression on text features before projection, C of 2^-2..2^3 on a tenth of train",
        note="frozen features; published GLUE numbers are of fine-tuned towers",
    )
    return ProbeSet(
        f"{name}@{path}", train, [], test, {"": (y_train, y_train[:0], y_test)}, sweep=_SWEEP, neighbours=False,
        card=card,
    )


def karpathy(name: str, path: pathlib.Path, size: int, profile: Profile, split: str = "test") -> RetrievalSet:
    """COCO or Flickr30k from Karpathy's JSON ({"images": [{"filename", "filepath"?, "split", "sentences"}]}).

    Images lie in the JSON's folder, in "filepath" there, or in a folder "images". All captions of an image count, some
    images of COCO have six or seven (25,010 in all), unless the profile keeps fewer.

    Raises:
      UserError: a file of another layout, or images that are missing.
    """
    try:
        records = [r for r in json.loads(path.read_text(encoding="utf-8"))["images"] if r["split"] == split]
        captions = [profile.texts([s["raw"] for s in r["sentences"]]) for r in records]
        places = [(r.get("filepath", ""), r["filename"]) for r in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name}: {str(path)!r} is no Karpathy JSON ({type(error).__name__}: {error}).") from error
    files = []
    for folder, file in places:
        options = [path.parent / folder / file, path.parent / file, path.parent / "images" / file]
        found = next((option for option in options if option.is_file()), None)
        if found is None:
            raise UserError(f"{name}: image {str(options[0])!r} does not exist; put the images beside the JSON.")
        files.append(found)
    card = _retrieval_card(name, f"Karpathy {split}", [file for _, file in places], captions, profile)
    return RetrievalSet(f"{name}@{path}", Pictures(Paths(files), size, profile.resample), captions, card)


def coco_captions(name: str, data_dir: str | None, size: int, profile: Profile) -> RetrievalSet:
    """Karpathy's test split of COCO out of TFDS."""
    source, info = open_tfds("coco_captions", "test", data_dir)
    records = [source[i] for i in range(len(source))]
    captions = [profile.texts(lookup(record, "captions/text")) for record in records]
    card = _retrieval_card(name, "test", [int(r["image/id"]) for r in records], captions, profile)
    pictures = Pictures(Field(source, "image"), size, profile.resample)
    return RetrievalSet(name, pictures, captions, dataclasses.replace(card, version=str(info.version)))


def _retrieval_card(name: str, split: str, ids: list[Any], captions: list[list[str]], profile: Profile) -> Card:
    kept = f"first {profile.captions}" if profile.captions else "all"
    return Card(
        data=name, split=split, split_hash=digest([*ids, *captions]),
        protocol=f"recall, any match; {kept} captions of each image{', in lower case' if profile.lower else ''}",
        templates=f"{profile.prefix}CAPTION", preprocessing=f"shorter side {profile.resample}, central crop",
        metric="image_to_text/r1",
    )


READERS: Mapping[str, Callable[[str, pathlib.Path], Any]] = {
    **{f"sts{year}": sts for year in range(12, 17)},
    "stsb": sts_benchmark,
    "sickr": sick,
    **dict.fromkeys(_SENTEVAL, senteval),
    **{f"glue/{task}": glue for task in _GLUE},
}
RETRIEVAL = ("coco_retrieval", "flickr30k_retrieval")


def check(spec: str) -> bool:
    """Whether `spec` names a set of this file; the path is not looked at."""
    name, _, path = spec.partition("@")
    return (bool(path) and (name in READERS or name in RETRIEVAL)) or spec == "coco_retrieval"


def load(spec: str, size: int, data_dir: str | None, profile: Profile) -> SimilaritySet | ProbeSet | RetrievalSet:
    """The set `spec` of the module's docstring; images at `size` pixels."""
    name, _, where = spec.partition("@")
    path = pathlib.Path(where)
    if not where:
        return coco_captions(name, data_dir, size, profile)
    if name in RETRIEVAL:
        return karpathy(name, path, size, profile)
    try:
        return READERS[name](name, path)
    except (ValueError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: {where!r} is not of the published layout ({error}).") from error

