"""JAX's persistent compilation cache, on by default: a command that is started again need not compile again."""

import hashlib
import os
import pathlib
import platform
import tempfile
from typing import Any

import jax

from xclip_jax.core.console import log0
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.core.storage import cache_dir, is_remote
from xclip_jax.processes import runtime

MAX_BYTES = 2 * 2**30
# Programs that compile faster are not kept: thousands of small files would make each look-up slow.
MIN_SECONDS = 0.1


def enable(run: str = "") -> None:
    """Turn the cache on, before anything is compiled and after `runtime.join`; JAX's own variables have precedence.

    The folder is JAX_COMPILATION_CACHE_DIR if it is set, else `default_folder()` with at most `MAX_BYTES`. A run of
    several processes uses `compiled` in its own folder `run`, since only process 0 writes (on CPUs only process 0
    reads, too). A folder that cannot be used is a warning.
    """
    options: Any = jax.config
    if not options.jax_enable_compilation_cache:
        return
    named, shared = options.jax_compilation_cache_dir, bool(run) and runtime.peers() is not None
    folder = named or (str(RunFolder(run).compiled) if shared else str(default_folder()))
    try:
        if not is_remote(folder) and (named or not shared):  # a run makes its own folder
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        jax.config.update("jax_enable_compilation_cache", False)
        log0(f"WARNING: no compilation cache ({error.strerror}: {folder}); set JAX_COMPILATION_CACHE_DIR to a folder")
        return
    if named:
        return
    _set("jax_compilation_cache_dir", folder)
    _set("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    if not shared:
        _set("jax_compilation_cache_max_size", MAX_BYTES)
    elif is_remote(folder):  # XLA's own caches want a disk
        _set("jax_persistent_cache_enable_xla_caches", "none")


def default_folder() -> pathlib.Path:
    """Return `compiled/CPU` in the cache of `core.storage.cache_dir`; CPU names this kind of processor.

    Machines that share a home need not have the same processors, and code for one may not run on another.
    """
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return cache_dir() / "compiled" / f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _set(name: str, value: Any) -> None:
    """Set an option of JAX, unless the environment does."""
    if name.upper() not in os.environ:
        jax.config.update(name, value)
