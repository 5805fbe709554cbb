"""JAX's persistent compilation cache, on by default: a command that is started again need not compile again."""

import contextlib
import hashlib
import os
import pathlib
import platform
import tempfile
import time
from typing import Any

import jax

from xclip_jax.core.console import log0
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.core.storage import cache_dir, is_remote
from xclip_jax.processes import runtime

MAX_BYTES = 2 * 2**30
# Programs that compile faster are not kept: thousands of small files would make each look-up slow.
MIN_SECONDS = 0.1
_HALF_WRITTEN_SECONDS = 60.0


def enable(run: str = "") -> None:
    """Turn the cache on, before anything is compiled and after `runtime.join`.

    The folder is JAX_COMPILATION_CACHE_DIR if it is set, with JAX's other variables, else `default_folder()` with at
    most `MAX_BYTES`. A run of several processes uses `compiled` in its own folder, since only process 0 writes (on
    CPUs only process 0 reads, too). JAX_ENABLE_COMPILATION_CACHE=false turns the cache off. A folder that cannot be
    used is a warning.

    Args:
      run: the run's folder, for a command that trains.
    """
    if not _option("jax_enable_compilation_cache"):
        return
    folder = _option("jax_compilation_cache_dir")
    if not folder and run and runtime.peers() is not None:
        folder = str(RunFolder(run).compiled)
        _set("jax_compilation_cache_dir", folder)
        _set("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
        if is_remote(folder):  # XLA's own caches want a disk
            _set("jax_persistent_cache_enable_xla_caches", "none")
        return  # the run makes its folder
    try:
        if not folder:
            folder = str(default_folder())
            _check(folder)
            _set("jax_compilation_cache_dir", folder)
            _set("jax_compilation_cache_max_size", MAX_BYTES)
            _set("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
            if _option("jax_compilation_cache_max_size") != -1:  # without a limit JAX notes no times of use
                _remove_half_written(pathlib.Path(folder))
        elif not is_remote(folder):
            _check(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        jax.config.update("jax_enable_compilation_cache", False)
        reason = getattr(error, "strerror", None) or error
        log0(f"WARNING: no compilation cache ({reason}: {folder or '~'}); set JAX_COMPILATION_CACHE_DIR to a folder")


def default_folder() -> pathlib.Path:
    """Return `compiled/CPU` in the cache of `core.storage.cache_dir`; CPU names this kind of processor.

    Machines that share a home need not have the same processors, and code for one may not run on another.
    """
    return cache_dir() / "compiled" / _processor()


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _option(name: str) -> Any:
    return getattr(jax.config, name)


def _set(name: str, value: Any) -> None:
    """Set an option of JAX, unless the environment does."""
    if name.upper() not in os.environ:
        jax.config.update(name, value)


def _check(folder: str) -> None:
    """Raise `OSError` unless files can be written to `folder`, which is made."""
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _remove_half_written(folder: pathlib.Path) -> None:
    """Remove entries of a process that was killed while it wrote them, which JAX would neither read nor replace.

    JAX writes an entry and then the time of its use, without which it can remove no entry either.
    """
    for path in folder.glob("*-cache"):
        used = path.with_name(f"{path.name.removesuffix('-cache')}-atime")
        with contextlib.suppress(FileNotFoundError):  # another command removes entries too
            if not used.exists() and time.time() - path.stat().st_mtime > _HALF_WRITTEN_SECONDS:
                path.unlink()
