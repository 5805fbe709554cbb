import itertools

import jax
import numpy as np
import pytest

from tests.helpers import bad_tars, tiny
from tests.parallel.test_mesh import mesh as mesh_of
from xclip_jax.core.errors import UserError
from xclip_jax.data import base, images, loader, sources, tokenizer, transforms
from xclip_jax.parallel.mesh import batch_parts

KEYWORDS = "xclip_jax.demo.emoji:add_keywords:tags"


class Numbers(base.Source):
    """Record i of source `name` is a grey image of value i, with the caption "<name> <i>"."""

    def __init__(self, name, n):
        self.name, self.n = name, n

    def __len__(self):
        return self.n

    def fingerprint(self):
        return {"samples": self.n, "hash": self.name}

    def __getitem__(self, i):
        image = np.full((8, 8, 3), i % 256, np.uint8)
        return {"image": image, "text": [f"{self.name} {i}"], "tags": ["red", "blue", "green"]}


def config(**changes):
    return loader.DataConfig(**{"sources": ("x",), "batch": 8, "tokenizer": "bytes"} | changes)


def read(sources, c, start=0, stop=5, tokens=None, **hosts):
    transform = loader.Transform(c, 8, tokens or tokenizer.load("bytes"), 16)
    order = loader.sample_order(sources, c, seed=3)
    return list(loader.batches(order, transform, batch=c.batch, start=start, stop=stop, seed=3, **hosts))


def texts(batches):
    rows = np.concatenate([b["text"] for b in batches])
    return [bytes(int(t) - 3 for t in row if t >= 3).decode() for row in rows]  # start, end and padding are below 3


def test_each_sample_once_an_epoch_in_another_order():
    """Epochs need not be whole batches."""
    seen, whole = texts(read([Numbers("a", 13)], config(), stop=13)), [f"a {i}" for i in range(13)]
    epochs = [seen[i : i + 13] for i in range(0, 104, 13)]
    assert all(sorted(epoch) == sorted(whole) for epoch in epochs) and whole not in epochs
    assert len(set(map(tuple, epochs))) == 8


@pytest.mark.parametrize(
    ("changes", "classes", "named"),
    [
        ({"batch": 17}, 0, r"data\.batch=17 exceeds the 16 pairs of 'data\.sources'"),
        ({"weights": (5.0, 3.0)}, 0, r"the 4 pairs of 'folder:.*few' .* takes 5: .*data\.weights"),
        ({"sources": ("folder:few", "folder:none")}, 2, "'folder:none' has nothing in it"),
        ({"spread_duplicate_captions": True}, 2, r"data\.spread_duplicate_captions"),
        ({"holdout": 0.5}, 2, r"data\.holdout"),
        ({"drop": "suspects.jsonl"}, 2, r"data\.drop"),
        ({"caption_transform": "none:none:text"}, 0, r"data\.caption_transform 'none:none'"),
    ],
)
def test_open_sources__names_the_key(changes, classes, named, tmp_path, monkeypatch):
    few, many = (f"folder:{tiny.folder(tmp_path / name, n)}" for name, n in (("few", 4), ("many", 12)))
    monkeypatch.setattr(sources, "open_labelled", lambda spec, _: Numbers("a", 0 if spec == "folder:none" else 4))
    c = config(**{"sources": (few, many), "weights": (1.0, 1.0)} | changes)
    with pytest.raises(UserError, match=named):
        sources.open_sources(c, classes, ("image", "text"))


def test_open_sources__lets_pass_what_fits(tmp_path):
    few, many = (f"folder:{tiny.folder(tmp_path / name, n)}" for name, n in (("few", 4), ("many", 12)))
    assert sources.open_sources(config(sources=(few, many), weights=(1.0, 1.0)), 0, ("image", "text"))
    assert sources.open_sources(config(sources=(few, many), batch=16), 0, ("image", "text"))
    assert sources.open_sources(config(sources=(few, many), batch=99))  # nothing is trained
    assert sources.open_sources(config(sources=(f"folder:{tmp_path}",), batch=99), 2, ("image", "label"))


