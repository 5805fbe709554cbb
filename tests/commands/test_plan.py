import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.helpers import tiny
from xclip_jax.commands import plan
from xclip_jax.config import load as config_file
from xclip_jax.core.errors import UserError
from xclip_jax.parallel.mesh import make_mesh
from xclip_jax.train import build, cost
from xclip_jax.train.cost.roofline import CHIPS

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


def test_the_text_has_it_all(found):
    text, mib = plan.render(found), found["memory"]["peak"] / 2**20
    assert f"fits: {mib:.2f} MiB of a chip's 16.00 GiB (parameters " in text
    words = ("8 chips, 2 hosts", "optimizer", "all-reduce", "collectives take", "a model and not a measurement")
    assert all(each in text for each in (*words, *(f"{name} {x}" for name, x in found["versions"].items())))
    assert ("activations" in text) == (found["memory"]["activations"] > 0)  # what fits the chip's own memory is none
    json.dumps(found)
    unfit = plan.render(found | {"fits": False, "remedies": ["--config.optim.microbatches=2"]})
    assert unfit.endswith("to need less, add one after the other: --config.optim.microbatches=2")


def test_mesh_axes_may_share_an_axis_of_the_torus():
    pytest.importorskip("libtpu")
    devices, _ = plan.devices_of("v4:4x4x4")
    assert make_mesh({"data": -1, "fsdp": 8, "model": 1}, devices).shape == {"data": 8, "fsdp": 8, "model": 1}


def test_bad_options_are_refused_before_compiling(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "compile_config", lambda *_: pytest.fail("compiled"))
    (tmp_path / "FILE").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--hlo"):
        plan.plan(config(), "v5e:2x4", hlo="FILE/step.hlo")


@pytest.mark.slow
def test_a_step_that_is_too_large_is_found_and_mended():
    pytest.importorskip("libtpu")
    large = config_file.load_config("pretrain:objective=clip,batch=4096")
    large.model.img.remat = large.model.txt.remat = "none"
    found = plan.plan(large, "v5e:2x2")
    assert not found["fits"]
    assert "remat" in found["remedies"][1]
    assert "DOES NOT FIT" in plan.render(found)


@pytest.mark.parametrize("topology", ["v9:2x2", "v5e-32", "v5e:32", "v5e:3x5"])
def test_bad_topologies_are_named(topology):
    pytest.importorskip("libtpu")
    with pytest.raises(UserError, match=topology.partition(":")[0]):
        plan.devices_of(topology)


def test_no_accelerator_is_asked():
    """jax reads JAX_PLATFORMS when it is imported, which is before the command can set it."""
    code = (
        "import jax; from absl import app; from xclip_jax import main as cli\n"
        "app.run = lambda *_, **__: print(jax.config.jax_platforms)\n"
        "cli.main(['plan'])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.stdout == "cpu\n", done.stderr


@pytest.mark.parametrize("memory", [5.5, 7, 9.5, 14, 25, 40, 70, 200, 1e4])
def test_the_cheapest_step_that_fits(monkeypatch, memory):
    """Against all steps, by a model of their memory, and of their cost: features twice in microbatches."""
    monkeypatch.setattr(plan, "devices_of", lambda _: ([None] * 8, CHIPS["v5e"]))
    held = {"none": 2.0, "dots": 1.0, "full": 0.3}  # per pair; 5 for the state

    def fits(size, microbatches, remat):
        return 5 + held[remat] * size / microbatches <= memory

    def compile_config(trial, devices, memory):
        remat = trial.model.img.remat
        assert trial.model.txt.remat == remat
        step = trial.data.batch, trial.optim.microbatches, remat
        return None, (object() if fits(*step) else None), "it needs more"

    monkeypatch.setattr(cost, "compile_config", compile_config)
    largest, changes = plan.fit(config("clip"), "v5e:2x4")
    costs = {
        (n, remat): {"none": 3, "dots": 3.1, "full": 4}[remat] + (n > 1) + 0.2 * math.log2(n)
        for n in (1, 2, 4, 8)
        for remat in held
        if fits(64, n, remat)
    }
    assert largest == max([size for size in 8 * 2 ** np.arange(10) if fits(size, 1, "dots")], default=0)
    if not costs:
        assert changes == []
        return
    n, remat = min(costs, key=costs.get)
    assert changes == [
        f"--config.optim.microbatches={n}",
        *(f"--config.model.{t}.remat={remat}" for t in ("img", "txt")),
    ]


def test_a_state_that_is_too_large_is_not_compiled(monkeypatch, capsys):
    monkeypatch.setattr(cost, "compile_if_fits", lambda _: pytest.fail("compiled"))
    monkeypatch.setattr(plan, "devices_of", lambda _: (jax.devices(), dataclasses.replace(CHIPS["v5e"], memory=1e5)))
    small = config("clip")
    small.data.batch = 8
    assert plan.fit(small, "v5e:2x4") == (0, [])
    assert "8 pairs, 1 microbatches, remat=dots: does not fit, its state takes " in capsys.readouterr().out


def test_the_command_of_a_plan_trains():
    """Its own flags are left out, in each form that absl takes; a value may begin with a minus."""
    arguments = ["--config", "demo:steps=9", "-topology", "v5e:2x4", "--hlo=x y", "--fit", "--config.run=a b"]
    arguments += ["--config.mesh.data", "-1", "--topology=v5e:2x4", "--fit=true"]
    assert plan.train_command(arguments, ["--config.x=1"]) == (
        "xclip-jax train --config demo:steps=9 '--config.run=a b' --config.mesh.data -1 --config.x=1"
    )
