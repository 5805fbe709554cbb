"""Sets of texts and of captions from files in their published layout: STS, SentEval, GLUE, Karpathy's captions.

They are named `NAME@PATH`: `sts12@FOLDER` to `sts16@FOLDER` (STS.input.X.txt beside STS.gs.X.txt), `stsb@sts-test.csv`,
`sickr@SICK_test_annotated.txt`; SentEval's folders `mr@`, `cr@`, `subj@`, `mpqa@`, `sst2@`, `sst5@`, `trec@`, `mrpc@`,
`sicke@`; `glue/sst2@FOLDER` (train.tsv, dev.tsv); and `coco_retrieval@dataset_coco.json`,
`flickr30k_retrieval@dataset_flickr30k.json`, whose images are beside the JSON or in folders that it names. Without
@PATH TFDS is read: `coco_retrieval` (coco_captions, whose test split is Karpathy's), `trec`, `glue/NAME`.
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
from xclip_jax.data.labelled import Field, Paths
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.readers import glue as tasks
from xclip_jax.data.readers.tfds_source import lookup, open_tfds
from xclip_jax.data.text import join_surrogates
from xclip_jax.evaluators.base import Pictures, SetKind
from xclip_jax.evaluators.probe import ProbeSet, Sweep
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.results import Provenance, contents, digest
from xclip_jax.evaluators.retrieval import Pair, RetrievalSet, SimilaritySet

# SentEval's single-sentence tasks: files of class 0 and class 1, one sentence a line.
_SENTEVAL = {
    "mr": ("rt-polarity.neg", "rt-polarity.pos"),
    "cr": ("custrev.neg", "custrev.pos"),
    "subj": ("subj.subjective", "subj.objective"),
    "mpqa": ("mpqa.neg", "mpqa.pos"),
}
_SWEEP = Sweep(tuple(2.0**e for e in range(-2, 4)), halvings=0)  # SentEval's C: 2^-2 to 2^3
_FOLDS = 10


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
    """Return a similarity that people gave; without a number there is no correlation."""
    try:
        if math.isfinite(value := float(text)):
            return value
    except (ValueError, TypeError):
        pass
    raise UserError(f"{str(path)!r}, line {line}: the similarity is {text!r}, not a number; correct or delete it.")


def sts(name: str, path: pathlib.Path) -> SimilaritySet:
    """Read a year of STS: STS.input.X.txt and STS.gs.X.txt of the folder are subset X; pairs without gold are left out.

    Raises:
      UserError: no such files, or files of different lengths.
    """
    subsets: dict[str, list[Pair]] = {}
    for file in sorted(path.glob("STS.input.*.txt")) if path.is_dir() else []:
        subset = file.name.removeprefix("STS.input.").removesuffix(".txt")
        gold_file = file.with_name(f"STS.gs.{subset}.txt")
        # Pairs that nobody judged have an empty line.
        gold = gold_file.read_text().splitlines() if gold_file.is_file() else []
        texts = [line.split("\t") for line in _lines(file)]
        if len(gold) != len(texts):
            raise UserError(f"{str(file)!r} has {len(texts)} pairs and {str(gold_file)!r} {len(gold)} lines.")
        judged = [(a[0], a[1], line, g) for line, (a, g) in enumerate(zip(texts, gold, strict=True), 1) if g.strip()]
        subsets[subset] = [(a, b, _gold(gold_file, line, g)) for a, b, line, g in judged]
    if not subsets:
        raise UserError(f"{name}: folder {str(path)!r} has no STS.input.*.txt; name the folder of one year.")
    return SimilaritySet(f"{name}@{path}", subsets, _similar(name, path.name, subsets))


def sts_benchmark(name: str, path: pathlib.Path) -> SimilaritySet:
    """Read STS-B's sts-test.csv or sts-dev.csv: genre, file, year, number, score, sentence, sentence, tab-separated."""
    rows = [line.split("\t") for line in _lines(path)]
    if any(len(row) < 7 for row in rows):
        raise UserError(f"{name}: {str(path)!r} does not have 7 columns with tabs between them; expected sts-test.csv.")
    pairs = {"": [(row[5], row[6], _gold(path, line, row[4])) for line, row in enumerate(rows, 1)]}
    return SimilaritySet(f"{name}@{path}", pairs, _similar(name, path.name, pairs))