def test_keys_tell_equal_images_and_captions():
    transform = loader.Transform(config(), 8, tokenizer.load("bytes"), 16, ("image", "text", "image_key", "text_key"))
    order = loader.sample_order([Numbers("a", 300)], config(), seed=3)
    batches = loader.batches(order, transform, batch=8, start=0, stop=45, seed=3)
    seen = {}
    for batch in batches:
        for image, text, *keys in zip(*(batch[field] for field in transform.fields), strict=True):
            seen.setdefault((image.flat[0], text.tobytes()), set()).add(tuple(map(bytes, keys)))
    assert len(seen) == 300 and all(len(keys) == 1 for keys in seen.values())
    images, captions = (len({bytes(key[i]) for keys in seen.values() for key in keys}) for i in (0, 1))
    assert (images, captions) == (256, 300)  # images repeat after 256


def test_no_crop_of_a_jpeg_that_is_decoded_small_is_enlarged(monkeypatch):
    asked, decode = [], images.decode
    monkeypatch.setattr(images, "decode", lambda data, **options: asked.append(options) or decode(data, **options))
    large = bad_tars.encode(bad_tars.picture(0, w=1000, h=750), quality=90)
    for resample, least in (("area", 160), ("bicubic", 0)):
        transform = loader.Transform(config(crop_scale=(0.16, 1.0), resample=resample), 64, None, 0, ("image",))
        transform({"image": large}, np.random.default_rng(0), {"image": np.zeros((1, 64, 64, 3), np.uint8)})
        assert asked[-1]["scaled_to"] == least  # the smallest crop has a side of 0.4


def test_batches_are_the_same_from_any_start_and_on_any_number_of_hosts():
    c = config(caption_transform=KEYWORDS)
    whole = read([Numbers("a", 30)], c)
    parts = [read([Numbers("a", 30)], c, start=2, host=h, hosts=2) for h in range(2)]
    for g, batch in enumerate(whole[2:]):
        for key in batch:
            np.testing.assert_array_equal(np.concatenate([part[g][key] for part in parts]), batch[key])


def test_a_host_reads_the_rows_that_its_devices_hold():
    """Hosts of 2 x 2 chips hold rows that are no neighbours; `loader.to_global` fills them in ascending order."""
    c = config(caption_transform=KEYWORDS, batch=16)
    whole = read([Numbers("a", 30)], c)
    for part in batch_parts(mesh_of(4, 2, 1, [1, 1, 0, 0, 1, 1, 0, 0])).values():
        rows = [2 * shard + i for shard in part.shards for i in range(2)]
        assert rows == ([4, 5, 6, 7, 12, 13, 14, 15] if part.number else [0, 1, 2, 3, 8, 9, 10, 11])
        for mine, batch in zip(
            read([Numbers("a", 30)], c, host=part.number, hosts=part.count, shards=part.shards), whole, strict=True
        ):
            for key in batch:
                np.testing.assert_array_equal(mine[key], batch[key][rows])


def test_threads_read_the_same():
    one, many = (read([Numbers("a", 30)], config(threads=n), stop=10) for n in (1, 16))
    for a, b in zip(one, many, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["text"], b["text"])


class Ramps(Numbers):
    """Images whose crops all differ, of value i in blue."""

    def __getitem__(self, i):
        y, x = np.mgrid[:32, :32]
        return super().__getitem__(i) | {"image": np.stack([8 * y, 8 * x, 0 * x + i], axis=-1).astype(np.uint8)}


def test_seed_and_position_decide_on_samples_crops_and_captions():
    c = config(crop_scale=(0.3, 0.5), caption_transform=KEYWORDS)
    transform = loader.Transform(c, 8, tokenizer.load("bytes"), 30)

    def rows(seed, order_seed=0):
        order = loader.sample_order([Ramps("a", 4)], c, seed=order_seed)
        return next(loader.batches(order, transform, batch=8, start=0, stop=1, seed=seed))

    first, same, other = rows(1), rows(1), rows(2)
    samples, crops = first["image"][:, 0, 0, 2], first["image"][..., :2]
    assert sorted(samples[:4]) == sorted(samples[4:]) == [0, 1, 2, 3]
    for key in ("image", "text"):
        np.testing.assert_array_equal(first[key], same[key])
    # The same samples with other crops and keywords, by another seed and in the next epoch.
    np.testing.assert_array_equal(other["image"][..., 2], first["image"][..., 2])
    assert (other["image"][..., :2] != crops).any(axis=(1, 2, 3)).all() and (other["text"] != first["text"]).any()
    again = 4 + np.argsort(samples[4:])
    assert (crops[np.argsort(samples[:4])] != crops[again]).any(axis=(1, 2, 3)).all()
    assert (rows(1, order_seed=1)["image"][:, 0, 0, 2] != samples).any()


