import io
import json

import numpy as np
import PIL.Image
import pytest

from configs import demo as demo_config
from tests.helpers.encoding import SIZE, K, make_encoder, small_model
from tests.helpers.pages import page_of
from xclip_jax.core.errors import UserError
from xclip_jax.demo import emoji, emoji_sets
from xclip_jax.evaluators import registry, tables
from xclip_jax.evaluators.results import flat
from xclip_jax.report import collect, examples, picture

# The demo's sets, on a small copy of its data.

ROLES = [*["train"] * 4, *["test_concepts"] * 2, "validation_concepts"]
CONCEPTS = [
    {
        "id": f"c{i}",
        "name": f"name {i}",
        "tags": [f"tag {j}" for j in range(i)],
        "aliases": [f"alias {i}", f"Name {i}"] if i == 4 else [],
        "role": role,
        "category": "" if i == 3 else "round" if i % 2 else "flat",
    }
    for i, role in enumerate(ROLES)
]
RENDERED = [("twemoji", 0), ("noto", 2), ("noto", 3), ("openmoji", 1)]
SPLITS = {
    "train": [*((v, i) for v in emoji.VENDORS[:2] for i in range(4)), ("noto", 1)],
    "test_rendering": RENDERED,
    "validation_rendering": RENDERED[:2],
    "test_concepts": [(v, i) for v in emoji.VENDORS for i in (4, 5)],
    "validation_concepts": [(v, 6) for v in emoji.VENDORS],
    "test_line": [(emoji.LINE, i) for i in range(6)],
}


@pytest.fixture
def small_demo(monkeypatch):
    def record(vendor, i):
        png = io.BytesIO()
        PIL.Image.fromarray(np.full((9, 9, 3), 10 * i, np.uint8)).save(png, "png")
        words = {"vendor": vendor, "concept": f"c{i}", "name": f"name {i}"}
        words |= {"category": CONCEPTS[i]["category"], "subcategory": CONCEPTS[i]["category"]}
        texts = {key: value.encode() for key, value in words.items()}
        return {"image": png.getvalue(), "aliases": [b"alias"] * (i % 3), "tags": [], **texts}

    class Builder:
        def as_data_source(self, split, decoders):
            return [record(*key) for key in SPLITS[split]]

    emoji_sets._emoji.cache_clear()
    monkeypatch.setattr(emoji, "prepare", lambda data_dir: Builder())
    monkeypatch.setattr(emoji, "concepts", lambda builder: CONCEPTS)
    yield
    emoji_sets._emoji.cache_clear()


@pytest.mark.parametrize(
    ("spec", "classes", "images"),
    [
        ("validation_concepts", [6], [6, 6, 6]),
        ("test_concepts", [4, 5], [4, 5, 4, 5, 4, 5]),
        ("test_rendering", range(7), [0, 2, 3, 1]),
        ("validation_rendering", range(7), [0, 2]),
        ("test_line", range(7), range(6)),
        ("test_line_concepts", [4, 5], [4, 5]),
    ],
)
def test_zero_shot_sets_of_the_demo(spec, classes, images, small_demo):
    data = registry.load(f"emoji/{spec}", SIZE)
    assert data.names == [f"name {i}" for i in classes]
    assert [data.names[label] for label in data.labels] == [f"name {i}" for i in images]
    assert [image[0, 0, 0] for image in data.images] == [10 * i for i in images]
    assert all(image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8 for image in data.images)
    unseen = "concepts" in spec
    assert data.prompts[-1][0] == ", ".join([data.names[-1], *(f"tag {j}" for j in range(3) if unseen)])
    vendors = len(data.groups)
    assert vendors == {"test_concepts": 3, "validation_concepts": 3}.get(spec, vendors) and vendors != 1
    assert not data.groups or np.sum(list(data.groups.values()), axis=0).tolist() == [1] * len(data.images)
    assert data.together.tolist() == list(data.labels)  # drawings of one concept


def test_retrieval_sets_of_the_demo(small_demo):
    data = registry.load("emoji/test_retrieval", SIZE)
    assert data.captions == [["name 0"], ["name 2", "alias", "alias"], ["name 3"], ["name 1", "alias"]]
    assert len(registry.load("emoji/validation_retrieval", SIZE).images) == 2


