import resource
import shutil
import subprocess
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from tests.helpers import checkpoints
from tests.helpers.checkpoints import ABSTRACT, abstract, check_is, damage, make_state, restore, resume, save
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunReader
from xclip_jax.train.checkpoint import Checkpointer

saved, run = checkpoints.saved, checkpoints.run


def test_the_newest_whole_checkpoint_is_used_and_the_others_move_aside(run, capsys):
    save(run, 6, keep=9)
    folder = run / "checkpoints"
    names = {step: damage(folder / str(step)) for step in (4, 6)}
    check_is(resume(run), 2)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("WARNING: damaged, ") and line.endswith("to step 2, the newest whole one")
    assert all(f"checkpoints/{step} ({name} has other bytes than were written)" in line for step, name in names.items())
    assert sorted(path.name for path in folder.iterdir()) == ["2", "damaged-4", "damaged-6"]
    assert RunReader(run).steps() == [2]
    # The run goes on, saves step 4 again, and that one is damaged too.
    save(run, 4, keep=9)
    damage(folder / "4")
    check_is(resume(run), 2)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "damaged-4", "damaged-6"]


def test_a_checkpoint_that_is_not_finite_is_not_resumed_from(run, capsys):
    state = make_state(6)
    with Checkpointer(run) as checkpointer:
        checkpointer.save(state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params)), {"samples": 48})
    check_is(resume(run), 4)
    assert "checkpoints/6 (it has values that are not finite); going back to step 4" in capsys.readouterr().out


def test_no_whole_checkpoint_is_named_and_nothing_is_moved(run):
    names = [damage(run / "checkpoints" / step) for step in "24"]
    with pytest.raises(UserError, match=r"checkpoints has no whole checkpoint \(4: .*; 2: "):
        resume(run)
    with pytest.raises(UserError, match=rf"checkpoints/4 is damaged: {names[1]} has .*; no other one is whole"):
        restore(run)
    assert RunReader(run).steps() == [2, 4]


def test_readers_move_nothing(run):
    damage(run / "checkpoints" / "4")
    before = sorted(path for path in run.rglob("*"))
    with pytest.raises(UserError, match="is damaged"):
        restore(run)
    check_is(restore(run, 2), 2)
    assert sorted(path for path in run.rglob("*")) == before


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda folder: (folder / "70").mkdir(), "digest.json is missing"),
        (lambda folder: shutil.copytree(folder / "4", folder / "70"), "digest.json .* belongs to another step"),
        (lambda folder: (folder / "70").write_text(""), None),
        (lambda folder: (folder / "70.orbax-checkpoint-tmp").mkdir(), None),
    ],
)
def test_folders_that_are_no_checkpoints(run, make, fault, capsys):
    make(run / "checkpoints")
    if fault is None:  # neither Orbax nor we take it for one
        assert RunReader(run).latest_step() == 4
        check_is(restore(run), 4)
        return
    with pytest.raises(UserError, match=rf"checkpoints/70 is damaged: {fault}.*the newest whole one is of step 4"):
        restore(run)
    check_is(resume(run), 4)
    assert "checkpoints/70" in capsys.readouterr().out and (run / "checkpoints" / "damaged-70").is_dir()


def test_another_architecture_is_not_damage(run):
    with (
        Checkpointer(run) as checkpointer,
        pytest.raises(UserError, match=r"another architecture: params/img/\w has shape"),
    ):
        checkpointer.restore_good(abstract(make_state(0, size=32)))
    assert RunReader(run).steps() == [2, 4]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ValueError("429 Too Many Requests")], ids=str)
def test_a_storage_that_fails_for_a_moment_is_not_damage(run, monkeypatch, error):
    """The digest has shown that all files are whole: the newest checkpoint stays where it is."""

    def fails(*_, **__):
        raise error

    with Checkpointer(run) as checkpointer:
        monkeypatch.setattr(checkpointer._manager, "restore", fails)
        with pytest.raises(type(error), match=str(error.args[-1])):
            checkpointer.restore_good(ABSTRACT)
    check_is(resume(run), 4)


@pytest.mark.parametrize("item", ["state", "position"])
def test_an_item_that_a_storage_does_not_show_for_a_moment_is_not_damage(run, monkeypatch, item):
    """Orbax gives None for it."""
    with Checkpointer(run) as checkpointer:
        call = "item_metadata" if item == "state" else "restore"
        original = getattr(checkpointer._manager, call)

        def lacking(*args, **options):
            return ocp.args.Composite(**{**dict(original(*args, **options).items()), item: None})

        monkeypatch.setattr(checkpointer._manager, call, lacking)
        with pytest.raises(UserError, match=r"checkpoints/4 cannot be read, though its files .* to try again"):
            checkpointer.restore_good(ABSTRACT)
    check_is(resume(run), 4)