def test_mixture_keeps_the_weights():
    c = config(sources=("x", "y"), weights=(0.75, 0.25))
    seen = texts(read([Numbers("a", 10), Numbers("b", 1000)], c, stop=25))
    share = sum(t.startswith("a") for t in seen) / len(seen)
    assert share == pytest.approx(0.75, abs=0.01)


def test_without_weights_each_sample_of_all_sources_comes_once_an_epoch():
    found = [Numbers("a", 7), Numbers("b", 30), Numbers("c", 63)]
    seen = texts(read(found, config(sources=("x", "y", "z"), batch=20), stop=10))
    for epoch in range(2):
        part = seen[100 * epoch : 100 * epoch + 100]
        assert sorted(part) == sorted(f"{source.name} {i}" for source in found for i in range(len(source)))
    assert len({t[0] for t in seen[:20]}) > 1


def test_captions_are_drawn_and_transformed():
    record = {"text": ["fox", "red fox"], "tags": ["fox", "animal", "tail"]}
    rng = np.random.default_rng(0)

    def captions(record, n, **changes):
        row = {"text": np.zeros((1, 40), np.int32)}
        transform = loader.Transform(config(**changes), 8, tokenizer.load("bytes"), 40)
        return [transform(record, rng, row) or texts([row])[0] for _ in range(n)]

    assert set(captions(record, 50)) == {"fox", "red fox"}
    tails = [", ".join(words) for n in (0, 1, 2, 3) for words in itertools.permutations(record["tags"], n)]
    drawn = [captions(record | {"text": [text]}, 800, caption_transform=KEYWORDS) for text in record["text"]]
    of_fox, of_red = map(set, drawn)
    without = [tail for tail in tails if "fox" not in tail]
    assert of_fox == {"fox", *without[1:], *(f"fox, {tail}" for tail in without[1:])}
    assert of_red == {"red fox", *tails[1:], *(f"red fox, {tail}" for tail in tails[1:])}
    assert captions({"text": ["fox"], "tags": []}, 1, caption_transform=KEYWORDS) == ["fox"]


def test_columns_are_of_the_drawn_caption():
    record = {"text": ["fox", "red fox"], "tags": ["tail"], "a": np.arange(3), "b": lambda text: [len(text), 0]}
    row = {"text": np.zeros((1, 16), np.int32), "a": np.zeros((1, 3)), "b": np.zeros((1, 2))}
    c = config(caption_transform=KEYWORDS)
    transform = loader.Transform(c, 8, tokenizer.load("bytes"), 16, ("text",), {"a": 3, "b": 2})
    assert transform.arrays(4) == {"text": ((4, 16), np.int32), "a": ((4, 3), np.float32), "b": ((4, 2), np.float32)}
    seen = set()
    for seed in range(100):
        transform(record, np.random.default_rng(seed), row)
        assert row["a"].tolist() == [[0, 1, 2]]
        seen.add((*texts([row]), row["b"][0, 0]))
    assert seen == {
        (text, n) for drawn, n in (("fox", 3), ("red fox", 7)) for text in (drawn, f"{drawn}, tail", "tail")
    }
    transform({"text": ["fox"], "tags": []}, np.random.default_rng(0), {"text": row["text"]})  # no column is asked for
    with pytest.raises(UserError, match=r"column 'a' of shape \(\), and a term of the objective reads \(3,\)"):
        transform({key: value for key, value in record.items() if key != "a"}, np.random.default_rng(0), row)


