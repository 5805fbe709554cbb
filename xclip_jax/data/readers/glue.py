"""GLUE (arXiv 1804.07461): sentences and labels of its tasks, from the published files or from TFDS.

Two sentences are joined to one text with a space, as a causal tower reads them. Test labels are not public; the split
"validation" is often called dev.
"""

import csv
import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from xclip_jax.core.errors import UserError, check_choice
from xclip_jax.data.base import Form, Source, SourceKind, SourceOptions
from xclip_jax.data.labelled import Labelled
from xclip_jax.data.readers.tfds import open_tfds


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      columns: columns of the TSV files with one or two texts; CoLA's have no header, "3" is the fourth.
      label: column of the label.
      features: names of the columns in TFDS, if they differ.
      labels: labels in the files, in the order of their numbers; empty if the label is itself a number.
      metrics: metrics of the dev split, as published; the first is the one to report.
    """

    columns: tuple[str, ...]
    label: str = "label"
    features: tuple[str, ...] = ()
    labels: tuple[str, ...] = ("0", "1")
    metrics: tuple[str, ...] = ("top1",)


_MAX_INCOMPLETE = 0.01  # share of a file's rows
_ENTAILS = ("entailment", "not_entailment")
_MNLI = Task(
    ("sentence1", "sentence2"), "gold_label", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction")
)
_PAIR = ("sentence1", "sentence2")
TASKS: Mapping[str, Task] = {
    "cola": Task(("3",), "1", ("sentence",), metrics=("matthews",)),
    "sst2": Task(("sentence",)),
    "mrpc": Task(("#1 String", "#2 String"), "Quality", _PAIR, metrics=("top1", "f1")),
    "qqp": Task(("question1", "question2"), "is_duplicate", metrics=("top1", "f1")),
    "stsb": Task(_PAIR, "score", labels=(), metrics=("spearman", "pearson")),
    "mnli": _MNLI,
    "mnli_mismatched": _MNLI,
    "qnli": Task(("question", "sentence"), labels=_ENTAILS),
    "rte": Task(_PAIR, labels=_ENTAILS),
    "wnli": Task(_PAIR),
}


def _rows(path: pathlib.Path, task: Task) -> list[dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{str(path)!r} does not exist; it is a file of GLUE's published layout.")
    # Sentences contain separators at which splitlines() would break, and unpaired quotes.
    lines = [line.rstrip("\r") for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    if task.label.isdigit():
        rows = [{str(i): value for i, value in enumerate(line.split("\t"))} for line in lines]
    else:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or not {*task.columns, task.label} <= set(rows[0]):
        raise UserError(f"{str(path)!r} needs the columns {', '.join((*task.columns, task.label))}, and a row.")
    return rows


def _complete(rows: list[dict[str, str]], path: pathlib.Path, task: Task) -> list[dict[str, str]]:
    """Return the rows that have their texts and a label, and print the number of the other rows.

    A few rows of QQP lack a question or end too early, and are usually left out. Many such rows mean a damaged file.
    """
    columns = (*task.columns, task.label)
    complete = [row for row in rows if all(row.get(column) for column in columns)]
    if missing := len(rows) - len(complete):
        short = sum(any(row.get(column) is None for column in columns) for row in rows)
        message = f"{str(path)!r}: {missing:,} of {len(rows):,} rows lack a text or the label ({short:,} end too early)"
        if missing > _MAX_INCOMPLETE * len(rows):
            raise UserError(f"{message}; the file is damaged, download it again.")
        print(f"{message} and are left out", flush=True)
    return complete


def read_pairs(
    name: str, split: str, folder: str = "", data_dir: str | None = None
) -> tuple[list[list[str]], np.ndarray]:
    """Return texts and labels as `read` does, but each item's texts as a list."""
    check_choice("the GLUE task", name, TASKS)
    check_choice("the GLUE split", split, ("train", "validation"))
    task = TASKS[name]
    if not folder:
        source = f"glue/{'mnli' if split == 'train' and name.startswith('mnli') else name}"
        part = "validation_matched" if (name, split) == ("mnli", "validation") else split
        data, _ = open_tfds(source, part, data_dir)
        records = [data[i] for i in range(len(data))]
        texts = [[_text(record[key]) for key in task.features or task.columns] for record in records]
        return texts, np.array([record["label"] for record in records], np.float32 if not task.labels else np.int32)
    files = {"train": "train.tsv", "validation": "dev.tsv"}
    if name.startswith("mnli"):
        files["validation"] = "dev_mismatched.tsv" if name == "mnli_mismatched" else "dev_matched.tsv"
    path = pathlib.Path(folder) / files[split]
    rows = _complete(_rows(path, task), path, task)
    texts = [[row[column] for column in task.columns] for row in rows]
    try:
        if not task.labels:
            scores = np.array([float(row[task.label]) for row in rows], np.float32)
            if len(wrong := np.flatnonzero(~np.isfinite(scores))):
                raise ValueError(f"{rows[wrong[0]][task.label]!r} of {rows[wrong[0]]}")
            return texts, scores
        return texts, np.array([task.labels.index(row[task.label]) for row in rows], np.int32)
    except ValueError as error:
        raise UserError(f"{str(path)!r} has a label that is not of GLUE's {name} ({error}).") from error


def read(name: str, split: str, folder: str = "", data_dir: str | None = None) -> tuple[list[str], np.ndarray]:
    """Return texts and labels, int32 or fp32 (n,), of a split.

    Args:
      name: one of `TASKS`; MNLI's is the matched dev split.
      split: "train" or "validation".
      folder: folder with the task's train.tsv and dev.tsv; "" for TFDS's glue/NAME, read without TensorFlow.
      data_dir: root of TFDS data sets, None for the default.

    Raises:
      UserError: an unknown name, missing files or columns.
    """
    texts, labels = read_pairs(name, split, folder, data_dir)
    return [" ".join(parts) for parts in texts], labels


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


class GlueTasks(SourceKind):
    """`glue:TASK/SPLIT` and `glue:TASK@FOLDER/SPLIT`."""

    forms: ClassVar = {
        "glue:TASK/SPLIT": Form(labels="a task of GLUE, from TFDS"),
        "glue:TASK@FOLDER/SPLIT": Form(labels="a task of GLUE, from its published files"),
    }
    labelled_items = "text"

    @classmethod
    def open(cls, rest: str, options: SourceOptions, labels: bool = False) -> Source:
        head, _, split = rest.rpartition("/")
        task, _, folder = head.partition("@")
        if not task:
            raise UserError(f"source 'glue:{rest}' does not name a split; write {' or '.join(cls.forms)}.")
        texts, values = read(task, split, os.path.expanduser(folder), options.dir or None)
        return Labelled("text", texts, values, TASKS[task].labels, TASKS[task].metrics)
