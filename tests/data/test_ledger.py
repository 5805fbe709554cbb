import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from tests.helpers.util import free_address
from xclip_jax.core.errors import UserError
from xclip_jax.data import ledger

ROOT = pathlib.Path(__file__).parents[2]
# Each process notes its half of two batches of 8; process 1 alone has bad samples, and process 0 writes them down.
SCRIPT = """
import sys
from etils import epath
from xclip_jax.data import ledger
from xclip_jax.core.errors import UserError
from xclip_jax.processes import runtime as processes
processes.join(False, sys.argv[2], 2, me := int(sys.argv[3]))
book = ledger.BadSampleLog(epath.Path(sys.argv[1]), max_bad_fraction=0.05)
def entry(i):
    return {"position": i, "reason": "caption is empty", "source": 0, "index": i}
book.add(8, 10 + me, [entry(5)] * me)
book.add(16, 20 + me, [entry(13), entry(12)] * me)
book.sync(8)
book.sync(16)
print(book.counters)
book.add(24, 0, [entry(i) for i in range(16, 70)] * (1 - me))
book.sync(24)
try:
    book.check()
except UserError as error:
    print(str(error)[:35])
"""


def entry(i, index=None, **more):
    return {"position": i, "reason": "not an image", "source": 0, "index": i if index is None else index} | more


def lines(folder):
    return [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]


def test_processes_agree_and_the_first_one_writes(tmp_path):
    address = free_address()
    options = {"cwd": ROOT, "text": True, "env": os.environ | {"XLA_FLAGS": ""}, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), address]
    running = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, **options) for i in range(2)]
    said = [process.communicate(timeout=120) for process in running]
    for out, error in said:
        assert out.splitlines()[-2:] == [  # before them Gloo speaks
            "{'samples': 16, 'tokens': 62, 'bad': {'caption is empty': 3}}",
            "57 of the last 81 samples are bad, ",
        ], error
    assert [line["position"] for line in lines(tmp_path)] == [5, 12, 13, *range(16, 70)]


def test_each_bad_sample_is_written_once_and_counted_each_time(tmp_path):
    book = ledger.BadSampleLog(epath.Path(tmp_path), max_bad_fraction=1.0)
    for epoch in range(3):
        book.add(8 * (epoch + 1), 5, [entry(8 * epoch, index=3), entry(8 * epoch + 1, index=4)])
    book.sync(16)
    assert book.counters == {"samples": 16, "tokens": 10, "bad": {"not an image": 4}}
    assert [line["position"] for line in lines(tmp_path)] == [0, 1]
    assert book.share == pytest.approx(4 / 20)
    book.sync(24)
    assert book.bad == 6
    assert len(lines(tmp_path)) == 2


def test_what_several_processes_load_counts_once(tmp_path, monkeypatch):
    """Four processes, of which 0 and 1, and 2 and 3, load the same rows."""
    gathered = [[0, 10, [entry(1)]], [0, 10, [entry(1) | {"detail": "here"}]], [1, 7, [entry(6)]], [1, 7, [entry(6)]]]
    monkeypatch.setattr(ledger, "_gather", lambda content: [content, *gathered[1:]])
    book = ledger.BadSampleLog(epath.Path(tmp_path), max_bad_fraction=1.0)
    book.add(8, 10, [entry(1)], 0)
    book.sync(8)
    assert book.counters == {"samples": 8, "tokens": 17, "bad": {"not an image": 2}}
    assert [line["position"] for line in lines(tmp_path)] == [1, 6]
    for other in ([0, 10, []], [0, 9, [entry(1)]], [0, 10, [entry(1, index=5)]]):
        gathered[1] = other
        book.add(16, 10, [entry(1)], 0)
        with pytest.raises(UserError, match=r"processes that load the same rows .* read different samples"):
            book.sync(16)


def test_messages_of_processes_have_few_lengths(monkeypatch):
    """Each length is compiled once. The second process has something else to say, now longer and now shorter."""
    mine, others = ["a" * n for n in (0, 1, 700, 1500)], ["b" * n for n in (900, 1022, 3, 1700)]
    lengths, messages = [], iter(json.dumps(other).encode() for other in others)

    def process_allgather(x):
        if x.ndim == 0:
            process_allgather.message = next(messages)
            return np.stack([x, np.asarray(len(process_allgather.message))])
        lengths.append(len(x))
        other = np.frombuffer(process_allgather.message, np.uint8)
        return np.stack([x, np.pad(other, (0, len(x) - len(other)))])

    monkeypatch.setattr(ledger.jax, "process_count", lambda: 2)
    monkeypatch.setattr(ledger.multihost_utils, "process_allgather", process_allgather)
    assert [ledger._gather(content) for content in mine] == [list(pair) for pair in zip(mine, others, strict=True)]
    assert lengths == [1024, 1024, 1024, 2048]


def test_share_is_of_a_thousand_at_least(tmp_path):
    book = ledger.BadSampleLog(epath.Path(tmp_path), max_bad_fraction=0.05)
    book.add(8, 0, [entry(i) for i in range(50)])
    book.sync(8)
    book.check()
    book.add(16, 0, [entry(50)])
    book.sync(16)
    with pytest.raises(UserError, match=r"51 .* 67 .*data\.max_bad_fraction=0\.05 .*not an image: 51.*=0\.06"):
        book.check()


def test_a_failure_after_long_good_data_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "_WINDOW", 2000)
    book = ledger.BadSampleLog(
        epath.Path(tmp_path), max_bad_fraction=0.05, start=100_000, counters={"samples": 100_000}
    )
    for end in range(101_000, 105_000, 1000):  # 100 of 2,100 are not too many
        book.add(end, 0, [entry(end - i) for i in range(1, 51)])
        book.sync(end)
        book.check()
    book.add(105_000, 0, [entry(105_000 - i) for i in range(1, 101)])
    book.sync(105_000)
    book.check()
    book.add(106_000, 0, [entry(106_000 - i) for i in range(1, 51)])
    book.sync(106_000)
    with pytest.raises(ledger.TooManyBadSamples, match=r"^150 of the last 2,150 .* not an image: 350"):
        book.check()
    assert book.share < 0.01


def test_the_first_bad_samples_are_listed_and_all_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "_MOST_LISTED", 3)
    for start in (0, 16):  # a run that resumes knows what is listed
        counters = {"samples": start, "bad": {"not an image": start // 2}}
        book = ledger.BadSampleLog(epath.Path(tmp_path), max_bad_fraction=1.0, start=start, counters=counters)
        for end in (start + 8, start + 16):
            book.add(end, 0, [entry(end - 2), entry(end - 1), entry(end - 3, index=6), entry(end - 4)])
            book.sync(end)
    assert [line["position"] for line in lines(tmp_path)] == [4, 5, 7]
    assert book.bad == 8 + 8