def test_device_transforms():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
    mean, std = transforms.STATISTICS["imagenet"]
    np.testing.assert_allclose(transforms.normalize(images, mean, std), (images / 255 - mean) / std, atol=1e-5)
    key = jax.random.key(0)
    flipped = transforms.augment(images, transforms.sample_augmentations(key, len(images), flip=1.0))
    np.testing.assert_array_equal(flipped, images[:, :, ::-1])
    np.testing.assert_array_equal(transforms.augment(images, transforms.sample_augmentations(key, len(images))), images)
    colored = np.asarray(transforms.augment(images, transforms.sample_augmentations(key, len(images), color=0.3)))
    assert colored.min() >= 0
    assert colored.max() <= 255
    assert np.abs(colored - images).max() > 10
    drawn = np.asarray(transforms.sample_augmentations(key, len(images), color=0.3)["color"])
    assert 0.7 <= drawn.min() < 0.8 < 1.2 < drawn.max() <= 1.3
    brightness, contrast, saturation = drawn.T[..., None, None, None]
    bright = images * brightness
    contrasted = bright.mean(axis=(1, 2, 3), keepdims=True) * (1 - contrast) + contrast * bright
    luma = (contrasted * (0.299, 0.587, 0.114)).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(colored, np.clip(luma + saturation * (contrasted - luma), 0, 255), atol=1e-2)
    gray = np.full((6, 5, 4, 3), 100, np.uint8)
    gray_colored = np.asarray(transforms.augment(gray, transforms.sample_augmentations(key, len(gray), color=0.3)))
    np.testing.assert_allclose(np.ptp(gray_colored, axis=(1, 2, 3)), 0, atol=1e-3)


def counts_of_draws(weighted, missing):
    """Counts of 6,000 draws from two captions in the first of two columns and one in the second."""
    transform = loader.Transform(config(text_columns=weighted), 8, tokenizer.load("bytes"), 16)
    record = {"text": ["a", "b", "c"][missing:], "columns": [0, 0, 1][missing:], "tags": []}
    draws = [transform.draw(record, np.random.default_rng((7, i))) for i in range(6000)]
    assert draws == [transform.draw(record, np.random.default_rng((7, i))) for i in range(6000)]
    return {text: draws.count(text) for text in record["text"]}


@pytest.mark.parametrize(
    ("weighted", "missing", "expected"),
    [
        (("synthetic:0.8", "alt:0.2"), 0, {"a": 0.4, "b": 0.4, "c": 0.2}),
        (("synthetic:1", "alt:3"), 0, {"a": 0.125, "b": 0.125, "c": 0.75}),
        (("synthetic:0.8", "alt:0.2"), 2, {"c": 1}),  # those of the columns that are there
        (("synthetic:1", "alt:0"), 0, {"a": 0.5, "b": 0.5, "c": 0}),
        (("synthetic:1", "alt:0"), 2, {"c": 1}),  # weight 0: for want of others
    ],
)
def test_captions_are_drawn_by_the_weights_of_their_columns(weighted, missing, expected):
    counts = counts_of_draws(weighted, missing)
    for text, p in expected.items():  # five standard deviations of the binomial distribution
        assert abs(counts[text] - 6000 * p) <= 5 * np.sqrt(6000 * p * (1 - p)), text


def test_captions_without_weights_are_drawn_as_ever():
    record = {"text": ["a", "b", "c"], "tags": []}
    for columns in ({}, {"columns": [0, 1, 1]}):
        transform = loader.Transform(config(text_columns=("x", "y")), 8, tokenizer.load("bytes"), 16)
        for seed in range(50):
            rng, same = np.random.default_rng(seed), np.random.default_rng(seed)
            assert transform.draw(record | columns, rng) == "abc"[same.integers(3)]
            assert rng.bit_generator.state == same.bit_generator.state


def test_weights_of_columns_in_tables_and_tars(tmp_path):
    """Each third pair lacks the second caption; a run may start anywhere."""
    bad_tars.pairs(tmp_path / "0.tar", 0, 30)
    for i in range(30):
        (tmp_path / f"{i}.jpg").write_bytes(bad_tars.jpeg(i))
    rows = [f"{i}.jpg,s {i},{f'a {i}' if i % 3 else ''}" for i in range(30)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,synthetic,og:alt", *rows]))
    for spec, columns, first, share in (
        (f"csv:{tmp_path}/pairs.csv", ("synthetic:0.9", "og:alt:0.1"), "s", 1 / 3 + 0.9 * 2 / 3),
        (f"tar:{tmp_path}/0.tar", ("caption:0.9", "text:0.1"), "j", 0.9),
    ):
        c = config(sources=(spec,), text_columns=columns, crop_scale=(1, 1))
        opened = sources.open_sources(c)
        whole = read(opened, c, stop=150)
        n = 150 * 8
        drawn = sum(text.startswith(first) for text in texts(whole))
        assert abs(drawn - n * share) <= 5 * np.sqrt(n * share * (1 - share))
        assert texts(read(opened, c, start=97, stop=103)) == texts(whole[97:103])
