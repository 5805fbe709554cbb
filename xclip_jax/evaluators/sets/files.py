"""Texts and captions in their published layout, NAME@PATH; COCO also from TFDS, NAME; see docs/evaluate.md."""

import csv
import dataclasses
import gzip
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from xclip_jax.data.base import field, join_surrogates
from xclip_jax.data.config import DataConfig
from xclip_jax.data.labelled import Paths
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.readers import glue as tasks
from xclip_jax.data.readers.tfds import lookup, open_tfds
from xclip_jax.evaluators.base import SetKind
from xclip_jax.evaluators.probe import ProbeSet, Sweep
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.results import Provenance, contents, digest
from xclip_jax.evaluators.retrieval import Pair, RetrievalSet, SimilaritySet
from xclip_jax.evaluators.sets.custom import captioned, published_layout, read_json

# SentEval's tasks without splits: files of class 0 and class 1, one sentence per line.
_TWO_FILES = {
    "mr": ("rt-polarity.neg", "rt-polarity.pos"),
    "cr": ("custrev.neg", "custrev.pos"),
    "subj": ("subj.subjective", "subj.objective"),
    "mpqa": ("mpqa.neg", "mpqa.pos"),
}
# SentEval's values of C: larger ones if chosen by folds. A development split only chooses, without a fit on it.
_SWEEP = Sweep(tuple(2.0**e for e in range(-2, 4)), halvings=0, refit=False)
_SWEEP_BY_FOLDS = Sweep(tuple(2.0**e for e in range(-1, 6)), halvings=0)
_FOLDS = 10


def _lines(path: pathlib.Path) -> list[str]:
    """Return the lines of a file except blank ones."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:  # in the oldest data sets
        text = data.decode("latin-1")
    # splitlines() would also break at separators within sentences.
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def _rows(path: pathlib.Path) -> list[dict[str, str]]:
    """Return the rows of a tab-separated file with a header; quotes belong to the sentences."""
    return list(csv.DictReader(_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE))


def sts(name: str, path: pathlib.Path) -> SimilaritySet:
    """Read a year of STS; pairs without a rating (an empty line) are left out."""
    subsets: dict[str, list[Pair]] = {}
    for file in sorted(path.glob("STS.input.*.txt")):
        subset = file.name.removeprefix("STS.input.").removesuffix(".txt")
        ratings = file.with_name(f"STS.gs.{subset}.txt").read_text().splitlines()
        rated = zip([line.split("\t") for line in _lines(file)], ratings, strict=True)
        subsets[subset] = [(text[0], text[1], float(rating)) for text, rating in rated if rating.strip()]
    return _similarity(f"{name}@{path}", path.name, subsets)


def sts_benchmark(name: str, path: pathlib.Path) -> SimilaritySet:
    """Read STS-B's sts-test.csv or sts-dev.csv: genre, file, year, number, score, sentence, sentence, tab-separated."""
    rows = [line.split("\t") for line in _lines(path)]
    return _similarity(f"{name}@{path}", path.name, {"": [(row[5], row[6], float(row[4])) for row in rows]})


def sick(name: str, path: pathlib.Path) -> SimilaritySet:
    """Read SICK-R's SICK_test_annotated.txt."""
    pairs = [(row["sentence_A"], row["sentence_B"], float(row["relatedness_score"])) for row in _rows(path)]
    return _similarity(f"{name}@{path}", path.name, {"": pairs})


def _similarity(spec: str, split: str, subsets: Mapping[str, Sequence[Pair]], split_hash: str = "") -> SimilaritySet:
    ratings = {rating for pairs in subsets.values() for *_, rating in pairs}
    if len(ratings) < 2 or not all(map(math.isfinite, ratings)):
        raise ValueError("it needs two different similarities, all of them numbers")
    name = spec.partition("@")[0]
    card = Provenance(
        data=name,
        split=split,
        split_hash=split_hash or digest([name, *subsets.values()]),
        metric="spearman_all",
        protocol="cosine, no training; Spearman over all pairs (spearman_all); spearman_mean averages the subsets",
    )
    return SimilaritySet(spec, subsets, card)


def senteval(name: str, path: pathlib.Path) -> ProbeSet:
    """Read a SentEval task: one file per class, cross-validated, or one file per split."""
    if name in _TWO_FILES:
        rows = [(line, label) for label, file in enumerate(_TWO_FILES[name]) for line in _lines(path / file)]
        parts = [rows, [], []]
        how = "nested, stratified ten-fold cross-validation"
    else:
        parts = [_read_split(name, path / file) for file in _SPLIT_FILES[name]]
        how = "own splits"
        empty = [file for file, part in zip(_SPLIT_FILES[name], parts, strict=True) if not part]
        if empty:
            raise ValueError(f"{empty[0]} has no items; get it again")
    if len({label for _, label in parts[0]}) < 2:
        raise ValueError("it has items of one class only; get it again")
    if len(parts) == 2:
        parts.insert(1, [])
        how += ", C by ten folds of the training items"
    _, validation, test = parts
    classes = sorted({label for _, label in parts[0]})
    items = tuple([item for item, _ in part] for part in parts)
    labels = tuple(np.array([classes.index(label) for _, label in part], int) for part in parts)
    pairs = "difference" if isinstance(items[0][0], tuple) else ""
    features = "[|u - v|, u v] of text features before projection" if pairs else "text features before projection"
    sweep = _SWEEP if validation or not test else _SWEEP_BY_FOLDS
    card = Provenance(
        data=name,
        split_hash=digest([*(item for part in items for item in part), *(part.tolist() for part in labels)]),
        metric="linear/top1",
        protocol=f"logistic regression on {features}, C of {sweep.coarse[0]:g}..{sweep.coarse[-1]:g}; {how}",
    )
    folds = 0 if validation else _FOLDS
    spec = f"{name}@{path}"
    return ProbeSet(spec, *items, {"": labels}, sweep, neighbours=False, pairs=pairs, folds=folds, card=card)


