import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import pytest

from tests import tiny
from xclip_jax import compilation_cache
from xclip_jax.parallel import processes

ROOT = pathlib.Path(__file__).parents[1]
OPTIONS = (
    "jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_enable_compilation_cache",
    "jax_persistent_cache_enable_xla_caches", "jax_persistent_cache_min_compile_time_secs",
)  # fmt: skip
RUN = """
import collections, json, sys
import jax
from tests import tiny
from xclip_jax import compilation_cache
from xclip_jax.train import trainer

events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
compilation_cache.enable(sys.argv[1])
trainer.run(tiny.config("clip", run=sys.argv[1], steps=2, data__sources=(f"folder:{sys.argv[2]}",)))
print(json.dumps(events))
"""


@pytest.fixture
def options(monkeypatch, tmp_path):
    """JAX's options as without any variable, in a cache of the test's own; the session's come back afterwards."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    for name in OPTIONS:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    yield lambda name: getattr(jax.config, f"jax_{name}")
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_second_start_compiles_nothing(tmp_path):
    pairs, events = tiny.folder(tmp_path / "pairs"), []
    names = {name.upper() for name in OPTIONS}
    env = {key: value for key, value in os.environ.items() if key not in names} | {
        "XCLIP_CACHE": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    for run in ("a", "b"):
        command = [sys.executable, "-c", RUN, str(tmp_path / run), str(pairs)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        assert "persistent compilation cache" not in done.stderr  # JAX's warnings
        events.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = events
    assert first["cache_misses"] > 10
    assert "cache_misses" not in second
    assert second["cache_hits"] == second["compile_requests_use_cache"] == first["compile_requests_use_cache"]
    (folder,) = (tmp_path / "cache" / "compiled").iterdir()
    assert any(path.name.startswith("jit_step-") for path in folder.glob("*-cache"))
    assert not (tmp_path / "b" / "compiled").exists()


def test_the_default(options, tmp_path):
    compilation_cache.enable()
    folder = compilation_cache.default_folder()
    assert options("compilation_cache_dir") == str(folder) and folder.parent == tmp_path / "cache" / "compiled"
    assert folder.is_dir() and list(folder.iterdir()) == []
    assert options("compilation_cache_max_size") == compilation_cache.MAX_BYTES
    assert options("persistent_cache_min_compile_time_secs") == compilation_cache.MIN_SECONDS


def test_variables_of_jax_go_first(options, monkeypatch, tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)  # as JAX_ENABLE_COMPILATION_CACHE=false
    compilation_cache.enable()
    assert options("compilation_cache_dir") is None
    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "123")
    jax.config.update("jax_compilation_cache_max_size", 123)
    compilation_cache.enable()
    assert options("compilation_cache_max_size") == 123
    assert options("persistent_cache_min_compile_time_secs") == compilation_cache.MIN_SECONDS
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))  # as JAX_COMPILATION_CACHE_DIR
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 5.0)
    compilation_cache.enable()
    assert options("compilation_cache_dir") == str(tmp_path / "mine")
    assert options("persistent_cache_min_compile_time_secs") == 5.0


@pytest.mark.parametrize("named", [False, True])
def test_a_folder_that_cannot_be_written_is_one_warning(named, options, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path / "file"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file" / "mine") if named else None)
    compilation_cache.enable()
    out = capsys.readouterr().out
    assert out.startswith("WARNING: no compilation cache (Not a directory: ") and out.count("\n") == 1
    assert options("enable_compilation_cache") is False


def test_without_a_home_there_is_a_warning(options, monkeypatch, capsys):
    monkeypatch.delenv("XCLIP_CACHE")
    monkeypatch.setattr(pathlib.Path, "expanduser", lambda _: (_ for _ in ()).throw(RuntimeError("no home directory")))
    compilation_cache.enable()
    assert capsys.readouterr().out.startswith("WARNING: no compilation cache (no home directory: ~)")
    assert options("enable_compilation_cache") is False


@pytest.mark.parametrize(("run", "xla_caches"), [("gs://bucket/run", "none"), ("/disk/run", None)])
def test_several_processes_share_the_runs_folder(run, xla_caches, options, monkeypatch):
    monkeypatch.setattr(processes, "peers", object)
    before = options("persistent_cache_enable_xla_caches")
    compilation_cache.enable(run)
    assert options("compilation_cache_dir") == f"{run}/compiled"
    assert options("compilation_cache_max_size") == -1
    assert options("persistent_cache_enable_xla_caches") == (xla_caches or before)


def test_what_was_half_written_is_removed(options):
    """A process was killed between an entry and the time of its use; of one that writes now nothing is removed."""
    folder = compilation_cache.default_folder()
    folder.mkdir(parents=True)
    for name, age in (("whole", 3600), ("half", 3600), ("new", 0)):
        path = folder / f"jit_{name}-0123-cache"
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age,) * 2)
    (folder / "jit_whole-0123-atime").write_bytes(b"x")
    compilation_cache.enable()
    assert sorted(path.name for path in folder.glob("*-cache")) == ["jit_new-0123-cache", "jit_whole-0123-cache"]
