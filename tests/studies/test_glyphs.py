import collections
import dataclasses
import hashlib
import io

import numpy as np
import PIL.Image
import pytest

from studies.glyphs import characters, corpus, fonts, splits
from studies.glyphs.characters import Character
from studies.glyphs.sources import KIND
from studies.icons import drawing
from tests.studies import glyph_packages as made
from xclip_jax.core.errors import UserError
from xclip_jax.data import sources
from xclip_jax.data.base import SourceOptions

# By hash of their names alone: another rule for the order gives others.
HELD = {
    f"toy {case} letter {letter}": f"{part}_combinations"
    for part, letters in (
        ("test", ("ddha with bar", "dha with hook", "gha with hook")),
        ("validation", ("ddha with ring", "cha with bar")),
    )
    for letter in letters
    for case in ("capital", "small")
}


def test_names_and_aliases(glyph_characters):
    assert glyph_characters[0x1000] == Character(0x1000, "made sign bird", "made signs", ["day star", "sol"])
    assert glyph_characters[0x1001].aliases == ["old boat", "pale moon"]
    assert glyph_characters[made.SAME].label == "old toy" and glyph_characters[0x3004].name == "left pointing toy"
    assert not {0x3000, 0x3001, 0x3002, 0x3003} & glyph_characters.keys()
    assert characters.parts("latin small letter a with ring above and acute") == (
        "latin small letter a",
        "ring above and acute",
    )
    assert characters.parts("black star") == ("black star", "")
    assert characters.without_case("latin small letter r") == characters.without_case("latin capital letter r")


def picture(glyph):
    drawn = drawing.draw(glyph.body, glyph.box)
    return np.asarray(PIL.Image.open(io.BytesIO(drawn.png)))[..., 0]


def glyph_of(*corners, code=0x1000):
    """A rectangle as a font's glyph, read back from a package's bytes."""
    pen = made.TTGlyphPen(None)
    made.square(pen, *corners)
    font = fonts.open_font(made.font({code: pen.glyph()}))
    name = {code: Character(code, "toy", "toys", [])}
    (glyph,) = fonts.outlines(font, made.Typeface("toy", "toys", None), 400, name)
    return glyph


def test_a_glyph_is_drawn_in_the_middle_on_the_baseline():
    glyph = glyph_of(100, 0, 400, 600)
    assert glyph.place == pytest.approx((0.3, 0.0, 0.6)) and glyph.box == (-350, -950, 1200, 1200)
    ink = picture(glyph) < 128
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    scale = 64 / 1.2  # pixels an em
    np.testing.assert_allclose([rows[0], rows[-1] + 1], [0.35 * scale, 0.95 * scale], atol=1)
    np.testing.assert_allclose([columns[0], columns[-1] + 1], [32 - 0.15 * scale, 32 + 0.15 * scale], atol=1)
    assert ink[rows[0] + 1 : rows[-1], columns[0] + 1 : columns[-1]].all()


def test_a_large_glyph_is_drawn_whole():
    for corners in ((0, -600, 300, 1500), (-200, 0, 2500, 400)):
        ink = picture(glyph_of(*corners)) < 128
        assert ink.any() and not ink[0].any() and not ink[-1].any() and not ink[:, 0].any() and not ink[:, -1].any()
        height, width = (np.flatnonzero(ink.any(axis=axis)).size for axis in (1, 0))
        assert width / height == pytest.approx((corners[2] - corners[0]) / (corners[3] - corners[1]), rel=0.15)


def test_a_typeface(glyph_source):
    some = [glyph for glyph in glyph_source.glyphs if glyph.icon_set == "face-a"]
    assert collections.Counter(glyph.weight for glyph in some) == dict.fromkeys((400, 700), len(made.names()))
    assert some[0].id == "face-a/1000-400" and some[0].categories == ["made signs"]
    about = glyph_source.sets[0]
    assert about["licence"] == "OFL-1.1" and about["author"] == "Copyright of face-a" and about["family"] == "foundry-0"
    assert glyph_source.counts["fonts"] == 2 * len(made.FACES)


def test_pinned_typefaces():
    every = fonts.typefaces()
    assert len({typeface.name for typeface in every}) == len(every) > 100
    assert len({typeface.family for typeface in every}) > 40
    assert all(typeface.package.integrity.startswith("sha512-") and typeface.family for typeface in every)


def test_a_damaged_package_is_one_sentence(tmp_path, glyph_characters):
    path = tmp_path / "cut.tgz"
    package = made.pack(path, "@fontsource/face-a", {"files/face-a-latin-400-normal.woff": b"wOFFnothing"})
    with pytest.raises(UserError, match=r"^package '.*cut\.tgz' is damaged .*; delete it to download it again\.$"):
        fonts.read(path, fonts.Typeface("face-a", "foundry", package), glyph_characters)


