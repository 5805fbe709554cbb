"""When a checkpoint is saved, which ones are kept, and what a save that fails leaves."""

import resource
import shutil
import subprocess
import threading
import time

import orbax.checkpoint as ocp
import pytest

from tests.helpers import checkpoints
from tests.helpers.checkpoints import check_is, files_of, make_state, restore, resume, save
from xclip_jax.config import schema
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.train import checkpoint_files
from xclip_jax.train.checkpoint import Checkpointer

saved, run = checkpoints.saved, checkpoints.run


def test_the_digest_is_in_the_checkpoint_before_it_has_its_name(tmp_path, monkeypatch):
    """So that no kill can leave a checkpoint without one; and the step after does not wait for it."""
    began, go, original = threading.Event(), threading.Event(), checkpoint_files.write_digest

    def write(folder, step):
        began.set()
        assert go.wait(60)
        original(folder, step)

    monkeypatch.setattr(checkpoint_files, "write_digest", write)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(make_state(2), {"samples": 16, "batch": 8})
        assert began.wait(60)
        assert RunFolder(tmp_path).steps() == []
        with pytest.raises(UserError, match="holds no checkpoint"):
            restore(tmp_path)
        checkpointer.raise_failure()
        go.set()
    assert (tmp_path / "checkpoints" / "2" / checkpoint_files.DIGEST_FILE).exists()
    check_is(restore(tmp_path), 2)


def test_orbax_asks_the_preemption_service_nothing(tmp_path, monkeypatch):
    """It knows the questions of the training loop alone, see `interrupt.PreemptionHandler`."""
    monkeypatch.setattr(ocp.CheckpointManager, "reached_preemption", lambda _, step: pytest.fail(f"asked {step}"))
    save(tmp_path, 2, 4)
    assert RunFolder(tmp_path).steps() == [2, 4]


def test_which_checkpoints_are_kept(tmp_path):
    save(tmp_path, *range(2, 22, 2), keep=2, keep_every=6)
    assert RunFolder(tmp_path).steps() == [6, 12, 18, 20]
    for step in RunFolder(tmp_path).steps():
        check_is(restore(tmp_path, step), step)


def test_keys_that_do_not_go_together():
    for every, keep_every in ((0, 10), (4, 10), (10, 4)):
        with pytest.raises(
            UserError, match=rf"checkpoint.keep_every={keep_every} must be a multiple of checkpoint.every"
        ):
            schema.resolve(
                {"steps": 100, "optim": {"warmup": 1}, "checkpoint": {"every": every, "keep_every": keep_every}}
            )
    schema.resolve({"steps": 100, "optim": {"warmup": 1}, "checkpoint": {"every": 5, "keep_every": 10}})


def test_a_later_checkpoint_is_not_taken_for_a_save(run):
    with Checkpointer(run) as checkpointer, pytest.raises(UserError, match="has a checkpoint of a later step than 3"):
        checkpointer.save(make_state(3), {"samples": 24, "batch": 8})


# When it cannot be written


@pytest.fixture
def no_large_files():
    """The system refuses to write beyond 5 kB of a file, as a full disk would anywhere."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


FAILED = (
    r"the checkpoint of step 6 could not be written to .*/checkpoints \(.*\): it needs up to 9\d\.\d+ KiB, .* are free"
)


def wait_for_failure(checkpointer):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        checkpointer.raise_failure()
        time.sleep(0.01)


def test_a_save_that_fails_is_reported_at_once_and_costs_no_other(run, no_large_files, caplog):
    with Checkpointer(run) as checkpointer:
        checkpointer.save(make_state(6), {"samples": 48, "batch": 8})
        with pytest.raises(UserError, match=FAILED) as caught:
            wait_for_failure(checkpointer)
        assert "File too large" in str(caught.value) and len(str(caught.value).splitlines()) == 1
        assert checkpointer.latest() == 4
    assert not [record for record in caplog.records if record.exc_info]
    no_large_files()
    assert RunFolder(run).steps() == [2, 4]
    check_is(resume(run), 4)
    save(run, 6)
    check_is(restore(run), 6)
    assert files_of(run / "checkpoints") == sorted(f"{step}/{x}" for step in (2, 4, 6) for x in files_in(run, step))


def files_in(run, step):
    return files_of(run / "checkpoints" / str(step))


def test_the_last_save_of_a_run_is_not_lost_in_silence(run, no_large_files):
    with pytest.raises(UserError, match=FAILED), Checkpointer(run) as checkpointer:
        checkpointer.save(make_state(6), {"samples": 48, "batch": 8})


def test_a_failed_save_does_not_hide_what_ended_the_run(run, no_large_files, capsys):
    with pytest.raises(KeyError, match="of the run"), Checkpointer(run) as checkpointer:
        checkpointer.save(make_state(6), {"samples": 48, "batch": 8})
        raise KeyError("of the run")
    assert "WARNING: the checkpoint of step 6 could not be written" in capsys.readouterr().out


def test_the_next_save_reports_a_failure_too(run, no_large_files):
    with Checkpointer(run) as checkpointer:
        checkpointer.save(make_state(6), {"samples": 48, "batch": 8})
        with pytest.raises(UserError, match=FAILED):
            checkpointer.save(make_state(8), {"samples": 64, "batch": 8})


def test_a_digest_that_cannot_be_written_leaves_no_checkpoint(run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files, "write_digest", full)
    with (
        pytest.raises(UserError, match=r"step 6 could not be written .*\(No space left"),
        Checkpointer(run) as checkpointer,
    ):
        checkpointer.save(make_state(6), {"samples": 48, "batch": 8})
    assert RunFolder(run).steps() == [2, 4]


def test_a_folder_that_vanished_is_not_made_again(run):
    with Checkpointer(run) as checkpointer:
        shutil.move(run / "checkpoints", run / "elsewhere")
        with pytest.raises(UserError, match=r"could not be written to .*\(the folder no longer exists\)"):
            checkpointer.save(make_state(6), {"samples": 48, "batch": 8})
    assert not (run / "checkpoints").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB, where the system lets us have one."""
    where = tmp_path / "disk"
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tests", str(where)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_a_full_disk(small_disk):
    run = small_disk / "run"
    save(run, 2, 4)
    for room in (50_000, 5_000, 0):  # the arrays, the metadata, or not even a folder
        with open(small_disk / "filler", "wb") as filler:
            filler.write(bytes(max(shutil.disk_usage(small_disk).free - room, 0)))
        with pytest.raises(UserError, match=rf"{FAILED[:-12]}.*") as caught, Checkpointer(run) as checkpointer:
            checkpointer.save(make_state(6), {"samples": 48, "batch": 8})
            wait_for_failure(checkpointer)
        assert "(No space left on device)" in str(caught.value)
        check_is(restore(run), 4)
        check_is(restore(run, 2), 2)
        (small_disk / "filler").unlink()
    save(run, 6)
    check_is(restore(run), 6)


def test_a_read_only_disk(small_disk):
    run = small_disk / "run"
    save(run, 2)
    with Checkpointer(run) as checkpointer:
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        with pytest.raises(UserError, match=r"of step 6 could not be written to .*\(Read-only file system\)"):
            checkpointer.save(make_state(6), {"samples": 48, "batch": 8})
            wait_for_failure(checkpointer)
    check_is(restore(run), 2)
