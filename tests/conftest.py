"""Eight simulated CPU devices for every test, and compilations that are quick instead of fast and are made once.

Read by XLA and JAX when jax is first imported, so set before any test module; commands that tests start inherit it.
"""

import collections
import gc
import importlib.metadata
import os
import signal
import tempfile

import pytest

# In a background job SIGINT is ignored, which commands started by tests would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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
# Each of these takes a fifteenth of the suite's time: notes of where an operation was traced, and searches for garbage.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
gc.set_threshold(100_000, 10, 10)

_FIRST = (
    "test_end_to_end.py",
    "test_faulty_processes.py",
    "test_runtime.py",
    "test_block_kernels.py",
    "test_onnx_files.py",
)


def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true", help="a test that would be skipped fails, as in .ci/run")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    return _without_skips((yield), item.config)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return _without_skips((yield), collector.config)


def pytest_collection_modifyitems(items):
    """Begin with dear files of few tests, so that none runs alone at the end, and go on with files of many tests."""
    count = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in _FIRST, -count[item.path], str(item.path)))


def _without_skips(report, config):
    """Return the report of a test or a file; with `--no-skips` a skipped one fails, unless it lacks a permission."""
    if report.skipped and config.option.no_skips and "is not permitted" not in report.longrepr[2]:
        report.outcome, report.longrepr = "failed", report.longrepr[2]
    return report


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """What a run of xCLIP with stacked blocks leaves, but for the training; to be read only."""
    from tests.helpers import tiny

    return tiny.untrained(tmp_path_factory.mktemp("runs") / "run", model__scan=True)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A folder of 40 little images with captions; to be read only."""
    from tests.helpers import tiny

    return tiny.folder(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture(scope="session")
def table_of_pairs(pairs, tmp_path_factory):
    """The pairs of the folder in a table, last one first."""
    path = tmp_path_factory.mktemp("table") / "pairs.csv"
    rows = [f"{image},{image.with_suffix('.txt').read_text().splitlines()[0]}" for image in sorted(pairs.glob("*.png"))]
    path.write_text("\n".join(["file,words", *rows[::-1]]) + "\n")
    return path


@pytest.fixture(scope="session")
def trained(pairs, tmp_path_factory):
    """A run of four steps with checkpoints of steps 2 and 4. To be copied, not changed."""
    from tests.helpers import tiny
    from xclip_jax.train import trainer

    run = tmp_path_factory.mktemp("trained") / "run"
    trainer.run(tiny.short(pairs, run))
    return run


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The stand-in of the Hub, where the client looks for the Hub; its cache is empty, and no account is known."""
    from tests.helpers import hub_server

    constants = pytest.importorskip("huggingface_hub.constants")
    with hub_server.serve() as made:
        template = f"{made.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        settings = {"ENDPOINT": made.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False,
                    "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": True,
                    "HF_TOKEN_PATH": str(tmp_path / "token")}  # fmt: skip
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield made


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A repository with what the launch scripts send to workers; not to be changed."""
    from tests.helpers import fake_cloud

    return fake_cloud.make_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def cloud(tmp_path, checkout):
    """A cloud of TPUs for the launch scripts."""
    from tests.helpers import fake_cloud

    return fake_cloud.Cloud(tmp_path, checkout)