def sick(name: str, path: pathlib.Path) -> SimilaritySet:
    """Read SICK-R: columns sentence_A, sentence_B and relatedness_score."""
    rows = _rows(path)
    if not rows or not {"sentence_A", "sentence_B", "relatedness_score"} <= set(rows[0]):
        raise UserError(f"{name}: {str(path)!r} needs the columns sentence_A, sentence_B and relatedness_score.")
    scored = enumerate(rows, 2)  # below the header
    pairs = {"": [(r["sentence_A"], r["sentence_B"], _gold(path, i, r["relatedness_score"])) for i, r in scored]}
    return SimilaritySet(f"{name}@{path}", pairs, _similar(name, path.name, pairs))


def _similar(name: str, split: str, subsets: Mapping[str, Sequence[Pair]]) -> Provenance:
    """Return the provenance of a set of similarities."""
    return Provenance(
        data=name,
        split=split,
        split_hash=digest([name, *subsets.values()]),
        metric="spearman_all",
        protocol="cosine, no training; Spearman over all pairs (spearman_all); spearman_mean averages the subsets",
    )


def senteval(name: str, path: pathlib.Path) -> ProbeSet:
    """Read MR, CR, SUBJ or MPQA, which have no splits: nested cross-validation in ten folds."""
    texts, labels = [], []
    for label, file in enumerate(_SENTEVAL[name]):
        lines = _lines(path / file)
        texts += lines
        labels += [label] * len(lines)
    y = np.array(labels)
    return _senteval(name, path, (texts, [], []), (y, y[:0], y[:0]), "nested, stratified ten-fold cross-validation")


def _senteval(
    name: str, path: pathlib.Path | None, parts: Sequence[Sequence[Any]], labels: tuple[np.ndarray, ...], how: str
) -> ProbeSet:
    """Return a probe of SentEval: training, validation and test items; without validation items ten folds choose C."""
    pairs = "difference" if isinstance(parts[0][0], tuple) else ""
    features = "[|u - v|, u v] of text features before projection" if pairs else "text features before projection"
    card = Provenance(
        data=name,
        split_hash=digest([*(item for part in parts for item in part), *(part.tolist() for part in labels)]),
        metric="linear/top1",
        protocol=f"logistic regression on {features}, C of 2^-2..2^3; {how}",
    )
    train, validation, test = parts
    return ProbeSet(
        f"{name}@{path}" if path else name,
        train,
        validation,
        test,
        {"": labels},
        sweep=_SWEEP,
        neighbours=False,
        pairs=pairs,
        folds=0 if len(parts[1]) else _FOLDS,
        card=card,
    )


def _with_splits(
    read: Callable[[pathlib.Path], list[tuple[Any, str]]], files: Sequence[str]
) -> Callable[[str, pathlib.Path], ProbeSet]:
    """Return a reader of a SentEval task with own splits, one of `files` each: `read` gives (text or pair, label)."""

    def open_task(name: str, path: pathlib.Path) -> ProbeSet:
        parts = [read(path / file) for file in files]
        number = {label: i for i, label in enumerate(sorted({label for _, label in parts[0]}))}
        unknown = {label for part in parts for _, label in part} - set(number)
        if unknown:
            raise UserError(
                f"{name}: label {min(unknown)!r} is not a training label of {str(path / files[0])!r}; check the files."
            )
        if len(parts) == 2:
            parts.insert(1, [])
        labels = tuple(np.array([number[label] for _, label in part], int) for part in parts)
        how = "own splits" if parts[1] else "own splits, C by ten folds of the training items"
        return _senteval(name, path, [[item for item, _ in part] for part in parts], labels, how)

    return open_task


