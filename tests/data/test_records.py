"""Reading of many records by several threads."""

import subprocess
import sys
import threading
import time

import pytest

from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import base, records


class Slow(base.Source):
    """Record i is {"number": i}; chunks take the longer the earlier they are. Record 5 is bad, `hangs` never comes."""

    def __init__(self, n, hangs=-1, fails=-1):
        self.n, self.hangs, self.fails, self.released = n, hangs, fails, threading.Event()
        self.asked = []

    def __len__(self):
        return self.n

    def fingerprint(self):
        return {"samples": self.n, "hash": "slow"}

    def __getitem__(self, i):
        self.asked.append(i)
        if i % 32 == 0:
            time.sleep(0.02 * (3 - i // 32 % 4))
        if i == self.hangs:
            self.released.wait(60)
        if i == self.fails:
            raise UserError("the disk is not mounted; mount it.")
        if i == 5:
            raise BadSample("no caption")
        return {"number": i}


def halved(record):
    return record["number"] // (record["number"] != 9) / 2  # 9 cannot be divided


def read(source, threads=1):
    return records.read_each(((source, i) for i in range(len(source))), halved, threads=threads)


def test_results_are_in_order_whatever_the_threads():
    for threads in (1, 5):
        results = list(read(Slow(300), threads))
        assert [i for i, x in enumerate(results) if isinstance(x, BadSample)] == [5, 9]
        assert (results[5].reason, results[9].reason) == ("no caption", "ZeroDivisionError")
        assert [x for x in results if not isinstance(x, BadSample)] == [i / 2 for i in range(300) if i not in (5, 9)]
    assert list(read(Slow(0))) == []


def test_a_record_that_hangs_is_bad(monkeypatch):
    monkeypatch.setattr(records, "READ_TIMEOUT", 0.2)
    source = Slow(100, hangs=40)
    results = list(read(source, threads=2))
    assert results[40].reason == "read takes too long" and results[41] == 20.5 and len(results) == 100
    source.released.set()
    for thread in [thread for thread in threading.enumerate() if thread.name == "read"]:
        thread.join(60)
    assert sorted(source.asked) == list(range(100))  # what comes after the slow record is not read twice


def test_an_error_of_all_records_is_raised():
    with pytest.raises(UserError, match="not mounted"):
        list(read(Slow(100, fails=70), threads=2))


def test_places_are_taken_as_they_are_needed():
    taken = []
    source = Slow(10_000)
    places = ((source, taken.append(i) or i) for i in range(len(source)))
    reading = records.read_each(places, lambda record: record["number"], threads=1)
    assert next(reading) == 0 and len(taken) < 200
    reading.close()


def test_a_signal_does_not_wait_for_a_disk_that_does_not_answer():
    """Neither the reading, of chunks or ahead, nor the end of the process."""
    program = """
import signal, time
from tests.data.test_records import Slow, read, records
with records.ThreadPrefetcher(lambda i: time.sleep(300 * i), 4, threads=2) as ahead:
    ahead[0]
def leave(number, frame):
    raise SystemExit(75)
signal.signal(signal.SIGALRM, leave)
signal.setitimer(signal.ITIMER_REAL, 0.5)
list(read(Slow(100, hangs=40), threads=2))
"""
    process = subprocess.run([sys.executable, "-c", program], timeout=40, capture_output=True, text=True)
    assert process.returncode == 75, process.stderr


def test_an_error_of_a_prefetched_item_is_raised_where_it_is_read():
    def make(i):
        if i == 2:
            raise ValueError(f"item {i}")
        return 10 * i

    with records.ThreadPrefetcher(make, 5, threads=2, window=3) as ahead:
        assert [ahead[1], ahead[0], ahead[3]] == [10, 0, 30]
        with pytest.raises(ValueError, match="item 2"):
            ahead[2]
        assert ahead[4] == 40


def test_prefetched_items_are_read_by_several_threads_in_their_places():
    """A switch between the choice of an item and of its place would exchange two of them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with records.ThreadPrefetcher(lambda i: i, 5000, threads=4) as ahead, records.thread_pool(4) as threads:
            assert list(threads.imap(ahead.__getitem__, range(5000))) == list(range(5000))
    finally:
        sys.setswitchinterval(interval)