def test_a_character_that_a_font_draws_like_another_is_left_out():
    latin, greek = glyph_of(0, 0, 300, 700, code=0x41), glyph_of(5, 0, 305, 700, code=0x391)
    small, high = glyph_of(0, 0, 225, 525, code=0x61), glyph_of(0, 210, 300, 910, code=0xB7)
    glyphs = [greek, latin, small, high]
    signatures = np.stack([np.frombuffer(drawing.draw(g.body, g.box).signature, np.uint8) for g in glyphs])
    assert splits.near_duplicates(signatures, signatures).all()  # one shape
    assert splits.repeated(glyphs, signatures).tolist() == [True, False, False, False]


def test_a_character_that_half_of_the_fonts_draw_like_another_is_no_concept():
    glyphs = [glyph_of(0, 0, 300, 700, code=code) for code in (0x41, 0x391)] * 4
    glyphs = [dataclasses.replace(g, icon_set=f"face-{i // 2}", concept="ab"[i % 2]) for i, g in enumerate(glyphs)]
    for times, kept in ((3, 4), (2, 6)):
        repeats = np.array([i % 2 == 1 and i // 2 < times for i in range(8)])
        assert len(splits.distinct(glyphs, repeats)) == kept


def test_drawings_of_a_character_are_the_first_by_hash():
    glyph = glyph_of(0, 0, 300, 700)
    glyphs = [dataclasses.replace(glyph, icon_set=f"face-{i}") for i in range(40)]
    others = [dataclasses.replace(g, code=0x1001, name="1001-400") for g in glyphs[:5]]
    digests = {g.id: hashlib.sha256(f"xclip_jax icons 2026/glyph variant/{g.id}".encode()).digest() for g in glyphs}
    first = sorted(digests, key=digests.__getitem__)[:24]
    assert [g.id for g in splits.limit(glyphs + others)] == [
        g.id for g in glyphs + others if g.id in first or g.code == 0x1001
    ]


def test_combinations_are_drawn_by_hash():
    names = [name.lower() for name in made.names().values()]
    held = splits.held_out_combinations(names, names, (6, 4))
    assert held == HELD
    assert len(held) == 10
    for name in held:
        base, mark = characters.parts(name)
        assert base in names and base not in held
        assert held[name] == held[name.replace("small", "!").replace("capital", "small").replace("!", "capital")]
        left = [other for other in names if characters.parts(other)[1] == mark and other not in held]
        assert len(left) >= splits.MIN_BASES
    assert not splits.held_out_combinations([n for n in names if "ring" in n], names, (6, 4))  # without their bases
    few = [n for n in names if " with " not in n or n.split()[3] in ("ba", "bha")]
    assert not splits.held_out_combinations(few, few, (6, 4))  # two bases, two cases: none would be left


def test_splits_are_disjoint_and_have_their_parts(glyph_builder, glyph_records):
    concept, family, caption = (
        {split: {record[key] for record in part} for split, part in glyph_records.items()}
        for key in ("concept", "family", "name")
    )
    assert {split for split, part in glyph_records.items() if part} == set(splits.SPLITS)
    for split in (*splits.UNSEEN, *splits.COMBINATIONS):
        assert not concept[split] & concept["train"] and caption[split]
    bases = {characters.parts(name)[0] for part in caption.values() for name in part if " with " in name}
    for split in splits.UNSEEN:
        assert not [name for name in caption[split] if " with " in name or name in bases]
    marks = {characters.parts(name)[1] for name in caption["train"]}
    for split in splits.COMBINATIONS:
        for base, mark in map(characters.parts, caption[split]):
            assert base in caption["train"] and mark in marks
    for split in splits.RENDERING:
        assert not family[split] & family["train"] and concept[split] <= concept["train"]
    everything = [record for part in glyph_records.values() for record in part]
    assert not [record for record in everything if record["name"] == "toy double"]  # the outline of the bird
    report = glyph_builder.info.metadata["report"]
    assert report["counts"]["corpus"] == len(everything) and report["licences"]["OFL-1.1"]["sets"] == len(made.FACES)
    assert "Copyright of face-a" in (glyph_builder.data_path / "LICENCES.md").read_text()


def test_source_of_pairs(glyph_builder):
    options = SourceOptions(str(glyph_builder.data_path.parents[1]), "image", ("name", "aliases"), "")
    source = sources.open_pairs(f"{KIND}:train", options)
    assert len(source) == glyph_builder.info.splits["train"].num_examples
    assert len(source[0]["text"][0].split()) > 1
    assert corpus.prepare(glyph_builder.data_path.parents[1]).info.name == "glyph_pairs"