def _read_split(name: str, path: pathlib.Path) -> list[tuple[Any, Any]]:
    if name == "sicke":
        return [((row["sentence_A"], row["sentence_B"]), row["entailment_judgment"]) for row in _rows(path)]
    lines = _lines(path)
    if name == "sst2":  # a fine film .<tab>1
        return [(text, label) for text, label in (line.rsplit("\t", 1) for line in lines)]
    if name == "sst5":  # 3 a fine film .
        return [(text, label) for label, text in (line.split(" ", 1) for line in lines)]
    if name == "trec":  # DESC:manner How did ...
        return [(line.partition(" ")[2], line.partition(":")[0]) for line in lines]
    rows = [line.lstrip("\ufeff").split("\t") for line in lines[1:]]
    return [((row[3], row[4]), row[0]) for row in rows]


_SST = [f"sentiment-{part}" for part in ("train", "dev", "test")]
_SPLIT_FILES = {
    "sst2": _SST,
    "sst5": _SST,
    "trec": ["train_5500.label", "TREC_10.label"],
    "mrpc": ["msr_paraphrase_train.txt", "msr_paraphrase_test.txt"],
    "sicke": ["SICK_train.txt", "SICK_trial.txt", "SICK_test_annotated.txt"],
}


def glue(name: str, folder: str) -> ProbeSet | SimilaritySet:
    """Read a GLUE task, tested on dev because test has no labels: a probe on frozen features, or cosines for STS-B.

    The features of two sentences u and v are [u, v, |u - v|, u v], like in GLUE's baselines.
    """
    task = name.removeprefix("glue/")
    spec = f"{name}@{folder}"
    texts, y_test = tasks.read_pairs(task, "validation", folder)
    split_hash = digest([*texts, *y_test.tolist()])
    if not tasks.TASKS[task].labels:
        pairs = {"": [(a, b, float(gold)) for (a, b), gold in zip(texts, y_test, strict=True)]}
        return _similarity(spec, "dev", pairs, split_hash)
    train, y_train = tasks.read_pairs(task, "train", folder)
    two = len(train[0]) == 2
    train, test = ([tuple(parts) if two else parts[0] for parts in split] for split in (train, texts))
    features = "[u, v, |u - v|, u v] of text features" if two else "text features"
    card = Provenance(
        data=name,
        split="dev",
        split_hash=split_hash,
        metric=f"linear/{tasks.TASKS[task].metrics[0]}",
        protocol=f"logistic regression on {features} before projection, C of 0.25..8 on a tenth of train",
        note="frozen features; published GLUE numbers are of fine-tuned towers, see configs/finetune.py",
    )
    pairs, labels = "all" if two else "", {"": (y_train, y_train[:0], y_test)}
    return ProbeSet(spec, train, [], test, labels, _SWEEP, neighbours=False, pairs=pairs, card=card)


def karpathy(name: str, path: pathlib.Path, prepare: Preprocessing, profile: Profile) -> RetrievalSet:
    """Read the test split of COCO or Flickr, {"images": [{"filename", "filepath"?, "split", "sentences"}]}.

    Images are in the JSON's folder, or in its sub-folder "filepath". All captions count unless the profile keeps fewer;
    some images of COCO have six or seven (25,010 in all).
    """
    records = [r for r in read_json(path)["images"] if r["split"] == "test"]
    captions = [[join_surrogates(s["raw"]) for s in r["sentences"]] for r in records]
    names = [r["filename"] for r in records]
    images = Paths([path.parent / r.get("filepath", "") / r["filename"] for r in records])
    # Without folders, which differ between copies.
    ids = [(name, size) for name, (_, size) in zip(names, contents(images), strict=True)]
    return captioned(f"{name}@{path}", images, captions, ids, prepare, profile, data=name, split="Karpathy test")


def xm3600(language: str, path: pathlib.Path) -> tuple[Paths, list[list[str]]]:
    """Read images and captions of Crossmodal-3600 (arXiv 2205.12522)."""
    records = [json.loads(line) for line in _lines(path / "captions.jsonl")]
    images = Paths([path / "images" / f"{record['image/key']}.jpg" for record in records])
    return images, [[join_surrogates(text) for text in record[language]["caption"]] for record in records]


