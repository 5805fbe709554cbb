"""The order of a run's samples, and how its threads read them."""

import dataclasses
import threading

import numpy as np
import pytest

from tests.data.test_loader import Numbers, config, read, texts
from xclip_jax.core.errors import BadSample
from xclip_jax.data import loader, sources, tokenizer

pytestmark = pytest.mark.long


class Drawings(Numbers):
    """Three artists' pictures of each of n / 3 things, artist after artist."""

    def __getitem__(self, i):
        if i == 7:
            raise BadSample("no image file")
        return super().__getitem__(i) | {"text": [f"{self.name} {i % (self.n // 3)}"], "tags": []}


@pytest.mark.parametrize("weights", [(), (0.7, 0.3)])
def test_equal_captions_are_kept_apart(weights):
    found = [Drawings("a", 600), Drawings("b", 300)]
    c = config(sources=("x", "y"), weights=weights, batch=64, spread_duplicate_captions=True)
    order = loader.sample_order(found, c, seed=3)
    places = [order.places[i] for i in range(3 * 900)]
    mixed = loader.sample_order(found, dataclasses.replace(c, spread_duplicate_captions=False), seed=3)

    def repeated(places):
        names = [(number, index % (len(found[number]) // 3)) for number, index in places]
        return sum(64 - len(set(names[i : i + 64])) for i in range(0, len(names) - 63, 64))

    # Left over are those about the ends of epochs.
    assert repeated(places) < repeated([mixed.places[i] for i in range(len(places))]) / 4
    for number, source in enumerate(found):
        epoch = [index for at, index in places if at == number][: 2 * len(source)]
        first, second = epoch[: len(source)], epoch[len(source) :]
        assert sorted(first) == sorted(second) == list(range(len(source))) and first != second
        if weights or number == 0:
            ends = [index % (len(source) // 3) for index in first]
            assert all(len(set(ends[i : i + 64])) == 64 for i in range(0, len(source) - 63, 64))
    again = loader.sample_order(found, c, seed=3)
    assert [again.places[i] for i in (2500, 10, 1700)] == [places[i] for i in (2500, 10, 1700)]


def test_as_many_batches_are_read_at_once_as_there_are_threads():
    threads = 12
    barrier = threading.Barrier(threads, timeout=60)

    class Waiting(Numbers):
        def __getitem__(self, i):
            barrier.wait()  # one sample a batch: all threads meet in the same round
            return super().__getitem__(i)

    batches = read([Waiting("a", 64)], config(threads=threads, batch=1), stop=threads)
    assert len(batches) == threads


def test_an_order_of_all_captions_decodes_no_image(monkeypatch):
    decoded = []
    decode = sources.images.decode
    monkeypatch.setattr(sources.images, "decode", lambda image, **how: decoded.append(1) or decode(image, **how))
    order = loader.sample_order([Numbers("a", 6)], config(spread_duplicate_captions=True, cache=True), seed=0)
    assert not decoded
    (source,) = order.sources
    images = [source[i]["image"] for i in range(6)]
    assert len(decoded) == 6
    assert all(source[i]["image"] is images[i] for i in range(6)) and len(decoded) == 6


# What is random, as it was for the runs that exist. Where one of these changes, a run resumes with other samples.

PLACES = {
    "plain": ({}, "b5 a7 a15 b2 b1 b10 b14 a20 a28 a23 a1 a5 b7 a11 b11 a6"),
    "weighted": ({"weights": (0.7, 0.3)}, "a13 a7 a15 b12 a12 a18 b4 a8 a24 b1 a20 a28 a23 b7 a1 a5"),
    "spread": ({"spread_duplicate_captions": True}, "a23 a16 b4 a17 a15 b1 a24 a19 a21 b13 b12 a20 b0 a28 a22 a3"),
}


@pytest.mark.parametrize("name", PLACES)
def test_the_order_of_a_seed_stays(name):
    changes, expected = PLACES[name]
    order = loader.sample_order([Drawings("a", 30), Drawings("b", 15)], config(sources=("x", "y"), **changes), seed=1)
    places = map(order.locate, range(16))
    assert " ".join(f"{'ab'[number]}{index}" for number, index in places) == expected


def test_the_crop_and_the_caption_of_a_position_stay():
    class Ramp(Numbers):
        """Red is twice the column, green twice the row."""

        def __getitem__(self, i):
            y, x = np.mgrid[:100, :100].astype(np.uint8)
            image = np.stack([2 * x, 2 * y, 0 * x], axis=-1)
            return {"image": image, "text": ["one", "two", "three"], "tags": ["red", "blue", "green"]}

    c = config(caption_transform="xclip_jax.demo.emoji:add_keywords:tags", batch=1)
    transform = loader.Transform(c, 2, tokenizer.load("bytes"), 40)
    order = loader.sample_order([Ramp("a", 4)], c, seed=1)
    (batch,) = loader.batches(order, transform, batch=1, start=6, stop=7, seed=1)
    assert texts([batch]) == ["blue, green, red"]
    corners = batch["image"][0, [0, 1], [0, 1], :2].astype(int)
    np.testing.assert_allclose(corners, [[59, 58], [147, 128]], atol=1)  # versions of OpenCV may round otherwise
