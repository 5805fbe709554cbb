"""Sentences and labels of GLUE (arXiv 1804.07461), from the published files or from TFDS.

Sentence pairs are joined with a space. Test labels are not public; the split "validation" is often called dev.
"""

import csv
import dataclasses
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from xclip_jax.core.errors import UserError, check_choice
from xclip_jax.data.base import SourceKind, SourceOptions, read_text
from xclip_jax.data.labelled import Labelled
from xclip_jax.data.readers.tfds import lookup, name_and_split, open_tfds


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      columns: columns with the one or two texts in the TSV files; "3" is the fourth of CoLA's, which have no header.
      label: column of the label.
      features: names of the columns in TFDS, if they differ.
      labels: labels in the files, ordered by class number; empty if the label itself is a number.
      metrics: published metrics of the dev split; the first is reported.
    """

    columns: tuple[str, ...]
    label: str = "label"
    features: tuple[str, ...] = ()
    labels: tuple[str, ...] = ("0", "1")
    metrics: tuple[str, ...] = ("top1",)


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


def read_pairs(
    name: str, split: str, folder: str = "", data_dir: str | None = None
) -> tuple[list[list[str]], np.ndarray]:
    """Return the one or two texts of each item in "train" or "validation", and labels, int32 or fp32 (n,).

    `folder` contains train.tsv and dev.tsv (MNLI: dev_matched.tsv, dev_mismatched.tsv); "" reads glue/NAME from TFDS.
    Incomplete rows, such as a few in QQP, are left out. `UserError` for unknown names or labels, or missing columns.
    """
    check_choice("the GLUE task", name, TASKS)
    check_choice("the GLUE split", split, ("train", "validation"))
    task = TASKS[name]
    if not folder:
        source = f"glue/{'mnli' if split == 'train' and name.startswith('mnli') else name}"
        part = "validation_matched" if (name, split) == ("mnli", "validation") else split
        data, _ = open_tfds(source, part, data_dir)
        records = [data[i] for i in range(len(data))]
        texts = [[lookup(record, key)[0] for key in task.features or task.columns] for record in records]
        return texts, np.array([record["label"] for record in records], np.int32 if task.labels else np.float32)
    dev = {"mnli": "dev_matched.tsv", "mnli_mismatched": "dev_mismatched.tsv"}.get(name, "dev.tsv")
    path = pathlib.Path(folder) / ("train.tsv" if split == "train" else dev)
    # Sentences contain unpaired quotes, and separators at which splitlines() would break.
    lines = [line.rstrip("\r") for line in read_text(path).split("\n") if line.strip()] if path.is_file() else []
    header = [str(i) for i in range(lines[0].count("\t") + 1)] if lines and task.label.isdigit() else None
    rows = list(csv.DictReader(lines, header, delimiter="\t", quoting=csv.QUOTE_NONE))
    columns = (*task.columns, task.label)
    if not rows or not set(columns) <= set(rows[0]):
        raise UserError(
            f"{str(path)!r} is missing, empty, or lacks GLUE's columns {', '.join(columns)}; download the task again."
        )
    complete = [row for row in rows if all(row[column] for column in columns)]
    if len(complete) < len(rows):
        missing = len(rows) - len(complete)
        print(f"{str(path)!r}: {missing:,} of {len(rows):,} rows lack a text or the label and are left out", flush=True)
    texts = [[row[column] for column in task.columns] for row in complete]
    labels = [row[task.label] for row in complete]
    try:
        if task.labels:
            return texts, np.array([task.labels.index(label) for label in labels], np.int32)
        return texts, np.array(labels, np.float32)
    except ValueError as error:
        raise UserError(f"{str(path)!r} contains a label that GLUE's {name} does not have ({error}).") from error


class GlueTasks(SourceKind):
    """`glue:TASK/SPLIT` and `glue:TASK@FOLDER/SPLIT`."""

    labelled_items = "text"

    @classmethod
    def open_labelled(cls, rest: str, options: SourceOptions) -> Labelled:
        head, split = name_and_split("glue:TASK/SPLIT", rest)
        task, _, folder = head.partition("@")
        texts, values = read_pairs(task, split, os.path.expanduser(folder), options.dir or None)
        return Labelled("text", [" ".join(parts) for parts in texts], values, TASKS[task].labels, TASKS[task].metrics)
