"""A fine-tuned model is tested on the classes that it learned, by their names."""

import json

import numpy as np
import pytest
from etils import epath

from tests.helpers import tiny
from tests.helpers.encoding import by_name
from tests.integration.test_finetune import FakeEncoder, folder_of_classes
from xclip_jax.commands import evaluate
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunReader
from xclip_jax.core.storage import write_json
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.probe import ClassificationSet, ClassifierEvaluator
from xclip_jax.train import weights
from xclip_jax.train.build import make_encoder

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


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three classes, saved before its first step."""
    return tiny.untrained(tmp_path_factory.mktemp("finetuned") / "run", "classify", objective__classify__classes=3)


def test_the_runs_data_json_names_its_classes(run, tmp_path, capsys):
    images = folder_of_classes(tmp_path / "images", 2)
    spec = f"finetuned/folder:{images}"
    names = ["bright", "dark", "grey"]
    (run / "data.json").unlink(missing_ok=True)
    old = evaluate.evaluate(str(run), spec, output=str(tmp_path / "x.json"))["results"][0]
    write_json(epath.Path(run / "data.json"), [{"samples": 6, "hash": "x", "classes": names}])
    new = evaluate.evaluate(str(run), spec, output=str(tmp_path / "x.json"))["results"][0]
    assert new["metrics"] == old["metrics"] and RunReader(run).read_classes() == tuple(names)
    write_json(epath.Path(run / "data.json"), [{"samples": 6, "hash": "x", "classes": ["bright", "grey", "white"]}])
    with pytest.raises(UserError, match="has the class 'dark'"):
        registry.open_all([spec], make_encoder(weights.load(str(run))[1], ["bright", "grey", "white"]))
    with pytest.raises(UserError, match="has the class 'dark'"):
        evaluate.evaluate(str(run), spec, output=str(tmp_path / "x.json"))


def test_no_data_json_and_no_classes_are_none(tmp_path):
    assert RunReader(tmp_path).read_classes() is None
    (tmp_path / "data.json").write_text(json.dumps([{"samples": 3, "hash": ""}]))
    assert RunReader(tmp_path).read_classes() is None
