"""The persistent compilation cache: where it is, what is kept, and what a second start still compiles."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

from tests.helpers import tiny
from tests.helpers.util import free_address
from xclip_jax.parallel import compiler

ROOT = pathlib.Path(__file__).parents[2]
OPTIONS = (
    "jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_enable_compilation_cache",
    "jax_persistent_cache_enable_xla_caches", "jax_persistent_cache_min_compile_time_secs",
)  # fmt: skip
RUN = """
import collections, json, sys
import jax
from tests.helpers import tiny
from xclip_jax.parallel import compiler
from xclip_jax.processes import runtime
from xclip_jax.train import trainer

events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
run, pairs, *others = sys.argv[1:]
if others:
    runtime.join(False, others[0], 2, int(others[1]))
compiler.enable_cache(run if runtime.peers() else "")
trainer.run(tiny.config("clip", run=run, steps=2, data__sources=(f"folder:{pairs}",)))
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


def starts(tmp_path, *processes):
    """Start a run as these processes; return the number of JAX's events about the cache in each, by name."""
    names = {name.upper() for name in OPTIONS}
    env = {key: value for key, value in os.environ.items() if key not in names} | {
        "XCLIP_CACHE": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={8 // len(processes)}",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", RUN, str(tmp_path / "run"), str(tmp_path / "pairs")]
    running = [subprocess.Popen([*command, *others], cwd=ROOT, env=env, text=True, **pipes) for others in processes]
    events = []
    for process in running:
        out, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors
        assert "persistent compilation cache" not in errors  # JAX's warnings
        events.append(json.loads(out.splitlines()[-1]))
    return events


def start_again(run):
    """Remove all that a run left, but for its cache."""
    for path in run.iterdir():
        if path.name != "compiled":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path):
    tiny.folder(tmp_path / "pairs")
    (first,) = starts(tmp_path, ())
    start_again(tmp_path / "run")
    (second,) = starts(tmp_path, ())
    assert first["cache_misses"] > 10
    assert "cache_misses" not in second
    assert second["cache_hits"] == second["compile_requests_use_cache"] == first["compile_requests_use_cache"]
    (folder,) = (tmp_path / "cache" / "compiled").iterdir()
    assert any(path.name.startswith("jit_step-") for path in folder.glob("*-cache"))
    assert not (tmp_path / "run" / "compiled").exists()


@pytest.mark.slow
def test_a_second_start_of_several_processes_reads_the_runs_folder(tmp_path):
    """Process 0 writes and reads. On CPUs the keys of JAX contain the process, so that the other compiles again."""
    tiny.folder(tmp_path / "pairs")
    events = []
    for _ in range(2):
        address = free_address()
        events.append(starts(tmp_path, (address, "0"), (address, "1")))
        start_again(tmp_path / "run")
    assert events[0][0]["cache_misses"] > 10
    assert "cache_misses" not in events[1][0]
    assert events[1][0]["cache_hits"] == events[1][0]["compile_requests_use_cache"]
    assert "cache_misses" not in events[0][1]  # which JAX counts where an entry is written
    assert any((tmp_path / "run" / "compiled").glob("jit_step-*-cache"))
    assert not (tmp_path / "cache").exists()


def test_the_default(options, tmp_path):
    compiler.enable_cache()
    folder = compiler.cache_folder()
    assert options("compilation_cache_dir") == str(folder) and folder.parent == tmp_path / "cache" / "compiled"
    assert folder.is_dir() and list(folder.iterdir()) == []
    assert options("compilation_cache_max_size") == compiler.CACHE_BYTES
    assert options("persistent_cache_min_compile_time_secs") == compiler.CACHE_SECONDS


def test_variables_of_jax_go_first(options, monkeypatch, tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)  # as JAX_ENABLE_COMPILATION_CACHE=false
    compiler.enable_cache()
    assert options("compilation_cache_dir") is None
    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "123")
    jax.config.update("jax_compilation_cache_max_size", 123)
    compiler.enable_cache()
    assert options("compilation_cache_max_size") == 123
    assert options("persistent_cache_min_compile_time_secs") == compiler.CACHE_SECONDS
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))  # as JAX_COMPILATION_CACHE_DIR
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 5.0)
    compiler.enable_cache()
    assert options("compilation_cache_dir") == str(tmp_path / "mine")
    assert options("persistent_cache_min_compile_time_secs") == 5.0


@pytest.mark.parametrize("named", [False, True])
def test_a_folder_that_cannot_be_written_is_one_warning(named, options, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path / "file"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file" / "mine") if named else None)
    compiler.enable_cache()
    out = capsys.readouterr().out
    assert out.startswith("WARNING: no compilation cache (Not a directory: ") and out.count("\n") == 1
    assert options("enable_compilation_cache") is False


@pytest.mark.parametrize(("run", "xla_caches"), [("gs://bucket/run", "none"), ("/disk/run", None)])
def test_several_processes_share_the_runs_folder(run, xla_caches, options):
    before = options("persistent_cache_enable_xla_caches")
    compiler.enable_cache(run)
    assert options("compilation_cache_dir") == f"{run}/compiled"
    assert options("compilation_cache_max_size") == -1
    assert options("persistent_cache_enable_xla_caches") == (xla_caches or before)
