"""Probes of published sets."""

import dataclasses

import pytest
import tensorflow_datasets as tfds

from tests.evaluators.sets.test_published_sets import evaluate, records, write
from tests.helpers.encoding import SIZE
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.probe import Sweep
from xclip_jax.evaluators.prompts import PROFILES
from xclip_jax.evaluators.sets import zeroshot_datasets


@pytest.mark.parametrize("name", ["cifar10", "dtd", "kitti"])
def test_a_probe_of_a_tfds_set(name):
    with tfds.testing.mock_data(as_data_source_fn=records):
        data = registry.load(f"probe/{name}", SIZE)
    assert (len(data.train), len(data.validation), len(data.test)) == (
        3,
        3 if zeroshot_datasets.ENTRIES[name].held else 0,
        3,
    )
    data = dataclasses.replace(data, sweep=Sweep((1.0,), 0))
    metrics = evaluate(data)
    assert metrics[f"visual/probe/{name}/n"] == 3 and f"visual/probe/{name}/{data.card.metric}" in metrics


def test_a_probe_of_folders_by_slips_profile(tmp_path):
    for part in ("train", "test"):
        for label, value in (("cat", 20), ("dog", 220)):
            for i in range(6):
                write(tmp_path / part / label / f"{i}.png", value + i)
    data = registry.load(f"probe/pets@{tmp_path}", SIZE, profile=PROFILES["slip"])
    assert "bilinear" in data.card.preprocessing and data.card.protocol.startswith("CLIP's linear probe")
    assert (data.test[0] == data.train[0]).all() and data.test[0].shape == (SIZE, SIZE, 3)
    assert evaluate(data)[f"visual/probe/pets@{tmp_path}/linear/mean_per_class"] > 50


@pytest.mark.parametrize("held", [False, True])
def test_a_few_shot_probe_of_folders(held, tmp_path):
    for part in ("train", "test", *["validation"] * held):
        for label, value in (("cat", 20), ("dog", 220)):
            for i in range(12):
                write(tmp_path / part / label / f"{i}.png", value + i)
    data = registry.load(f"fewshot/pets@{tmp_path}", SIZE)
    assert data.card.metric == "linear/mean_per_class" and data.parts == ("1%", "10%", "5-shot")
    metrics = evaluate(dataclasses.replace(data, sweep=Sweep((1.0, 100.0), 0)))
    name = f"visual/fewshot/pets@{tmp_path}"
    for way in ("linear", "knn", "linear/1%", "linear/5-shot"):
        assert metrics[f"{name}/{way}/mean_per_class"] == 100


def test_a_probe_without_a_training_split(tmp_path):
    for name in ("imagenet_a", "eurosat", "gtsrb"):
        with pytest.raises(UserError, match=f"{name} has no training split in TFDS"):
            registry.load(f"probe/{name}", SIZE)
    write(tmp_path / "train" / "cat" / "0.png", 0)
    write(tmp_path / "test" / "dog" / "0.png", 0)
    with pytest.raises(UserError, match="same classes"):
        registry.load(f"probe/pets@{tmp_path}", SIZE)
    with pytest.raises(UserError, match="unknown evaluation set 'probe/nothing'"):
        registry.check("probe/nothing")
