"""The order of a run's samples, and how its threads read them."""

import dataclasses
import pickle
import threading

import numpy as np
import pytest

from tests.test_loader import Numbers, config, read
from xclip_jax.data import loader, sources
from xclip_jax.errors import BadSample


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

    batches = read([Waiting("a", 64)], config(threads=threads, buffer=2, batch=1), stop=threads)
    assert len(batches) == threads


def test_the_order_of_an_epoch_is_made_once(monkeypatch):
    made, make = [], loader._SpreadDuplicates._order
    monkeypatch.setattr(loader._SpreadDuplicates, "_order", lambda self, epoch: made.append(epoch) or make(self, epoch))
    order = loader._SpreadDuplicates(np.arange(200_000), seed=0)
    barrier, found = threading.Barrier(8), []

    def place():
        barrier.wait()
        found.append(order(5))

    threads = [threading.Thread(target=place) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [0] and len(set(found)) == 1
    assert pickle.loads(pickle.dumps(order))(5) == found[0]


def test_an_order_of_all_captions_decodes_no_image(monkeypatch):
    decoded = []
    decode = sources.transforms.decode
    monkeypatch.setattr(sources.transforms, "decode", lambda image: decoded.append(1) or decode(image))
    order = loader.sample_order([Numbers("a", 6)], config(spread_duplicate_captions=True, cache=True), seed=0)
    assert not decoded
    images = {order.place(i): order[i]["image"] for i in range(6)}
    assert len(images) == len(decoded) == 6
    assert all(order[i]["image"] is images[order.place(i)] for i in range(6, 12)) and len(decoded) == 6
