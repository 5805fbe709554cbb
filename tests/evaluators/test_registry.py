"""Images of evaluation sets that cannot be decoded: they are wrong, counted and named, and too many are an error."""

import dataclasses

import jax
import numpy as np
import PIL.Image
import pytest

from tests.helpers.encoding import SIZE, by_name, make_encoder, small_model
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data.base import LazySequence
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators import registry, statistics
from xclip_jax.evaluators.base import pictures
from xclip_jax.evaluators.encoder import TooManyUnreadable
from xclip_jax.evaluators.probe import Sweep
from xclip_jax.evaluators.prompts import PROFILES

BROKEN = (3, 30)  # of 50 images a class


def broken(items, *places):

    def get(i):
        if i in places:
            raise BadSample("not an image")
        return items[i]

    return LazySequence(len(items), get)


def folder(path, classes=("cat", "dog"), n=50, seed=0):
    rng = np.random.default_rng(seed)
    for c, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for i in range(n):
            image = rng.integers(0, 100, (12, 12, 3), dtype=np.uint8) + np.uint8(150 * c)
            PIL.Image.fromarray(image).save(path / name / f"{i:02}.png")
    return path


def spoil(path, classes=("cat",)):
    files = [path / name / f"{i:02}.png" for name in classes for i in BROKEN]
    for file in files:
        file.write_bytes(b"<html>")
    return files


def measure(spec, embed=8, clusters=10, **changes):
    evaluator = registry.open_all([spec], make_encoder(embed, clusters))[0]
    if changes:
        evaluator.data = dataclasses.replace(evaluator.data, **changes)
    return by_name(registry.measure(evaluator, small_model(embed, clusters)[1]))


@pytest.mark.parametrize(("embed", "clusters"), [(0, 10), (8, 10)])
def test_an_unreadable_image_counts_as_wrong_and_changes_no_other(embed, clusters, tmp_path, capsys):
    spec = f"folder:{folder(tmp_path)}"
    whole, items = measure(spec, embed, clusters)
    assert f"zeroshot/{spec}/unreadable" not in whole
    files = spoil(tmp_path)
    found, items_of = measure(spec, embed, clusters)
    assert found[f"zeroshot/{spec}/unreadable"] == 2 and found[f"zeroshot/{spec}/n"] == 100
    said = capsys.readouterr().out
    assert "2 unreadable images" in said and all(str(file) in said for file in files)
    assert items_of.keys() == items.keys()
    for key, item in items.items():
        wrong = np.zeros(100, bool)
        wrong[list(BROKEN)] = True
        assert (items_of[key].values[wrong] == 0).all()
        if key.endswith("top1") and "/both/" not in key:  # whose scale is that of all images
            assert (items_of[key].values[~wrong] == item.values[~wrong]).all()
    both = f"zeroshot/{spec}/both/top1"
    assert both not in whole or found[both] >= whole[both] - 4