def _read_sst(path: pathlib.Path) -> list[tuple[str, str]]:
    rows = [line.rsplit("\t", 1) for line in _lines(path)]
    return [(text, label) for text, label in rows]


def _read_trec(path: pathlib.Path) -> list[tuple[str, str]]:
    """Read lines such as "DESC:manner How did ..."; the class is the word before the colon."""
    return [(line.partition(" ")[2], line.partition(":")[0]) for line in _lines(path)]


def _read_mrpc(path: pathlib.Path) -> list[tuple[tuple[str, str], str]]:
    rows = [line.lstrip("\ufeff").split("\t") for line in _lines(path)[1:]]
    return [((row[3], row[4]), row[0]) for row in rows]


def _read_sick(path: pathlib.Path) -> list[tuple[tuple[str, str], str]]:
    return [((row["sentence_A"], row["sentence_B"]), row["entailment_judgment"]) for row in _rows(path)]


_SST = [f"sentiment-{part}" for part in ("train", "dev", "test")]
_SPLITS: Mapping[str, Callable[[str, pathlib.Path], ProbeSet]] = {
    "sst2": _with_splits(_read_sst, _SST),
    "sst5": _with_splits(_read_sst, _SST),
    "trec": _with_splits(_read_trec, ["train_5500.label", "TREC_10.label"]),
    "mrpc": _with_splits(_read_mrpc, ["msr_paraphrase_train.txt", "msr_paraphrase_test.txt"]),
    "sicke": _with_splits(_read_sick, ["SICK_train.txt", "SICK_trial.txt", "SICK_test_annotated.txt"]),
}


def trec(data_dir: str | None) -> ProbeSet:
    """Read TREC from TFDS."""
    sources = [open_tfds("trec", split, data_dir)[0] for split in ("train", "test")]
    records = [[source[i] for i in range(len(source))] for source in sources]
    train, test = ([lookup(record, "text")[0] for record in part] for part in records)
    y_train, y_test = (np.array([record["label-coarse"] for record in part], int) for part in records)
    how = "own splits, C by ten folds of the training items"
    return _senteval("trec", None, (train, [], test), (y_train, y_train[:0], y_test), how)


def glue(name: str, folder: str, data_dir: str | None) -> ProbeSet | SimilaritySet:
    """Read a GLUE task, tested on dev, as test has no labels: a probe of frozen features, or for STS-B cosines.

    The features of two sentences u and v are [u, v, |u - v|, u v], as for the sentence encoders of GLUE's paper.
    """
    task = name.removeprefix("glue/")
    spec = f"{name}@{folder}" if folder else name
    texts, y_test = tasks.read_pairs(task, "validation", folder, data_dir)
    split_hash = digest([*texts, *y_test.tolist()])
    if not tasks.TASKS[task].labels:
        pairs = {"": [(a, b, float(gold)) for (a, b), gold in zip(texts, y_test, strict=True)]}
        return SimilaritySet(spec, pairs, dataclasses.replace(_similar(name, "dev", pairs), split_hash=split_hash))
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


def karpathy(
    name: str, path: pathlib.Path, prepare: Preprocessing, profile: Profile, split: str = "test"
) -> RetrievalSet:
    """Read COCO or Flickr30k from Karpathy's JSON ({"images": [{"filename", "filepath"?, "split", "sentences"}]}).

    Images are in the JSON's folder, in its sub-folder "filepath", or in a sub-folder "images". All captions of an image
    count, of which some images of COCO have six or seven (25,010 in all), unless the profile keeps fewer.

    Raises:
      UserError: a file of another layout, or images that are missing.
    """
    try:
        records = [r for r in json.loads(path.read_text(encoding="utf-8"))["images"] if r["split"] == split]
        captions = [profile.texts([join_surrogates(s["raw"]) for s in r["sentences"]]) for r in records]
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
            raise UserError(f"{name}: image {str(options[0])!r} does not exist; put the images beside the JSON.")
        files.append(existing)
    images = Paths(files)
    # Folders of images differ between copies.
    ids = [(file, size) for (_, file), (_, size) in zip(names, contents(images), strict=True)]
    card = retrieval_card(name, f"Karpathy {split}", ids, captions, prepare, profile)
    return RetrievalSet(f"{name}@{path}", Pictures(images, prepare), captions, card)


