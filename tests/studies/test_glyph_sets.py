import numpy as np
import pytest

from studies.glyphs import corpus, splits
from studies.glyphs import sets as glyph_sets
from studies.glyphs.sets import KIND
from studies.icons import drawn
from tests.helpers.encoding import PREPARE, build_encoder, small_model
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.results import SHIFTED, VALIDATION


@pytest.fixture(scope="module")
def load(glyph_builder):
    """The sets of the small typefaces, by their names; probes learn from as many drawings as there are."""
    data_dir = str(glyph_builder.data_path.parents[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawn, "MIN_DRAWINGS", 4)
        patch.setattr(drawn, "MIN_EACH_SIDE", 2)
        patch.setattr(drawn, "SHOTS", (1, 2))
        patch.setattr(drawn, "PROBE_CLASSES", {"test": 3, "validation": 4})
        patch.setattr(glyph_sets, "LEARNED", 100)
        yield lambda name: registry.load(f"{KIND}/{name}", PREPARE, data_dir)


def test_names_are_those_of_the_roles(load, glyph_builder):
    names = {role: [] for role in ("train", *splits.UNSEEN, *splits.COMBINATIONS)}
    for entry in corpus.corpus.concepts(glyph_builder):
        names[entry["role"]].append(entry["name"])
    for part in ("test", "validation"):
        combined, composed = load(f"{part}_combinations"), load(f"{part}_composition")
        assert combined.prompts == [[name] for name in names[f"{part}_combinations"]]
        assert {p[0] for p in composed.prompts} == {*names[f"{part}_combinations"], *names["train"]}
        for data in (combined, composed):
            truth = [data.prompts[label][0] for label in data.labels]
            assert sorted(set(truth)) == sorted(names[f"{part}_combinations"])
        assert [c[0] for c in load(f"{part}_concepts").prompts] == names[f"{part}_concepts"]
        known = load(f"{part}_rendering")
        assert known.card.role == (SHIFTED if part == "test" else VALIDATION)
        assert [c[0] for c in known.prompts] == names["train"]


def test_a_script_is_learned_from_training_and_tested_on_new_characters(load, glyph_records):
    script = {record["concept"]: record["category"] for part in glyph_records.values() for record in part}
    data = load("test_scripts")
    labels = data.tasks[""]
    assert len(labels[0]) == len(data.train) == 100 and len(labels[2]) == len(data.together)
    classes = glyph_sets.script_classes(glyph_records["train"])
    assert classes == ["made signs", "old toy"] and script["toy-small-letter-ba"] == ["old toy"]
    records = sorted(glyph_records["test_concepts"], key=lambda record: record["id"])
    assert labels[2].tolist() == [classes.index(record["category"][0]) for record in records]
    same = np.array([[a["concept"] == b["concept"] for a in records] for b in records])
    np.testing.assert_array_equal(data.together[:, None] == data.together, same)
    half = load("validation_scripts")
    assert len(half.validation) + len(half.test) == len(glyph_records["validation_concepts"])


def test_sets_are_measured(load):
    model, variables = small_model()
    encoder = build_encoder(model)
    hashes = set()
    for spec in glyph_sets.GlyphSets.names:
        name = spec.removeprefix(f"{KIND}/")
        if name.endswith("aliases"):
            continue
        results = registry.measure(registry.evaluator(encoder, load(name)), variables)
        headline = [result for result in results if result.headline]
        assert headline and all(r.n and r.chance is not None and 0 <= r.value <= 100 for r in headline), name
        card = results[0].protocol
        assert card.data == "glyph_pairs" and card.split_hash and card.protocol and card.preprocessing
        assert (card.role == VALIDATION) == name.startswith("validation")
        items = [r.items for r in headline if r.items is not None]
        assert name.endswith("retrieval") or all(item.groups is not None for item in items)
        hashes.add(card.split_hash)
    assert len(hashes) == len(glyph_sets.GlyphSets.names) - 2


def test_aliases_ask_for_names(load, glyph_builder):
    concepts = [c for c in corpus.corpus.concepts(glyph_builder) if c["role"] == "test_concepts"]
    data = load("test_aliases")
    expected = [(alias, i) for i, c in enumerate(concepts) for alias in c["aliases"]]
    assert expected and list(data.queries) == expected and list(data.texts) == [c["name"] for c in concepts]


def test_names_are_known_and_shown():
    assert registry.check(f"{KIND}/test_composition") is glyph_sets.GlyphSets
    assert {glyph_sets.GlyphSets.shows(name) for name in glyph_sets.TESTS} == {"classes", "captions", ""}
