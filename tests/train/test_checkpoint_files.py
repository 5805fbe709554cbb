import json
import threading

import numpy as np
import pytest
from etils import epath

from tests.helpers import checkpoints
from tests.helpers.checkpoints import HARMLESS, check_is, files_of, make_state, restore, save
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunReader
from xclip_jax.train import checkpoint_files
from xclip_jax.train.checkpoint import Checkpointer

saved, run = checkpoints.saved, checkpoints.run


def flip(content, rng):
    position, changed = rng.integers(len(content)), bytearray(content)
    changed[position] ^= 1 << rng.integers(8)
    return bytes(changed)


DAMAGE = {
    "flip": flip,
    "cut": lambda content, rng: content[: rng.integers(len(content))],
    "longer": lambda content, _: content + b"\0",
    "delete": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damaged_file_is_named_or_harmless(run, damage):
    folder = run / "checkpoints" / "4"
    files = files_of(folder)
    assert len(files) > 8 and {"state/_METADATA", "position/metadata", checkpoint_files.DIGEST_FILE} <= set(files)
    rng = np.random.default_rng(sorted(DAMAGE).index(damage))
    for name in files:
        path = folder / name
        content = path.read_bytes()
        path.unlink() if DAMAGE[damage] is None else path.write_bytes(DAMAGE[damage](content, rng))
        if name in HARMLESS:
            check_is(restore(run), 4)
        else:
            with pytest.raises(UserError) as caught:
                restore(run)
            message = str(caught.value)
            assert f"checkpoints/4 is damaged: {name} " in message and "step 2: --step 2" in message
        path.write_bytes(content)
    check_is(restore(run), 4)


@pytest.fixture
def bucket(monkeypatch):
    """Has all folders taken for ones in a bucket; lists the files that are hashed."""
    hashed, original = [], checkpoint_files._hash
    monkeypatch.setattr(checkpoint_files, "is_remote", lambda _: True)
    monkeypatch.setattr(checkpoint_files, "_hash", lambda path, **_: hashed.append(path) or original(path))
    return hashed


def test_in_a_bucket_names_and_sizes_are_compared_and_nothing_is_hashed(bucket, tmp_path, monkeypatch):
    save(tmp_path, 2, 4)
    folder = tmp_path / "checkpoints" / "4"
    names = [name for name in files_of(folder) if name not in (*HARMLESS, checkpoint_files.DIGEST_FILE)]
    digest = json.loads((folder / checkpoint_files.DIGEST_FILE).read_text())
    assert digest["files"] == {name: [(folder / name).stat().st_size, None] for name in names}
    check_is(restore(tmp_path), 4)
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1])
        assert checkpoint_files.find_fault(epath.Path(folder), 4).startswith(f"{name} ")
        (folder / name).write_bytes(flip(content, np.random.default_rng(0)))
        assert checkpoint_files.find_fault(epath.Path(folder), 4) is None
        (folder / name).write_bytes(content)
    assert bucket == []
    monkeypatch.undo()  # copied to a disk
    check_is(restore(tmp_path), 4)


def test_in_a_bucket_a_checkpoint_gets_its_digest_under_its_final_name(run):
    path = run / "checkpoints" / "4" / checkpoint_files.DIGEST_FILE
    content = path.read_bytes()
    path.unlink()
    with Checkpointer(run) as checkpointer:
        checkpointer._saving = 4
        checkpointer._write_digest()
    assert path.read_bytes() == content


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
        assert RunReader(tmp_path).steps() == []
        with pytest.raises(UserError, match="holds no checkpoint"):
            restore(tmp_path)
        checkpointer.raise_failure()
        go.set()
    assert (tmp_path / "checkpoints" / "2" / checkpoint_files.DIGEST_FILE).exists()
    check_is(restore(tmp_path), 2)
