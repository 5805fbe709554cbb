"""Sentences and labels of GLUE (arXiv 1804.07461) from the published files.

Sentence pairs are joined with a space. Test labels are not public; the split "validation" is often called dev.
"""

import csv
import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from xclip_jax.core import storage
from xclip_jax.core.errors import UserError, check_choice
from xclip_jax.data.base import SourceKind, SourceOptions, read_text
from xclip_jax.data.labelled import Labelled
from xclip_jax.data.readers.tfds import name_and_split


@dataclasses.dataclass(frozen=True)
class Task:
    """One task."""

    columns: tuple[str, ...]  # with the one or two texts; "3" is the fourth of CoLA's files, which have no header
    label: str = "label"  # column of the label
    labels: tuple[str, ...] = ("0", "1")  # in the files, by class number; empty if the label itself is a number
    metrics: tuple[str, ...] = ("top1",)  # published ones of the dev split; the first is reported


_ENTAILS = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
_MNLI = Task(_PAIR, "gold_label", ("entailment", "neutral", "contradiction"))
TASKS: Mapping[str, Task] = {
    "cola": Task(("3",), "1", metrics=("matthews",)),
    "sst2": Task(("sentence",)),
    "mrpc": Task(("#1 String", "#2 String"), "Quality", metrics=("top1", "f1")),
    "qqp": Task(("question1", "question2"), "is_duplicate", metrics=("top1", "f1")),
    "stsb": Task(_PAIR, "score", labels=(), metrics=("spearman", "pearson")),
    "mnli": _MNLI,
    "mnli_mismatched": _MNLI,
    "qnli": Task(("question", "sentence"), labels=_ENTAILS),
    "rte": Task(_PAIR, labels=_ENTAILS),
    "wnli": Task(_PAIR),
}


def read_pairs(name: str, split: str, folder: str) -> tuple[list[list[str]], np.ndarray]:
    """Return the one or two texts of each item in "train" or "validation", and labels, int32 or fp32 (n,).

    `folder` contains train.tsv and dev.tsv (MNLI: dev_matched.tsv, dev_mismatched.tsv).
    Incomplete rows, such as a few in QQP, are left out. `UserError` for unknown names or labels, or missing columns.
    """
    check_choice("the GLUE task", name, TASKS)
    check_choice("the GLUE split", split, ("train", "validation"))
    task = TASKS[name]
    dev = {"mnli": "dev_matched.tsv", "mnli_mismatched": "dev_mismatched.tsv"}.get(name, "dev.tsv")
    path = pathlib.Path(folder) / ("train.tsv" if split == "train" else dev)
    columns = (*task.columns, task.label)
    with storage.unreadable_as(f"{str(path)!r} is not a file of GLUE's {name}; download the task again"):
        # Sentences contain unpaired quotes, and separators at which splitlines() would break.
        lines = [line.rstrip("\r") for line in read_text(path).split("\n") if line.strip()]
        numbers = list(map(str, range(lines[0].count("\t") + 1)))
        header = numbers if task.label.isdigit() else None
        rows = list(csv.DictReader(lines, header, delimiter="\t", quoting=csv.QUOTE_NONE))
        complete = [row for row in rows if all(row[column] for column in columns)]
        texts = [[row[column] for column in task.columns] for row in complete]
        labels: list[Any] = [row[task.label] for row in complete]
        if task.labels:
            labels = list(map(task.labels.index, labels))
        values = np.array(labels, np.int32 if task.labels else np.float32)
    if len(complete) < len(rows):
        missing = len(rows) - len(complete)
        print(f"{str(path)!r}: {missing:,} of {len(rows):,} rows lack a text or the label and are left out", flush=True)
    if not texts:
        raise UserError(f"{str(path)!r} has no complete item of GLUE's {name}; download the task again.")
    return texts, values


class GlueTasks(SourceKind):
    """`glue:TASK@FOLDER/SPLIT`."""

    labelled_items = "text"

    @classmethod
    def open_labelled(cls, rest: str, options: SourceOptions) -> Labelled:
        head, split = name_and_split("glue:TASK@FOLDER/SPLIT", rest)
        task, _, folder = head.partition("@")
        texts, values = read_pairs(task, split, os.path.expanduser(folder))
        return Labelled("text", [" ".join(parts) for parts in texts], values, TASKS[task].labels, TASKS[task].metrics)
