import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.helpers import tiny, two_processes
from tests.helpers.two_processes import BROKEN
from tests.helpers.util import free_address
from xclip_jax.core.errors import UserError
from xclip_jax.processes import runtime
from xclip_jax.train import weights

pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).parents[2]


def start(devices, *args):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"  # the last one holds
    command = [sys.executable, "-m", "tests.helpers.two_processes", *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags}, **pipes)


def wait_for(running):
    for process in running:
        try:
            said, _ = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert process.returncode == 0, said


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Findings of this process with four devices, and of two others with two."""
    root = tmp_path_factory.mktemp("processes")
    pairs, at = tiny.folder(root / "pairs"), free_address()
    running = [start(2, pairs, root / "two", at, 2, i) for i in range(2)]
    two_processes.main(pairs, root / "one", devices=jax.devices()[:4])
    wait_for(running)
    return [dict(np.load(root / f"{name}.npz")) for name in ("one.0", "two.0", "two.1")]


def test_losses_and_gradients_are_those_of_one_process(found):
    one, *two = found
    assert len(one["losses"]) == two_processes.STEPS
    for process in two:
        np.testing.assert_allclose(process["losses"], one["losses"], rtol=1e-5, atol=1e-5)
        names = [key for key in one if key.startswith("grad")]
        largest = max(np.abs(one[key]).max() for key in names)
        assert largest > 1e-3
        for key in names:
            np.testing.assert_allclose(process[key], one[key], rtol=0, atol=1e-5 * largest, err_msg=key)


def test_each_process_loads_its_half_of_the_batch(found):
    assert [set(x["rows"]) for x in found] == [{16}, {8}, {8}]


def test_each_process_gets_all_features(found):
    one, *two = found
    assert one["image"].shape == (13, 16)
    for process in two:
        for key in ("image", "clusters", "text"):
            np.testing.assert_allclose(process[key], one[key], atol=1e-3)  # after three steps of AdamW


def test_a_checkpoint_comes_back_in_each_process(found):
    assert all(x["restored"].all() for x in found)


def test_processes_agree_that_a_checkpoint_is_damaged(found):
    """One of them reads the digest; all go back to the checkpoint before."""
    assert all(x["fell_back"].all() for x in found)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs on one device, and on two of a process each, along the mesh's data and along its model axis."""
    root = tmp_path_factory.mktemp("runs")
    pairs = tiny.folder(root / "pairs", 16)
    for i in range(5):
        (pairs / f"{3 * i:03d}.png").write_bytes(b"damaged")
    where = {"one": start(1, "run", pairs, root / "one", 1, 1)}
    wait_for(where.values())
    for name, sizes in (("data", (2, 1)), ("model", (1, 2))):
        at = free_address()
        wait_for([start(1, "run", pairs, root / name, *sizes, at, 2, i) for i in range(2)])
    return root


def metrics(root, name):
    keys = ("loss", "samples", "tokens", "data/bad", "data/bad_share")
    return [line[key] for line in tiny.lines(root / f"{name}.run") for key in keys]


def bad(root, name):
    return sorted((root / f"{name}.run" / "bad_samples.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_processes_hold_the_same_rows_along_the_model_axis_and_halves_along_the_data_axis(runs):
    def texts(root, name, process=0):
        """Global shape and this process's rows of each batch."""
        seen = np.load(root / f"{name}.{process}.npz")
        return [tuple(shape) for shape in seen["shapes"]], seen["texts"]

    shapes, expected = texts(runs, "one")
    assert shapes == [(8, tiny.LENGTH)] * 2
    for process in range(2):
        seen, rows = texts(runs, "model", process)
        assert seen == shapes
        np.testing.assert_array_equal(rows, expected)
    halves = [texts(runs, "data", process) for process in range(2)]
    assert all(seen == shapes for seen, _ in halves)
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in halves], axis=1), expected)


@pytest.mark.parametrize("name", ["data", "model"])
@pytest.mark.slow
def test_losses_tokens_bad_samples_and_weights_are_those_of_one_process(runs, name):
    expected = metrics(runs, "one")
    assert expected[3] > 0, "no bad sample in the first batch"
    np.testing.assert_allclose(metrics(runs, name), expected, rtol=1e-4)
    assert bad(runs, name) == bad(runs, "one") != []
    _, experiment, variables, *_ = weights.load(str(runs / f"{name}.run"))
    expected = weights.fingerprint(experiment, variables)
    assert [str(np.load(runs / f"{name}.{process}.npz")["weights"]) for process in range(2)] == [expected] * 2


def test_what_cannot_be_joined_is_one_sentence():
    runtime.join(False)
    assert jax.process_count() == 1
    for given in (("h:1", 0, -1), ("", 2, 0), ("h:1", 2, 2), ("h:1", 2, -1)):
        with pytest.raises(UserError, match="--coordinator="):
            runtime.join(False, *given)
    jax.devices()  # as a recipe may have done
    with pytest.raises(UserError, match=r"cannot join the others .*jax\.devices"):
        runtime.join(True)


def test_a_process_that_joined_alone_ends_by_a_signal():
    """Before the training loop handles it; JAX would catch it."""
    code = f"from xclip_jax.processes import runtime; runtime.join(False, {free_address()!r}, 1, 0); "
    code += "import os, time; os.kill(os.getpid(), 15); time.sleep(20)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == -15


def test_every_process_knows_what_one_could_not_read(found):
    assert all(process[key].tolist() == [BROKEN] for process in found for key in ("unreadable", "counted"))
