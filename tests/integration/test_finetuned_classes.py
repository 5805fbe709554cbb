"""A fine-tuned model is tested on the classes that it learned, by their names."""

import json

import numpy as np
import pytest

from tests.helpers.encoding import by_name
from tests.integration.test_finetune import FakeEncoder
from xclip_jax.core.run_folder import RunReader
from xclip_jax.evaluators.probe import ClassificationSet, ClassifierEvaluator

pytestmark = pytest.mark.long


def encoder(classes):
    fake = FakeEncoder(None)
    fake.classes = classes
    return fake


def labelled(names, labels):
    return ClassificationSet("finetuned/x", ["text"] * len(labels), np.array(labels), len(names), names=names)


def test_classes_of_the_set_are_numbered_as_those_of_the_model():
    fake = encoder(("bee", "ant", "cat"))
    fake.logits = np.eye(3)[[1, 0, 2, 2]]
    same = ClassifierEvaluator(fake, labelled(("ant", "bee", "cat"), [0, 1, 2, 1]))
    assert same.data.labels.tolist() == [1, 0, 2, 0]
    metrics, items = by_name(same.measure(None))
    assert items["textual/finetuned/x/finetuned/top1"].values.tolist() == [1, 1, 1, 0]
    # A class without items is an answer all the same.
    some = ClassifierEvaluator(fake, labelled(("ant", "cat"), [0, 1]))
    assert some.data.labels.tolist() == [1, 2] and some.data.classes == 3
    assert some.run(None)["textual/finetuned/x/ways"] == 3
    assert metrics["textual/finetuned/x/finetuned/top1"] == 75


def test_runs_that_do_not_say_their_classes_are_tested_by_number():
    data = labelled(("ant", "cow"), [0, 1])
    assert ClassifierEvaluator(encoder(None), data).data is data
    numbers = ClassificationSet("finetuned/y", ["text"], np.array([0.5]), 1)
    assert ClassifierEvaluator(encoder(("ant",)), numbers).data is numbers


def test_no_data_json_and_no_classes_are_none(tmp_path):
    assert RunReader(tmp_path).read_classes() is None
    (tmp_path / "data.json").write_text(json.dumps([{"samples": 3, "hash": ""}]))
    assert RunReader(tmp_path).read_classes() is None
