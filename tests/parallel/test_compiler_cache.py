import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

from tests.helpers import tiny
from xclip_jax.parallel import compiler

ROOT = pathlib.Path(__file__).parents[2]
OPTIONS = (
    "jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_persistent_cache_min_compile_time_secs",
)  # fmt: skip
RUN = """
import collections, json, sys
import jax
from tests.helpers import tiny
from xclip_jax.parallel import compiler
from xclip_jax.train import trainer

events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
compiler.enable_cache()
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
    yield lambda: [getattr(jax.config, name) for name in OPTIONS]
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path):
    tiny.folder(tmp_path / "pairs")
    env = {key: value for key, value in os.environ.items() if key not in {name.upper() for name in OPTIONS}}
    env |= {"XCLIP_CACHE": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    events = []
    for _ in range(2):
        command = [sys.executable, "-c", RUN, str(tmp_path / "run"), str(tmp_path / "pairs")]
        done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, check=True)
        assert "persistent compilation cache" not in done.stderr  # JAX's warnings
        events.append(json.loads(done.stdout.splitlines()[-1]))
        shutil.rmtree(tmp_path / "run")
    first, second = events
    assert first["cache_misses"] > 10 and "cache_misses" not in second
    assert second["cache_hits"] == second["compile_requests_use_cache"] == first["compile_requests_use_cache"]


def test_the_default_and_variables_of_jax(options, monkeypatch, tmp_path):
    compiler.enable_cache()
    folder = tmp_path / "cache" / "compiled"
    assert options() == [str(folder), compiler.CACHE_BYTES, compiler.CACHE_SECONDS]
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "123")
    jax.config.update("jax_compilation_cache_max_size", 123)
    compiler.enable_cache()
    assert options() == [str(folder), 123, compiler.CACHE_SECONDS]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))  # as JAX_COMPILATION_CACHE_DIR
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 5.0)
    compiler.enable_cache()
    assert options() == [str(tmp_path / "mine"), 123, 5.0]