def test_probes_of_the_demo(small_demo):
    data = registry.load("emoji/test_probe", SIZE)
    # One picture of each known concept that has a category, by the artists in turn.
    assert [image[0, 0, 0] for image in data.train] == [0, 20, 10]
    assert len(data.validation) == 3 and len(data.test) == 6
    assert [labels.tolist() for labels in data.tasks["category"]] == [[0, 0, 1], [0] * 3, [0, 1] * 3]
    assert data.together.tolist() == [0, 1] * 3
    results = registry.measure(registry.evaluator(make_encoder(), data), small_model()[1])
    groups = [result.items.groups.tolist() for result in results if result.items is not None]
    assert groups and all(group == [0, 1] * 3 for group in groups)


def test_texts_of_the_demo(small_demo):
    aliases = registry.load("emoji/test_aliases", SIZE)
    assert aliases.texts == ["name 4", "name 5"] and aliases.queries == [("alias 4", 0)]  # not "Name 4"
    assert aliases.together.tolist() == [0]


def test_every_set_says_where_it_is_from(small_demo):
    for spec in emoji_sets._MAKERS:
        card = registry.load(spec, SIZE).card
        assert card.data == "emoji_pairs" and len(card.split_hash) == 16 and card.protocol, spec
    assert registry.load("emoji/test_line", SIZE).card == registry.load("emoji/test_line", SIZE).card
    assert registry.load("emoji/test_line", SIZE).card != registry.load("emoji/test_line_concepts", SIZE).card


def test_every_set_is_evaluated_and_each_family_has_a_first_one(small_demo):
    results = []
    for spec in emoji_sets._MAKERS:
        results += registry.open_all([spec], make_encoder())[0].measure(small_model()[1])
    values = flat(results)
    assert len(values) == len(results)
    assert all(0 <= value <= 100 for key, value in values.items() if not key.endswith("log10_c"))
    tested = [result for result in results if "/test_" in result.set]
    assert {title: row.name for title, row in tables.first_set_of_each_family(tested).items()} == {
        "zero-shot classification": "emoji/test_concepts",
        "out of domain": "emoji/test_line",
        "retrieval": "emoji/test_retrieval",
        "visual representation": "emoji/test_probe/category",
        "textual representation": "emoji/test_aliases",
    }
    assert set(demo_config.TESTS) == set(registry.all_suites()["demo"])
    with pytest.raises(UserError, match="lists the names"):
        registry.load("emoji/test_lines", SIZE)


# The picture.


@pytest.mark.parametrize(("objective", "embed", "clusters"), [("clip", 8, 0), ("nclip", 0, K)])
def test_picture_and_page_are_drawn_for_every_kind_of_model(objective, embed, clusters, small_demo, tmp_path):
    _, variables = small_model(embed, clusters)
    path = tmp_path / "picture.png"
    found = examples.collect_examples(make_encoder(embed, clusters), variables, demo_config.TESTS)
    picture.draw(path, found, title="Test")
    with PIL.Image.open(path) as image:
        assert image.width == 1600 and image.height > 1000
    config = {"config": demo_config.get_config(f"objective={objective}").to_dict(), "environment": {}}
    config["started"] = "2026-01-02T03:04:05+00:00"
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = page_of(collect.read(tmp_path), found)
    shown = [title for title in ("Line drawings", "Search by words", "Image to text", 'id="clusters"') if title in text]
    assert len(shown) == 3 + bool(clusters)
    # Each picture is right or wrong as its set says, and the right name's place is that among all of them.
    assert [named.num_classes for named in found.named] == [2, 7, 7]
    for named in found.named:
        for guess in named.guesses:
            assert [c.right for c in guess.best] == [c.name == guess.name for c in guess.best]
            assert guess.rank > 5 or guess.best[guess.rank - 1].right
    for asked in found.retrieved.by_text:
        assert any(asked.right) == (asked.rank <= len(asked.right)) and (asked.rank > 6 or asked.right[asked.rank - 1])


def test_prompts_of_unseen_concepts(small_demo):
    """Each keyword is in front once, behind the name and alone; without keywords the name is left."""
    rotations = [f"name 4, {', '.join(f'tag {(i + j) % 4}' for j in range(3))}" for i in range(4)]
    tags = [f"tag {i}" for i in range(4)]
    assert registry.load("emoji/test_concepts", SIZE).prompts[0] == [*rotations, *tags]
    assert emoji_sets._prompts({"name": "n", "tags": []}) == ["n"]
