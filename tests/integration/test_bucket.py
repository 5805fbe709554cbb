"""A run's folder in a bucket, which here is fsspec's file system in memory."""

import types

import pytest
from etils import epath

from tests.data.test_tokenizer import save_words
from tests.helpers import made_results, tiny
from tests.helpers.bucket import Bucket, register
from tests.integration.test_same_data import compare
from xclip_jax.commands import export
from xclip_jax.config import schema
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunReader
from xclip_jax.data import tokenizer
from xclip_jax.train import checkpoint_files, checks, prepare, weights
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.log import MetricLogger
from xclip_jax.train.run_writer import RunWriter

pytestmark = pytest.mark.long

TEXTS = ["picture 3", "number 4 picture"]


@pytest.fixture
def bucket(monkeypatch):
    """Name of a bucket of this test."""
    register()
    monkeypatch.setattr(checkpoint_files, "STORES", ("s3",))  # as for gs://, see `tests.helpers.bucket`
    yield "s3://bucket"
    epath.Path("s3://bucket").rmtree(missing_ok=True)


def test_a_run_with_a_tokenizer_file_resumes_and_is_exported(bucket, pairs, tmp_path, monkeypatch):
    words = save_words(tmp_path / "words.json", ["?", "<pad>", "<s>", "</s>", "picture", "number"])
    expected = tokenizer.load(words)(TEXTS, 6)
    assert expected[0].tolist() == [2, 4, 0, 3, 1, 1]
    config = schema.resolve(tiny.short(pairs, f"{bucket}/runs/mine", data__tokenizer=words))
    folder = RunWriter(config.run)
    first, _ = prepare.prepare(config, folder)
    with folder.claimed(config, first.fingerprints):
        (folder.checkpoints / "2" / "state").mkdir(parents=True)
        (folder.checkpoints / "2" / "state" / "manifest").write_text("")
    assert folder.latest_step() == 2
    (tmp_path / "words.json").unlink()  # as on a machine that was made again

    folder.check(config)
    again, _ = prepare.prepare(config, folder)
    copy = f"{bucket}/runs/mine/tokenizer.json"
    assert again.experiment.tokenizer.name == copy
    assert again.experiment.tokenizer(TEXTS, 6).tolist() == expected.tolist()
    compared = compare(monkeypatch)
    checks.check_same_data(again.experiment, again.fingerprints, again.final_evaluators)
    assert "tokenizer file" in compared[0][0]

    # Orbax would read the checkpoint by a client of its own, from the real store.
    with Checkpointer(tmp_path / "local") as checkpointer:
        checkpointer.save(tiny.drawn(first.experiment), {"samples": 0})
    monkeypatch.setattr(weights, "Checkpointer", lambda _, **options: Checkpointer(tmp_path / "local", **options))
    loaded, experiment, *_ = weights.load(config.run)
    assert loaded.data.tokenizer == copy and experiment.tokenizer(TEXTS, 6).tolist() == expected.tolist()
    export.export(config.run, str(tmp_path / "out"), to="safetensors")
    assert tokenizer.load(str(tmp_path / "out" / "tokenizer.json"))(TEXTS, 6).tolist() == expected.tolist()


def test_an_evaluation_is_in_both_files_or_is_repeated(bucket, pairs):
    """What reaches the bucket at once is an evaluation; a host that is lost before its metrics leaves no result."""
    config = schema.resolve(tiny.short(pairs, f"{bucket}/runs/mine", log__trackers=()))
    run, results = prepare.prepare(config, RunWriter(config.run))[0], made_results.zero_shot("x")
    parts = types.SimpleNamespace(file=types.SimpleNamespace(flush=lambda: None))

    def opened(start):
        return MetricLogger(run, start, parts, parts, began=0.0)

    first = opened(0)
    first.write_results(2, results)
    reader = RunReader(config.run)
    for lines in (reader.read_evaluations(), reader.read_metrics()):
        assert [line["step"] for line in lines] == [2]
    first.end()
    resumed = opened(2)
    assert resumed.has_evaluation(2) and len(reader.read_evaluations()) == 1
    resumed.end()
    reader.metrics_file.write_text("")
    repeated = opened(2)
    assert not repeated.has_evaluation(2)
    repeated.write_results(2, results)
    assert [line["step"] for line in reader.read_evaluations()] == [2]
    repeated.end()


@pytest.mark.parametrize("read", [lambda run: RunReader(run).read_config(), weights.load])
def test_a_bucket_that_refuses_or_cannot_be_opened_is_one_sentence(read, bucket, monkeypatch):
    def refuse(*_):
        raise PermissionError("Access Denied")

    with monkeypatch.context() as refusing:
        refusing.setattr(Bucket, "exists", refuse)
        with pytest.raises(PermissionError) as refused:
            read(f"{bucket}/runs/mine")
    assert refused.value.filename.startswith(f"{bucket}/runs/mine")
    for address, message in {
        "az://box/a": "pip install 'adlfs'",
        "https://host/a": "is neither local nor in a bucket",
    }.items():
        with pytest.raises(UserError, match=message):
            read(address)


def test_requests_for_a_digest_do_not_grow_with_the_files(bucket):
    """Each takes some 50 ms, and a checkpoint of a large pod has a thousand files."""
    counted = []
    for n in (2, 60):
        folder = epath.Path(f"{bucket}/runs/{n}/4")
        for item in ("state", "position"):
            (folder / item).mkdir(parents=True)
            for i in range(n):
                (folder / item / f"{i}").write_text("x" * i)
        Bucket.requests.clear()
        checkpoint_files.write_digest(folder, 4)
        assert checkpoint_files.find_fault(folder, 4) is None
        counted.append(sum(f"/runs/{n}/" in request for request in Bucket.requests))  # a thread of Orbax has others
    assert counted[0] == counted[1] > 0
    (folder / "state" / "7").write_text("x")
    assert checkpoint_files.find_fault(folder, 4).startswith("state/7 ")
    (folder / "state" / "7").unlink()
    assert checkpoint_files.find_fault(folder, 4).startswith("state/7 ")


def test_a_tokenizer_that_a_bucket_lacks_is_one_sentence(bucket):
    with pytest.raises(UserError, match=r"tokenizer 's3://bucket/none\.json' must be one of .* or the path of a"):
        tokenizer.load(f"{bucket}/none.json")
    with pytest.raises(UserError, match=r"/none\.json' is neither local nor in a bucket"):
        tokenizer.load("https://host/none.json")
