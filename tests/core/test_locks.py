"""The lease of a run's folder in a bucket: who holds it, who waits for it, and who is refused."""

import time

import pytest
from etils import epath

from tests.helpers import tiny
from xclip_jax.config import schema
from xclip_jax.core import locks
from xclip_jax.core.errors import UserError
from xclip_jax.train import training_folder


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "RENEWED_SECONDS", 0.2)
    monkeypatch.setattr(locks, "EXPIRES_SECONDS", 3.0)
    monkeypatch.setattr(locks, "_POLL_SECONDS", 0.05)
    return epath.Path(tmp_path) / ".lock"


def test_a_second_holder_is_refused_while_the_first_renews(path):
    with locks.lease(path):
        assert path.read_text().startswith("process ")
        with pytest.raises(UserError, match=r"is in use by process \d+ on .*; wait for it, or name another path"):
            locks.lease(path).__enter__()
        assert path.exists()
    assert not path.exists()
    with locks.lease(path):
        pass


def test_the_lease_of_a_process_that_was_killed_expires(path, capsys):
    path.write_text(f"process 1 on host\n{time.time()}\n")
    began = time.monotonic()
    with locks.lease(path):
        assert 3 <= time.monotonic() - began < 60
        assert "process 1 on host" not in path.read_text()
    assert "was in use by process 1 on host a moment ago; waiting up to 3 s" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["process 1 on host\n{time}\n", ""], ids=["old", "empty"])
def test_an_old_lease_is_taken_over_at_once(path, content, capsys):
    path.write_text(content.format(time=time.time() - 1000))
    with locks.lease(path):
        assert "waiting" not in capsys.readouterr().out


def test_two_that_began_at_the_same_moment_are_warned(path, capsys):
    with locks.lease(path):
        path.write_text(f"process 1 on host\n{time.time()}\n")
        deadline, out = time.monotonic() + 60, ""
        while "is in use by process 1 on host too; stop one of the two" not in out and time.monotonic() < deadline:
            time.sleep(0.05)
            out += capsys.readouterr().out
        assert time.monotonic() < deadline


def test_it_is_renewed_after_another_run_has_ended(path, capsys):
    with locks.lease(path):
        path.unlink()
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert path.exists() and "WARNING" not in capsys.readouterr().out
    assert not path.exists()


def test_it_is_left_to_another_holder(path, monkeypatch):
    monkeypatch.setattr(locks, "RENEWED_SECONDS", 1000)  # longer than the test
    with locks.lease(path):
        path.write_text("process 1 on host\n0\n")
    assert path.read_text() == "process 1 on host\n0\n"


def test_a_run_in_a_bucket_holds_it(path, monkeypatch):
    monkeypatch.setattr(training_folder, "is_remote", lambda _: True)
    folder = training_folder.TrainingFolder(path.parent)
    c = schema.resolve(tiny.config(run=path.parent))
    with folder.claimed(c, []), pytest.raises(UserError, match="is in use by process"), folder.claimed(c, []):
        pass
    assert folder.is_run() and not path.exists()