def test_a_checkpoint_comes_back_on_other_meshes(tmp_path):
    """Saved over eight devices, read over two of them, in other axes, and on one: all bits are equal."""
    P = jax.sharding.PartitionSpec

    def laid_out(shape, spec):
        devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
        mesh = jax.sharding.Mesh(devices, ("x", "y"))
        return lambda x: jax.sharding.NamedSharding(mesh, spec if x.ndim == 2 else P())

    saved, state = laid_out((4, 2), P("x", "y")), make_state(2)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(jax.tree.map(lambda x: jax.device_put(x, saved(x)), state), {"samples": 16, "batch": 8})
    for shape, spec in (((2, 4), P(None, ("x", "y"))), ((1, 1), P())):
        layout = laid_out(shape, spec)
        shapes = jax.tree.map(
            lambda x, layout=layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout(x)), state
        )
        with Checkpointer(tmp_path, read_only=True) as checkpointer:
            restored = checkpointer.restore(shapes)
        check_is(restored, 2)
        assert restored[0].params["img"]["a"].sharding == layout(state.params["img"]["a"])


def test_which_checkpoints_are_kept(tmp_path, monkeypatch):
    """And Orbax does not ask the preemption service, which the training loop asks, see `interrupt`."""
    monkeypatch.setattr(ocp.CheckpointManager, "reached_preemption", lambda _, step: pytest.fail(f"asked {step}"))
    save(tmp_path, 2, 4, 6, keep=2)
    assert RunReader(tmp_path).steps() == [4, 6]
    check_is(restore(tmp_path, 4), 4)


def test_a_later_checkpoint_is_not_taken_for_a_save(run):
    with Checkpointer(run) as checkpointer, pytest.raises(UserError, match="has a checkpoint of a later step than 3"):
        checkpointer.save(make_state(3), {"samples": 24, "batch": 8})


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning_and_keeps_no_others(run, monkeypatch, capsys):
    """The new one is complete by then; the next start of the run asks again."""
    delete = type(epath.Path(run)).rmtree

    def protected(path, **options):
        if path.name == "2":
            raise PermissionError(13, "Permission denied")
        delete(path, **options)

    with monkeypatch.context() as patch, Checkpointer(run, keep=2) as checkpointer:
        patch.setattr(type(epath.Path(run)), "rmtree", protected)
        for step in (6, 8, 10):
            checkpointer.save(make_state(step), {"samples": 8 * step, "batch": 8})
            assert checkpointer.latest() == checkpointer.steps()[-1] == step
        assert checkpointer.steps() == [8, 10] and RunReader(run).steps() == [2, 8, 10]
    warning = f"WARNING: old checkpoints in {run / 'checkpoints'} could not be deleted: 2 (Permission denied)\n"
    assert capsys.readouterr().out == warning
    save(run, 12, keep=2)
    assert RunReader(run).steps() == [10, 12]
    check_is(restore(run), 12)


@pytest.fixture
def no_large_files():
    """The system refuses to write beyond 5 kB of a file, as a full disk would anywhere."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


FAILED = r"the checkpoint of step 6 could not be written to .*/checkpoints \(.*\): it needs up to 9\d\.\d+ KiB"


def wait_for_failure(checkpointer):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        checkpointer.raise_failure()
        time.sleep(0.01)


def test_a_save_that_fails_is_reported_at_once_and_costs_no_other(run, no_large_files):
    with Checkpointer(run) as checkpointer:
        checkpointer.save(make_state(6), {"samples": 48, "batch": 8})
        with pytest.raises(UserError, match=FAILED):
            wait_for_failure(checkpointer)
        assert checkpointer.latest() == 4
    no_large_files()
    check_is(resume(run), 4)
    save(run, 6)
    check_is(restore(run), 6)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "4", "6"]


def test_no_failed_save_is_lost_in_silence_or_hides_what_ended_the_run(run, no_large_files, capsys):
    position = {"samples": 48, "batch": 8}
    with pytest.raises(UserError, match=FAILED), Checkpointer(run) as checkpointer:
        checkpointer.save(make_state(6), position)
    with Checkpointer(run) as checkpointer:
        checkpointer.save(make_state(6), position)
        with pytest.raises(UserError, match=FAILED):
            checkpointer.save(make_state(8), position)
    with pytest.raises(KeyError, match="of the run"), Checkpointer(run) as checkpointer:
        checkpointer.save(make_state(6), position)
        raise KeyError("of the run")
    assert "WARNING: the checkpoint of step 6 could not be written" in capsys.readouterr().out


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
        with pytest.raises(UserError, match=FAILED), Checkpointer(run) as checkpointer:
            checkpointer.save(make_state(6), {"samples": 48, "batch": 8})
            wait_for_failure(checkpointer)
        check_is(restore(run), 4)
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
