"""A run resumes in the same order of samples, or says which source could be read differently before."""

import json
import types

import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.encoding import SIZE
from xclip_jax.config.schema import resolve
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import holdout, images, loader, sources, tokenizer
from xclip_jax.data.readers.folder import FolderSource
from xclip_jax.processes import runtime
from xclip_jax.train import checks, prepare
from xclip_jax.train.run_writer import RunWriter

pytestmark = pytest.mark.long


class Run:
    """A run of 40 pairs, two of which have the same caption; record `bad` cannot be read."""

    def __init__(self, path, monkeypatch):
        self.path, self.bad, self.monkeypatch = path, None, monkeypatch
        pairs, read = tiny.folder(path / "pairs", 40), FolderSource.__getitem__

        def failing(source, index):
            if index == self.bad:
                raise OSError("input/output error")
            return read(source, index)

        monkeypatch.setattr(FolderSource, "__getitem__", failing)
        keys = {"data__holdout": 0.25, "data__spread_duplicate_captions": True, "data__batch": 8}
        self.config = resolve(tiny.short(pairs, path / "run", **keys))
        (part,) = self.open()
        self.trained = part.indices.tolist()
        self.held_out = [i for i in range(40) if i not in self.trained]
        for index in self.twins:
            (pairs / f"{index:03d}.txt").write_text("the same")

    @property
    def twins(self):
        return self.trained[3:5]

    def open(self):
        self.monkeypatch.setattr(holdout, "_known", {})  # of this process
        return sources.open_sources(self.config.data)

    def prepare(self):
        self.monkeypatch.setattr(holdout, "_known", {})
        return prepare.prepare(self.config, RunWriter(self.config.run))[0]

    def start(self):
        """Write what a run leaves that has a checkpoint."""
        prepared = self.prepare()
        with prepared.folder.claimed(self.config, prepared.fingerprints):
            (prepared.folder.checkpoints / "2").mkdir(parents=True)
        return prepared


@pytest.fixture
def run(tmp_path, monkeypatch):
    return Run(tmp_path, monkeypatch)


def test_a_record_that_cannot_be_read_at_a_restart_is_said(run):
    first = run.start()
    places = [first.order.locate(i) for i in range(100)]
    again = run.prepare()
    assert again.fingerprints == first.fingerprints and [again.order.locate(i) for i in range(100)] == places
    for bad in (run.held_out[1], run.twins[1]):
        run.bad = bad
        with pytest.raises(UserError, match=r"source 0, 'folder:.*', has changed since .*data\.json.*readable records"):
            run.prepare()
    run.bad = run.trained[0]  # is in training, and has a caption of its own, in both cases
    again = run.prepare()
    assert [again.order.locate(i) for i in range(100)] == places
    (fingerprint,) = json.loads(first.folder.data_file.read_text())
    assert fingerprint["samples"] == len(run.trained)  # and not those that are held out


def compare(monkeypatch):
    """What a process that has others compares with them, each with the remedy."""
    compared = []
    others = types.SimpleNamespace(check_same=lambda facts, remedy: compared.append((facts, remedy)))
    monkeypatch.setattr(runtime, "peers", lambda: others)
    return compared


def test_hosts_compare_their_newest_checkpoints(run, monkeypatch):
    """Of a folder that they do not share only one has any; each would go on by itself, and wait for the other."""
    compared, folder = compare(monkeypatch), RunWriter(run.config.run)
    checks.check_same_config(run.config, folder)
    run.start()
    checks.check_same_config(run.config, folder)
    (before, remedy), (after, _) = compared
    name = "newest checkpoint in --config.run"
    assert {key for key in after if before[key] != after[key]} == {name} and (before[name], after[name]) == (None, 2)
    assert "--config.run on storage that all share" in remedy
    assert "optim.lr" in after and "data.threads" not in after


