"""Samples that cannot be read, decoded or encoded: bad ones are listed and replaced, what concerns the run ends it."""

import json
import threading

import pytest
from etils import epath

from tests.data.test_loader import Numbers, config, read, texts
from xclip_jax.core.errors import UserError, describe
from xclip_jax.data import images, ledger, tokenizer


class Hostile(Numbers):
    """Records with which sources, decoders and tokens' readers raise whatever they like."""

    def __getitem__(self, i):
        record = super().__getitem__(i)
        if i == 3:
            raise RecursionError("maximum recursion depth exceeded")
        if i == 5:
            return record | {"tags": None}
        if i == 8:
            return record | {"image": None}
        if i == 9:
            del record["tags"]
        return record


@pytest.mark.parametrize("apart", [False, True])
def test_any_exception_of_a_sample_makes_it_a_bad_one(tmp_path, apart):
    book = ledger.Ledger(epath.Path(tmp_path), max_bad_fraction=1.0)
    c = config(spread_duplicate_captions=apart)
    batches = read([Hostile("a", 16)], c, stop=2, ledger=book)
    book.sync(16)
    entries = {entry["index"]: entry for entry in map(json.loads, book.path.read_text().splitlines())}
    assert entries.keys() == {3, 5, 8, 9}
    assert entries[3]["reason"] == "RecursionError" and "maximum recursion" in entries[3]["detail"]
    assert entries[5]["reason"] == "TypeError" and entries[9]["reason"] == "KeyError"
    rows = texts(batches)
    assert len(rows) == 16 and not set(rows) & {"a 3", "a 5", "a 8", "a 9"}
    with pytest.raises(UserError, match=r"sample \{.*'index': .* cannot be used"):
        read([Hostile("a", 16)], c, stop=2)


class Dead(Numbers):
    """Samples 3 and 9 are on a disk that does not answer."""

    disk = threading.Event()

    def __getitem__(self, i):
        if i in (3, 9):
            self.disk.wait()
        return super().__getitem__(i)


def test_a_sample_that_is_never_read_is_a_bad_one(tmp_path):
    book = ledger.Ledger(epath.Path(tmp_path), max_bad_fraction=1.0)
    try:
        rows = texts(read([Dead("a", 16)], config(read_timeout=0.2), stop=2, ledger=book))
    finally:
        Dead.disk.set()  # ends the threads
    book.sync(16)
    entries = {entry["index"]: entry for entry in map(json.loads, book.path.read_text().splitlines())}
    assert entries.keys() == {3, 9}
    assert entries[3]["reason"] == "read takes too long" and entries[3]["detail"] == "more than 0.2 s"
    expected = texts(read([Numbers("a", 16)], config(), stop=2))
    same = [row == other for row, other in zip(rows, expected, strict=True) if other not in ("a 3", "a 9")]
    assert len(same) == 14 and all(same)
    assert not set(rows) & {"a 3", "a 9"}


def picky(name, error):
    """A tokenizer that raises on the text "a 5"."""

    def encode(text):
        if text == "a 5":
            raise error
        return [7] * len(text)

    return tokenizer.Tokenizer(name, encode, vocab_size=10, sot_id=1, eot_id=2, pad_id=0)


def test_a_text_that_the_tokenizer_cannot_encode_is_a_bad_sample(tmp_path):
    book = ledger.Ledger(epath.Path(tmp_path), max_bad_fraction=1.0)
    batches = read([Numbers("a", 16)], config(), stop=2, ledger=book, tokens=picky("x", OverflowError("too long")))
    book.sync(16)
    (entry,) = map(json.loads, book.path.read_text().splitlines())
    assert (entry["index"], entry["reason"], entry["detail"]) == (5, "OverflowError", "too long")
    assert sum(len(batch["text"]) for batch in batches) == 16 and (batches[0]["text"][:, 0] == 1).all()


def test_a_tokenizer_that_lacks_something_ends_the_run_with_the_sample(tmp_path):
    book = ledger.Ledger(epath.Path(tmp_path), max_bad_fraction=1.0)
    with pytest.raises(UserError) as error:
        read([Numbers("a", 16)], config(), stop=2, ledger=book, tokens=picky("x", UserError("no unknown token")))
    assert describe(error.value) == 'no unknown token; in sample {"source": 0, "index": 5}.'


@pytest.mark.parametrize("error", [UserError("no bucket"), MemoryError("all of it"), KeyboardInterrupt("stop")])
@pytest.mark.parametrize("where", ["record", "image"])
def test_what_concerns_the_whole_run_ends_it(tmp_path, monkeypatch, error, where):
    def fail(*_, **__):
        raise error

    book = ledger.Ledger(epath.Path(tmp_path), max_bad_fraction=1.0)
    if where == "record":
        monkeypatch.setattr(Numbers, "__getitem__", fail)
    else:
        monkeypatch.setattr(images, "decode", fail)
    with pytest.raises(type(error), match=str(error)):
        read([Numbers("a", 16)], config(threads=0), stop=2, ledger=book)
