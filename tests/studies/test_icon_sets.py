import numpy as np
import pytest

from studies.icons import corpus, drawn
from studies.icons import sets as icon_sets
from studies.icons.clustered import ClusteredZeroShot
from studies.icons.sets import KIND
from tests.helpers.encoding import PREPARE, build_encoder, small_model
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.results import SHIFTED, VALIDATION
from xclip_jax.evaluators.statistics import bootstrap


@pytest.fixture(scope="module")
def load(icon_builder):
    """The sets of the small package, by their names; probes learn from as many drawings as it has."""
    data_dir = str(icon_builder.data_path.parents[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawn, "MIN_DRAWINGS", 4)
        patch.setattr(drawn, "MIN_EACH_SIDE", 2)
        patch.setattr(drawn, "SHOTS", (1, 2))
        patch.setattr(icon_sets, "DENSE_DRAWINGS", (30, 10, 20))
        patch.setattr(drawn, "PROBE_CLASSES", {"test": 4, "validation": 4})
        yield lambda name: registry.load(f"{KIND}/{name}", PREPARE, data_dir)


@pytest.fixture(scope="module")
def measured(load):
    """{set: results} under a model that was not trained."""
    model, variables = small_model()
    encoder = build_encoder(model)
    return {
        name: registry.measure(registry.evaluator(encoder, load(name)), variables)
        for name in (spec.removeprefix(f"{KIND}/") for spec in icon_sets.IconSets.names)
        if not name.endswith("categories")
    }


def test_zero_shot_is_among_the_names_of_the_role(load, icon_builder):
    concepts = {c["id"]: c for c in corpus.concepts(icon_builder)}
    for part in ("test", "validation"):
        unseen = load(f"{part}_concepts")
        names = [c["name"] for c in concepts.values() if c["role"] == f"{part}_concepts"]
        assert unseen.prompts == [[name] for name in names] and set(unseen.labels) == set(range(len(names)))
        known = load(f"{part}_rendering")
        assert len(known.prompts) == sum(c["role"] == "train" for c in concepts.values())
        assert known.card.role == (SHIFTED if part == "test" else VALIDATION)
        assert len(known.images) == icon_builder.info.splits[f"{part}_rendering"].num_examples


def test_retrieval_has_one_drawing_of_a_concept(load, icon_builder):
    data = load("test_retrieval")
    known = load("test_rendering")
    assert data.card.role == "" and load("validation_retrieval").card.role == VALIDATION
    assert len(data.images) == len(set(known.labels.tolist())) == len({texts[0] for texts in data.captions})


def test_a_probe_is_recognised_across_artists(load, icon_builder):
    data = load("test_probe")
    assert set(data.task.labels[0]) == set(data.task.labels[1]) == set(range(4))
    records = [{"concept": "a", "family": f"artist-{x}"} for x in "abcdefghij"] + [
        {"concept": "b", "family": "artist-a"} for _ in range(20)
    ]
    sides = [drawn.artists_side(record["family"]) for record in records[:10]]
    assert 2 <= sum(sides) <= 8
    assert drawn.probe_concepts(records, 5) == ["a"]  # one family alone cannot be on both sides
    validation = load("validation_probe")
    assert len(set(validation.tuning.labels[0])) == len(set(validation.task.labels[0])) == 2


def test_every_set_has_a_chance_level_a_size_and_provenance(measured):
    hashes = set()
    for name, results in measured.items():
        names = ("top1", "top5", "r1", "r5", "accuracy")
        shares = [r for r in results if r.unit == "%" and r.metric.rpartition("/")[2] in names]
        shares = [r for r in shares if not r.metric.startswith("chance")]
        assert shares and all(r.n and r.chance is not None for r in shares), name
        assert sum(r.headline for r in results) >= 1
        card = results[0].protocol
        assert card.data == "icon_pairs" and card.split_hash and card.protocol
        assert (card.role == VALIDATION) == name.startswith("validation")
        hashes.add(card.split_hash)
    assert len(hashes) == len(measured)


def test_items_are_resampled_by_concept(measured, load):
    labels = load("test_concepts").labels
    results = {r.key: r for r in measured["test_concepts"]}
    for key in ("top1", "top5", "rank_gmean"):
        np.testing.assert_array_equal(results[key].items.groups, labels)
        assert results[key].value == pytest.approx(results[key].items.value())
    for name in ("test_probe", "test_retrieval", "test_aliases", "test_dense"):
        items = [r.items for r in measured[name] if r.items is not None and not r.metric.startswith("image_to_text")]
        assert items and all(item.groups is not None for item in items)
    low, high = bootstrap(results["top1"].items, results["top1"].items)
    assert low == high == 0


def test_regions_of_a_drawing():
    """A closed ring, a ring with a gap, ink that touches the border, and a diagonal stroke of a pixel's width."""
    text = """
    .......#
    .###.#.#
    .#o#.#.#
    .###.###
    ........
    ..#.....
    .#o#....
    ..#....#
    """
    rows = np.array([list(row) for row in text.split()])
    picture = np.full((8, 8, 3), 255, np.uint8)
    picture[rows == "#"] = (255, 255, 240)  # a pale colour is ink
    np.testing.assert_array_equal(icon_sets.regions(picture), np.select([rows == "#", rows == "."], [1, 0], 2))


def test_dense_parts_have_different_concepts(load, icon_builder):
    for part in ("validation", "test"):
        data = load(f"{part}_dense")
        assert [len(side.images) for side in data.parts] == [len(side.masks) for side in data.parts]
        assert len(data.test.images) == 20 and 0 < len(data.validation.images) <= 10
        assert data.classes == ("outside", "drawn", "enclosed") and data.card.metric == "miou"
        masks = [mask.tobytes() for side in data.parts for mask in side.masks]
        assert len(set(masks)) == len(masks)  # no drawing is in two parts, or twice in one
        images, inside = np.stack(list(data.test.images)), np.stack(list(data.test.masks)) == 1
        assert images.shape == (20, PREPARE.size, PREPARE.size, 3) and inside.shape == (20, 64, 64)
        ink = inside[:, 4::8, 4::8]
        assert images[ink].mean() < images[~ink].mean()
    records = drawn.records_of(icon_sets.ICONS, "validation_concepts", str(icon_builder.data_path.parents[1]))[1]
    for part in ("validation", "test"):
        sides = icon_sets.dense_sides([record["concept"] for record in records], part)
        assert not set(sides[0]) & set(sides[1])
        if part == "validation":
            assert not (set(sides[0]) | set(sides[1])) & set(sides[2])


def test_geometric_mean_rank(load):
    data = load("test_concepts")
    ways, labels = len(data.prompts), np.asarray(data.labels)
    scores = np.random.default_rng(0).normal(size=(len(labels), ways)).astype(np.float32)
    scores[0] = np.nan

    class Fixed(ClusteredZeroShot):
        def scores(self, variables):
            return {"": scores}

    result = {r.key: r for r in Fixed(None, data).measure(None)}["rank_gmean"]
    np.testing.assert_array_equal(result.items.groups, labels)
    rank = 1 + (scores > np.take_along_axis(scores, labels[:, None], 1)).sum(axis=1)
    rank[0] = ways
    assert result.value == pytest.approx(np.exp(np.log(rank).mean())) and result.unit == "rank"
    assert result.chance == pytest.approx(np.exp(np.mean(np.log(np.arange(1, ways + 1)))))


def test_categories_are_those_of_training(icon_builder, load, monkeypatch):
    entries = [
        {"id": f"{role}-{i}", "name": f"{word} {i}", "category": word, "role": role}
        for role in ("train", "validation_concepts", "test_concepts")
        for word, number in (("sky", 9), ("sea", 6), ("rare", 1))
        for i in range(number)
    ]
    monkeypatch.setattr(icon_sets, "_CATEGORIES", 2)
    monkeypatch.setattr(icon_sets.corpus, "concepts", lambda builder: entries)
    data = load("test_categories")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [15, 15, 15]
    assert set(data.tasks[""][0]) == {0, 1}
    half = load("validation_categories")
    assert len(half.validation) + len(half.test) == 15 and not set(half.validation) & set(half.test)


def test_names_are_known_and_shown():
    assert registry.check(f"{KIND}/test_concepts") is icon_sets.IconSets
    assert {icon_sets.IconSets.shows(name) for name in icon_sets.TESTS} == {"classes", "captions", ""}