def coco_captions(name: str, data_dir: str | None, prepare: Preprocessing, profile: Profile) -> RetrievalSet:
    """Read Karpathy's test split of COCO from TFDS."""
    source, info = open_tfds("coco_captions", "test", data_dir)
    records = [source[i] for i in range(len(source))]
    captions = [profile.texts(lookup(record, "captions/text")) for record in records]
    card = retrieval_card(name, "test", [int(r["image/id"]) for r in records], captions, prepare, profile)
    pictures = Pictures(Field(source, "image"), prepare)
    return RetrievalSet(name, pictures, captions, dataclasses.replace(card, version=str(info.version)))


def retrieval_card(
    name: str, split: str, ids: list[Any], captions: list[list[str]], prepare: Preprocessing, profile: Profile
) -> Provenance:
    """Return the provenance of a set of captions."""
    kept = f"first {profile.captions}" if profile.captions else "all"
    return Provenance(
        data=name,
        split=split,
        split_hash=digest([*ids, *captions]),
        protocol=f"recall, any match; {kept} captions of each image{', in lower case' if profile.lower else ''}",
        templates=f"{profile.caption_prefix}CAPTION",
        preprocessing=prepare.resizing,
        metric="image_to_text/r1",
    )


READERS: Mapping[str, Callable[[str, pathlib.Path], Any]] = {
    **{f"sts{year}": sts for year in range(12, 17)},
    "stsb": sts_benchmark,
    "sickr": sick,
    **dict.fromkeys(_SENTEVAL, senteval),
    **_SPLITS,
}
GLUE = tuple(f"glue/{task}" for task in tasks.TASKS)
IN_TFDS = ("coco_retrieval", "trec", *GLUE)
RETRIEVAL = ("coco_retrieval", "flickr30k_retrieval")


def check(spec: str) -> bool:
    """Return whether `spec` names a set of this module; the path is not checked."""
    name, _, path = spec.partition("@")
    return (bool(path) and name in (*READERS, *RETRIEVAL, *GLUE)) or spec in IN_TFDS


def load(
    spec: str, prepare: Preprocessing | int, data_dir: str | None, profile: Profile
) -> SimilaritySet | ProbeSet | RetrievalSet:
    """Open the set `spec` of the module's docstring; images are prepared by `prepare` and the profile."""
    name, _, location = spec.partition("@")
    path = pathlib.Path(location)
    if name in GLUE:
        return glue(name, location, data_dir)
    if spec == "trec":
        return trec(data_dir)
    if not location:
        return coco_captions(name, data_dir, profile.preprocessing(prepare), profile)
    if name in RETRIEVAL:
        return karpathy(name, path, profile.preprocessing(prepare), profile)
    try:
        return READERS[name](name, path)
    except (ValueError, IndexError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: {location!r} is not in the published layout ({error}).") from error


class FileSets(SetKind):
    """Sets of texts and of captions in their published layout, and those of TFDS."""

    prefixes = tuple(dict.fromkeys([*READERS, *RETRIEVAL, "glue"]))
    names = IN_TFDS
    at_path = (*READERS, *RETRIEVAL, *GLUE)
    knows = staticmethod(check)
    load = staticmethod(load)

    @classmethod
    def shows(cls, spec: str) -> str:
        """Return "captions" for sets of captions."""
        return "captions" if spec.partition("@")[0] in RETRIEVAL else ""
