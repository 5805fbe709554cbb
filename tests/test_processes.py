import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests import tiny
from tests.two_processes import BROKEN
from xclip_jax.errors import UserError
from xclip_jax.parallel import processes

ROOT = pathlib.Path(__file__).parents[1]


def start(devices, *args):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"  # the last one holds
    return subprocess.Popen(
        [sys.executable, "-m", "tests.two_processes", *map(str, args)], cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process with four devices saw, and each of two with two."""
    root = tmp_path_factory.mktemp("processes")
    pairs = tiny.folder(root / "pairs")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    running = [start(2, pairs, root / "two", address, 2, i) for i in range(2)] + [start(4, pairs, root / "one")]
    for process in running:
        try:
            said, _ = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert process.returncode == 0, said
    return [dict(np.load(root / f"{name}.npz")) for name in ("one.0", "two.0", "two.1")]


def test_losses_and_gradients_are_those_of_one_process(found):
    one, *two = found
    assert len(one["losses"]) == 3
    for process in two:
        np.testing.assert_allclose(process["losses"], one["losses"], rtol=1e-5, atol=1e-5)
        names = [key for key in one if key.startswith("grad")]
        largest = max(np.abs(one[key]).max() for key in names)
        assert largest > 1e-3
        for key in names:
            np.testing.assert_allclose(process[key], one[key], rtol=0, atol=1e-5 * largest, err_msg=key)


def test_each_process_loads_its_half_of_the_batch(found):
    assert [list(x["rows"]) for x in found] == [[16] * 3, [8] * 3, [8] * 3]


def test_each_process_gets_all_features(found):
    one, *two = found
    assert one["image"].shape == (13, 16)
    for process in two:
        for key in ("image", "clusters", "text", "attention"):
            np.testing.assert_allclose(process[key], one[key], atol=1e-3)  # after three steps of AdamW


def test_a_checkpoint_comes_back_in_each_process(found):
    assert all(x["restored"].all() for x in found)


@pytest.mark.parametrize("given", [("h:1", 0, -1), ("", 2, 0), ("h:1", 2, 2), ("h:1", 2, -1)])
def test_incomplete_addresses_are_one_sentence(given):
    with pytest.raises(UserError, match="belong together"):
        processes.join(False, *given)


def test_nothing_to_join():
    processes.join(False)
    assert jax.process_count() == 1


def test_alone_where_others_should_be_is_one_sentence():
    code = "from xclip_jax.parallel import processes; processes.join(True)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert "UserError: this process cannot join the others" in done.stderr


def test_every_process_knows_what_one_could_not_read(found):
    assert all(process[key].tolist() == [BROKEN] for process in found for key in ("unreadable", "counted"))
