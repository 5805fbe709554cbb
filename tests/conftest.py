"""Eight simulated CPU devices for every test, and compilations that are quick instead of fast and are made once.

Read by XLA and JAX when jax is first imported, so set before any test module; commands that tests start inherit it.
"""

import importlib.metadata
import os
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
_flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Its older emitters take half of the time to compile; 0.12 has them no more.
    _flags += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flags}".strip()
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it
    _cache = tempfile.TemporaryDirectory(prefix="xclip_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """What a run of xCLIP with stacked blocks leaves, but for the training; to be read only."""
    from tests import tiny

    return tiny.untrained(tmp_path_factory.mktemp("runs") / "run", model__img__scan=True, model__txt__scan=True)