def test_hosts_compare_their_evaluation_sets(tmp_path, monkeypatch):
    pairs, others = tiny.folder(tmp_path / "pairs", 16), tiny.folder(tmp_path / "others", 12)
    keys = {"eval__sets": (f"retrieval/folder:{others}",), "eval__every": 2, "data__batch": 8}
    config, compared = resolve(tiny.short(pairs, tmp_path / "run", **keys)), compare(monkeypatch)

    def check():
        made, _ = prepare.prepare(config, RunWriter(config.run))
        checks.check_same_data(made.experiment, made.fingerprints, made.final_evaluators)
        return compared[-1][0]

    first, again = check(), check()
    (others / "003.txt").write_text("another text")
    changed = check()
    (others / "003.png").unlink()
    fewer = check()
    assert first == again and "evaluation sets" in compared[0][1]
    (name,) = (key for key in first if key.startswith("evaluation set 0, retrieval/"))
    assert all({key for key in first if first[key] != other[key]} == {name} for other in (changed, fewer))
    assert len({first[name], changed[name], fewer[name]}) == 3


def test_hosts_compare_the_weights_that_they_start_from(run, monkeypatch):
    compared, made = compare(monkeypatch), run.prepare()
    for value in (1.0, 1.0, 2.0):
        checks.check_same_data(made.experiment, [], (), {"b": np.ones(()), "a": np.full((2, 3), value)})
    assert compared[0] == compared[1] and "init.weights" in compared[0][1]
    assert {key for key, x in compared[0][0].items() if compared[2][0][key] != x} == {"tensors of init.weights"}


def test_hosts_compare_what_they_could_read(run, monkeypatch):
    compared = compare(monkeypatch)
    for bad in (None, run.held_out[0], run.twins[0], run.trained[0]):
        run.bad = bad
        made = run.prepare()
        checks.check_same_data(made.experiment, made.fingerprints, made.final_evaluators)
    (facts, remedy), *others = compared
    assert "and all records" in remedy
    differing = [{key for key in facts if facts[key] != other[key]} for other, _ in others]
    assert differing == [{"source 0"}, {"source 0"}, set()]


def test_hosts_may_list_the_keys_of_a_fingerprint_in_another_order(run, monkeypatch):
    compared = compare(monkeypatch)
    made = run.prepare()
    for files in ({"a": 1, "b": 2}, {"b": 2, "a": 1}):
        checks.check_same_data(made.experiment, [{"samples": 2, "files": files}], ())
    assert compared[0] == compared[1]


@pytest.mark.parametrize("weights", [(), (0.7, 0.3)])
def test_captions_are_compared_by_source(weights, tmp_path):
    folders = [tiny.folder(tmp_path / name, 12) for name in "ab"]
    for index in (3, 7):
        (folders[1] / f"{index:03d}.txt").write_text("the same")
    c = loader.DataConfig(
        tuple(f"folder:{x}" for x in folders), weights=weights, batch=4, spread_duplicate_captions=True
    )
    before = loader.sample_order(sources.open_sources(c), c, 0).captions
    (folders[1] / "007.txt").unlink()
    after = loader.sample_order(sources.open_sources(c), c, 0).captions
    assert [x["unreadable"] for x in (*before, *after)] == [0, 0, 0, 1]
    assert after[0] == before[0] and after[1]["digest"] != before[1]["digest"]


def test_captions_of_images_that_cannot_be_decoded_are_the_same_with_a_cache(tmp_path):
    folder = tiny.folder(tmp_path / "pairs", 8)
    (folder / "003.png").write_bytes(b"<html>")
    c = loader.DataConfig((f"folder:{folder}",), batch=4, spread_duplicate_captions=True)
    plain = sources.open_pairs(c.sources[0])
    cached = sources.Decoded(plain)
    assert cached[3]["text"] == plain[3]["text"] and cached[2]["image"].ndim == 3
    with pytest.raises(BadSample):
        images.decode(cached[3]["image"])
    assert loader.sample_order([cached], c, 0).captions == loader.sample_order([plain], c, 0).captions
    transform = loader.Transform(c, SIZE, tokenizer.load("bytes"), 8)
    with pytest.raises(UserError, match=r"003\.png"):
        list(loader.batches(loader.sample_order([cached], c, 0), transform, batch=8, start=0, stop=1, seed=0))