def multi30k(language: str, path: pathlib.Path) -> tuple[Paths, list[list[str]]]:
    """Read the 2016 test split: five captions in English and German, one translation in French and Czech."""
    several = sorted((path / "task2" / "raw").glob(f"test_2016.*.{language}.gz"))
    files = several or [path / "task1" / "raw" / f"test_2016_flickr.{language}.gz"]
    columns = [gzip.decompress(file.read_bytes()).decode("utf-8").rstrip("\n").split("\n") for file in files]
    images = Paths([path / "images" / name for name in _lines(path / "task1/image_splits/test_2016_flickr.txt")])
    return images, [list(texts) for _, *texts in zip(images.paths, *columns, strict=True)]


def _photographs(folder: pathlib.Path, names: Sequence[str]) -> Paths:
    """Return the images in `images`; COCO's are in `train2014` and `val2014` if these folders exist."""

    def place(name: str) -> pathlib.Path:
        part = name.split("_")[1] if name.startswith("COCO_") else "images"
        return folder / (part if (folder / part).is_dir() else "images") / name

    return Paths([place(name) for name in names])


def xtd10(language: str, path: pathlib.Path) -> tuple[Paths, list[list[str]]]:
    """Read XTD-10 (arXiv 2012.05107): a caption of 1,000 COCO images; three languages are other authors'."""
    place = {"de": "MIC", "fr": "MIC", "jp": "STAIR"}.get(language, "XTD10")
    names = _lines(path / "XTD10" / "test_image_names.txt")
    texts = _lines(path / place / f"test_1kcaptions_{language}.txt")
    return _photographs(path, names), [[text] for _, text in zip(names, texts, strict=True)]


def xflickrco(language: str, path: pathlib.Path) -> tuple[Paths, list[list[str]]]:
    """Read xFlickr&CO (arXiv 2201.11732): a caption of 1,000 Flickr30k and 1,000 COCO images."""
    records = [json.loads(line) for line in _lines(path / "annotations" / language / "test.jsonl")]
    captions = [[join_surrogates(text) for text in record["sentences"]] for record in records]
    return _photographs(path, [record["img_path"] for record in records]), captions


def coco_captions(name: str, data_dir: str, prepare: Preprocessing, profile: Profile) -> RetrievalSet:
    """Read Karpathy's test split of COCO from TFDS."""
    source, info = open_tfds("coco_captions", "test", data_dir or None)
    records = (source[i] for i in range(len(source)))  # a list would keep gigabytes of images
    captions, ids = zip(*((lookup(r, "captions/text"), int(r["image/id"])) for r in records), strict=True)
    origin = {"data": name, "split": "test", "version": str(info.version)}
    return captioned(name, field(source, "image"), list(captions), list(ids), prepare, profile, **origin)


READERS: Mapping[str, Callable[[str, pathlib.Path], SimilaritySet | ProbeSet]] = {
    **dict.fromkeys((f"sts{year}" for year in range(12, 17)), sts),
    "stsb": sts_benchmark,
    "sickr": sick,
    **dict.fromkeys((*_TWO_FILES, *_SPLIT_FILES), senteval),
}
GLUE = tuple(f"glue/{task}" for task in tasks.TASKS)
IN_TFDS = "coco_retrieval"
RETRIEVAL = (IN_TFDS, "flickr30k_retrieval", "flickr8k_retrieval")
LANGUAGES = {"xm3600": xm3600, "multi30k": multi30k, "xtd10": xtd10, "xflickrco": xflickrco}


class FileSets(SetKind):
    """Texts and captions in their published layout, and from TFDS."""

    prefixes = (*READERS, *RETRIEVAL, *LANGUAGES, "glue")

    @classmethod
    def load(
        cls, spec: str, prepare: Preprocessing, data: DataConfig, profile: Profile
    ) -> SimilaritySet | ProbeSet | RetrievalSet:
        name, _, location = spec.partition("@")
        path = pathlib.Path(location).expanduser()
        with published_layout(name, location):
            if name in GLUE:
                return glue(name, str(path))
            family, _, language = name.partition("/")
            if family in LANGUAGES:
                images, captions = LANGUAGES[family](language, path)
                plain = dataclasses.replace(profile, prefix=profile.prefix or "")  # a profile's prefix is English
                return captioned(spec, images, captions, contents(images), prepare, plain, data=name, split="test")
            if spec == IN_TFDS:
                return coco_captions(name, data.dir, prepare, profile)
            if name in RETRIEVAL:
                return karpathy(name, path, prepare, profile)
            return READERS[name](name, path)

    @classmethod
    def knows(cls, spec: str) -> bool:
        name, _, path = spec.partition("@")
        family, _, language = name.partition("/")
        known = name in (*READERS, *RETRIEVAL, *GLUE) or (family in LANGUAGES and bool(language))
        return spec == IN_TFDS or (known and bool(path))

    @classmethod
    def shows(cls, spec: str) -> str:
        return "captions" if spec.partition("@")[0].partition("/")[0] in (*RETRIEVAL, *LANGUAGES) else ""