def test_more_than_a_twentieth_is_an_error_that_names_the_set_and_the_first(tmp_path):
    spec = f"folder:{folder(tmp_path, n=15)}"
    first = tmp_path / "cat" / "03.png"
    for path in (first, tmp_path / "dog" / "10.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="2 of 30 images cannot be read") as error:
        measure(spec)
    assert str(first) in str(error.value)
    assert error.value.__notes__ == [f"in evaluator zeroshot/{spec}"]


def test_a_store_that_does_not_answer_counts_as_unreadable_and_is_given_up_before_the_end():
    encoder, variables, tried = make_encoder(), small_model()[1], []
    encoder.unreadable.clear()

    def stored(n, away):
        def get(index):
            tried.append(index)
            if index < away:
                raise TimeoutError(110, "the store is away")
            return np.full((SIZE, SIZE, 3), index % 256, np.uint8)

        return pictures(LazySequence(n, get), Preprocessing(SIZE))

    for away in (3, 9_000):
        with pytest.raises(TooManyUnreadable, match="the store is away"):
            encoder.images(variables, stored(40 if away == 3 else 10_000, away))
    assert len(tried) < 600 and not encoder.unreadable
    whole = encoder.images(variables, stored(40, 0))
    for key, x in encoder.images(variables, stored(40, 2)).items():
        assert np.isnan(x[:2]).all() and (x[2:] == whole[key][2:]).all()


def test_an_evaluator_without_results_is_an_error_that_names_it(tmp_path, monkeypatch):
    (evaluator,) = registry.open_all([f"folder:{folder(tmp_path, n=1)}"], make_encoder())
    monkeypatch.setattr(evaluator, "measure", lambda variables: [])
    with pytest.raises(UserError, match="returned no results") as error:
        registry.measure(evaluator, None)
    assert error.value.__notes__ == [f"in evaluator {evaluator.name}"]


def test_class_names_need_one_set_with_such_a_class(tmp_path):
    specs = [f"folder:{folder(tmp_path / name, (name, 'elk'), n=1)}" for name in ("cat", "oak")]
    profile = dataclasses.replace(PROFILES["openai"], names={"cat": "kitten"})
    evaluators = registry.open_all(specs, make_encoder(), profile=profile)
    registry.check_class_names({"cat": "kitten"}, evaluators)
    registry.check_class_names({}, evaluators)
    with pytest.raises(UserError, match="none of the class names, such as 'cta', is among the classes of the sets"):
        registry.check_class_names({"cta": "kitten"}, evaluators)


def test_several_labels_and_two_classes(tmp_path):
    folder(tmp_path)
    specs = {"map": f"csv:{tmp_path / 'x.csv'}", "roc_auc": f"hatefulmemes@{tmp_path / 'y.csv'}"}
    for file, labels in (("x.csv", ("a|b", "b")), ("y.csv", ("0", "1"))):
        rows = [f"{name}/{i:02}.png,{x}" for name, x in zip(("cat", "dog"), labels, strict=True) for i in range(50)]
        (tmp_path / file).write_text("\n".join(["path,label", *rows]))
    before = {key: measure(spec)[0][f"zeroshot/{spec}/{key}"] for key, spec in specs.items()}
    spoil(tmp_path)
    for key, spec in specs.items():
        assert 0.8 * before[key] < measure(spec)[0][f"zeroshot/{spec}/{key}"] <= before[key]


def test_roc_auc_counts_what_is_not_a_number_as_wrong():
    values, positive = np.array([0.1, np.nan, 0.7, 0.2, np.nan, 0.3]), np.array([1, 1, 1, 0, 0, 0], bool)
    pairs = [(p, n) for p in (0.1, -np.inf, 0.7) for n in (0.2, np.inf, 0.3)]
    assert statistics.roc_auc(values, positive) == pytest.approx(np.mean([p > n for p, n in pairs]))
    assert statistics.roc_auc(np.full(6, np.nan), positive) == 0


def test_probes_leave_out_unreadable_training_images(tmp_path):
    for part in ("train", "test"):
        folder(tmp_path / part, seed=part == "test")
        spoil(tmp_path / part)
    spec = f"probe/folder:{tmp_path}"
    found, items = measure(spec, sweep=Sweep((1.0,), 0))
    assert found[f"visual/{spec}/unreadable"] == 4
    for key in ("linear", "knn"):
        assert (items[f"visual/{spec}/{key}/top1"].values[list(BROKEN)] == 0).all()
        assert found[f"visual/{spec}/{key}/top1"] == 98, key


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_each_split_of_a_probe_has_its_limit_of_unreadable_images(part, tmp_path):
    for name, n in (("train", 60), ("validation", 60), ("test", 60)):
        folder(tmp_path / name, n=4 if name == part else n, seed=len(name))
    (tmp_path / part / "cat" / "01.png").write_bytes(b"<html>")
    with pytest.raises(TooManyUnreadable, match="at least 1 of 8 images cannot be read, more than 5%"):
        measure(f"probe/folder:{tmp_path}", sweep=Sweep((1.0,), 0))


def test_a_model_that_diverged_is_wrong_everywhere(tmp_path):
    spec = f"folder:{folder(tmp_path)}"
    evaluator = registry.open_all([spec], make_encoder())[0]
    nans = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), small_model()[1])
    metrics, _ = by_name(registry.measure(evaluator, nans))
    assert metrics[f"zeroshot/{spec}/top1"] == 0 and f"zeroshot/{spec}/unreadable" not in metrics
