import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from tests.helpers import tiny
from xclip_jax.commands import plan
from xclip_jax.config import load as config_file
from xclip_jax.core.errors import UserError
from xclip_jax.parallel.mesh import make_mesh
from xclip_jax.train import build, cost

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]


def config(objective="xclip", **changes):
    return tiny.config(objective, steps=1000, data__batch=64, model__dtype="bfloat16", **changes)


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("libtpu")
    return plan.plan(config(model__scan=True), "v5e:2x4")


def test_a_plan_for_a_topology_that_is_not_there(found):
    assert (found["chips"], found["hosts"], found["fits"]) == (8, 2, True)
    assert found["model_parameters"] == sum(x.size for x in jax.tree.leaves(build.build(config()).abstract.params))
    assert found["memory"]["parameters"] == 4 * found["model_parameters"]
    assert found["memory"]["optimizer"] == pytest.approx(2 * found["memory"]["parameters"], rel=1e-3)
    assert found["memory"]["peak"] > sum(found["memory"][k] for k in ("parameters", "optimizer", "activations"))
    # Gradients in bf16 at the least, in fp32 at the most.
    assert 2 * found["model_parameters"] < found["sent"]["all-reduce"] < 5 * found["model_parameters"]


def test_a_chip_of_tpu7x_is_two_devices(found):
    devices, chip = plan.devices_of("tpu7x:2x2x1")
    assert (len(devices), chip.devices, devices[0].device_kind) == (8, 2, "TPU7x")
    assert (chip.memory, chip.peak) == (96 * 2**30, cost.PEAK_FLOPS["TPU7x"]) == (96 * 2**30, 1153.5e12)
    text = plan.render(found | {"devices": 16, "fits": False})
    assert "8 chips with 2 devices each, 2 hosts" in text and "DOES NOT FIT in a device's 16.00 GiB" in text
    assert " with " not in plan.render(found).splitlines()[0]


def test_time_and_money_follow_from_the_roofline(found):
    account = found["roofline"]
    assert found["step_ms"] == account["step_ms"] == pytest.approx(account["ms"] + account["exposed_ms"])
    assert found["mfu"] == pytest.approx(found["flops_per_pair"] * 64 / (197e12 * 8) / (account["step_ms"] / 1e3))
    assert found["pairs_per_second"] == pytest.approx(64 / account["step_ms"] * 1e3)
    assert found["images_per_second_per_host"] == pytest.approx(found["pairs_per_second"] / 2)
    assert found["days"] == pytest.approx(1000 * account["step_ms"] / 1e3 / 86400)
    assert found["chip_hours"] == pytest.approx(8 * 24 * found["days"])


def test_an_mfu_that_is_given_takes_the_place_of_the_roofline(found, monkeypatch):
    c = config(model__scan=True)
    monkeypatch.setattr(cost, "compile_config", lambda *_: (build.build(c), None, "too large"))
    given, unknown = (plan.plan(c, "v5e:2x4", mfu=mfu, price=2.0) for mfu in (0.5, None))
    assert given["pairs_per_second"] == pytest.approx(0.5 * 197e12 * 8 / found["flops_per_pair"])
    assert given["cost"] == pytest.approx(2 * given["chip_hours"])
    assert "an MFU of 50%, as given\n" in plan.render(given)
    assert plan.render(unknown).endswith("no estimate of the time: the step does not fit; --mfu gives one")


def test_the_text_has_it_all(found):
    assert found["cost"] == 0 and "cost" not in plan.render(found)
    assert "chip-hours, which cost 1,234\n" in plan.render(found | {"cost": 1234.5})
    text, mib = plan.render(found), found["memory"]["peak"] / 2**20
    assert f"fits: {mib:.2f} MiB of a chip's 16.00 GiB (parameters " in text
    words = ("8 chips, 2 hosts", "optimizer", "all-reduce", "collectives take", "a model and not a measurement")
    assert all(each in text for each in (*words, *(f"{name} {x}" for name, x in found["versions"].items())))
    assert ("activations" in text) == (found["memory"]["activations"] > 0)  # what fits the chip's own memory is none
    json.dumps(found)


@pytest.mark.slow
def test_several_slices():
    pytest.importorskip("libtpu")
    # Arrays narrower than a chip's 128 lanes are padded before they are sent to another slice.
    wide = config(model__img__width=128, model__txt__width=128)
    one, two = (plan.plan(wide, "v5e:2x4", slices=slices) for slices in (1, 2))
    assert (two["chips"], two["hosts"], two["mesh"]["data"]) == (16, 4, 16)
    # Each chip sends an eighth of large gradients to the other slice, and small ones whole.
    assert 1 / 8 < two["sent"]["all-reduce between slices"] / one["sent"]["all-reduce"] < 1 / 2
    assert two["roofline"]["exposed_ms"] > one["roofline"]["exposed_ms"]


def test_mesh_axes_may_share_an_axis_of_the_torus():
    pytest.importorskip("libtpu")
    devices, _ = plan.devices_of("v4:4x4x4")
    assert make_mesh({"data": -1, "fsdp": 8, "model": 1}, devices).shape == {"data": 8, "fsdp": 8, "model": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"mfu": mfu}, f"--mfu is {mfu}; expected a share") for mfu in (0.0, -0.4, 1.5, float("nan"))),
        ({"hlo": "FILE/step.hlo"}, r"--hlo: .* is not a folder"),
        ({"slices": 0}, "--slices is 0; expected an integer of at least 1"),
    ],
)
def test_bad_options_are_refused_before_compiling(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "compile_config", lambda *_: pytest.fail("compiled"))
    (tmp_path / "FILE").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        plan.plan(config(), "v5e:2x4", **options)


@pytest.mark.slow
def test_a_step_that_is_too_large_is_found_and_mended():
    pytest.importorskip("libtpu")
    large = config_file.load_config("pretrain:objective=clip,batch=4096")
    large.model.img.remat = large.model.txt.remat = "none"
    found = plan.plan(large, "v5e:2x2")
    assert not found["fits"]
    assert "remat" in found["remedies"][1]
    assert "DOES NOT FIT" in plan.render(found)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", "must be one of 'v4'"),
        ("v5e-32", "write CHIP:GRID, such as v5e:4x8"),
        ("v5e:32", "write CHIP:GRID"),
        ("v5e:3x5", "is not a topology of v5e"),
    ],
)
def test_bad_topologies_are_one_sentence(topology, message):
    pytest.importorskip("libtpu")
    with pytest.raises(UserError, match=message) as error:
        plan.devices_of(topology)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("asked", "platforms"), [(None, "cpu"), ("cuda", "cuda")])
def test_no_accelerator_is_asked_unless_it_is_named(asked, platforms):
    """jax reads JAX_PLATFORMS when it is imported, which is before the command can set it."""
    code = (
        "import jax; from absl import app; from xclip_jax import main as cli\n"
        "app.run = lambda *_, **__: print(jax.config.jax_platforms)\n"
        "cli.main(['plan'])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    environment |= {"JAX_PLATFORMS": asked} if asked else {}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.stdout == f"{platforms}\n", done.stderr


def test_bad_input_is_one_sentence():
    command = [sys.executable, "-m", "xclip_jax.commands.plan", "--config", "configs/demo.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.stderr.startswith("error: --topology is missing")
