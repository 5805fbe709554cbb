import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from tests.helpers import tiny
from xclip_jax.config import schema
from xclip_jax.config.load import load_config
from xclip_jax.config.schema import resolve
from xclip_jax.core import environment
from xclip_jax.core.console import format_bytes
from xclip_jax.core.errors import UserError
from xclip_jax.data.length_groups import LengthGroups
from xclip_jax.train import build, checks, cost, trainer
from xclip_jax.train.checks import FAIL, OK
from xclip_jax.train.run_writer import RunWriter


@pytest.fixture(scope="module")
def experiment():
    return build.build(tiny.config("clip", data__batch=512))


def check(experiment):
    (finding,) = checks.check_memory(experiment, lambda: cost.compile_if_fits(experiment))
    return finding


def refusal(message):
    def refuse(_):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    return refuse


def test_a_step_that_exceeds_memory_says_by_how_much(experiment, monkeypatch):
    """Vector memory depends on no key."""
    monkeypatch.setattr(cost, "trace", refusal("Ran out of memory in memory space hbm. Used 17.20G of 15.75G"))
    assert cost.compile_if_fits(experiment) == (None, "it needs 17.20G besides the state")
    monkeypatch.setattr(cost, "trace", refusal("Ran out of memory in memory space vmem. Used 16.15M of 16.00M"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        cost.compile_if_fits(experiment)


@pytest.fixture(scope="module")
def peak(experiment):
    return cost.memory_usage(experiment, cost.compile_if_fits(experiment)[0])["peak"]


def has(monkeypatch, each):
    monkeypatch.setattr(cost, "device_memory", lambda device: 8 * each)


def test_a_step_that_fits_by_far_is_not_compiled(experiment, peak, monkeypatch):
    assert not cost.fits_by_far(experiment, 1.5 * peak) and cost.fits_by_far(experiment, 2**40)
    monkeypatch.setattr(cost, "compile_if_fits", lambda _: pytest.fail("compiled"))
    has(monkeypatch, 2**40)
    assert check(experiment).mark == OK


def test_a_step_that_fits_just_so(experiment, peak, monkeypatch):
    has(monkeypatch, 1.1 * peak)
    finding = check(experiment)
    assert finding.mark == OK and f"a step needs {format_bytes(peak)} of" in finding.text
    has(monkeypatch, 0.9 * peak)
    finding = check(experiment)
    assert finding.mark == FAIL and "does not fit a device's" in finding.text
    assert "zero1, --config.model.img.remat=full" in finding.remedy


def test_nothing_fits_a_state_that_is_too_large(experiment, monkeypatch):
    has(monkeypatch, cost.bytes_on_device(experiment.abstract) / 2)
    finding = check(experiment)
    assert finding.mark == FAIL and finding.text.startswith("the state takes")
    assert "--config.mesh.strategy=fsdp --config.mesh.fsdp=8 --config.mesh.data=-1, or use" in finding.remedy


def remedies(devices=2, **changes):
    return cost.remedies(build.build(tiny.config("clip", **changes), jax.devices()[:devices]))


def test_remedies_are_in_the_order_of_their_cost_and_take_nothing_back():
    assert remedies() == [
        "--config.mesh.strategy=zero1",
        "--config.model.img.remat=full --config.model.txt.remat=full",
        "--config.optim.microbatches=4",
    ]
    assert remedies(devices=1) == remedies()[1:]  # one device has nothing to split
    most = {"mesh__strategy": "fsdp", "model__img__remat": "full", "optim__microbatches": 2}
    assert remedies(**most) == ["--config.model.txt.remat=full", "--config.optim.microbatches=8"]


def test_a_run_may_resume_with_every_remedy_for_its_batch(pairs, trained):
    """The folder accepts what an error recommends, and the same state is restored."""
    folder, flags = RunWriter(trained), cost.remedies(build.build(tiny.short(pairs, trained)))
    changes = dict(flag.removeprefix("--config.").split("=") for line in flags for flag in line.split())
    assert changes.keys() == {"mesh.strategy", "model.img.remat", "model.txt.remat", "optim.microbatches"}
    for key, value in [*changes.items(), ("data.threads", 1)]:
        config = tiny.short(pairs, trained)
        config.update_from_flattened_dict({key: int(value) if key == "optim.microbatches" else value})
        folder.check(schema.resolve(config))
    most = tiny.short(pairs, trained, model__img__remat="full", model__txt__remat="full")
    assert int(tiny.restored(most)[0].step) == 4


def test_a_run_is_refused_before_its_folder_is_made(pairs, tmp_path, monkeypatch):
    c = tiny.short(pairs, tmp_path / "run")
    has(monkeypatch, 1.2 * cost.bytes_on_device(build.build(c).abstract))
    # Eight devices have two rows each, which four microbatches do not divide.
    with pytest.raises(UserError, match=r"change one after the other until it fits: .*optim\.microbatches=2, more"):
        trainer.run(c)
    assert not (tmp_path / "run").exists()


def test_memory_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_CGROUP", tmp_path)
    machine = environment.host_memory()  # as outside of a container
    (tmp_path / "memory.max").write_text("1000000\n")
    assert environment.host_memory() == 1e6 < machine
    (tmp_path / "memory.max").write_text("max\n")
    assert environment.host_memory() == machine == cost.device_memory(jax.devices()[0])
    assert machine == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_known_models():
    """Twice the multiply-adds that are quoted for ViT-B/16 at 224 pixels, 17.6 G, and for CLIP's B-size text tower."""
    found = cost.forward_flops(resolve(load_config("pretrain:objective=clip")))
    assert found["img"] == pytest.approx(2 * 17.58e9, rel=0.01)
    tokens, width = 77, 512
    assert found["txt"] == 12 * (tokens * 24 * width**2 + 4 * tokens**2 * width)


@pytest.mark.parametrize("pool", ["cls", "mean", "map"])
def test_against_the_compilers_count(pool):
    config = tiny.config("xclip", model__img__width=128, model__img__image_size=32, model__txt__width=64)
    config.model.img.pool = pool
    p = build.build(config, jax.devices()[:1])
    variables = nn.unbox(jax.eval_shape(p.model.init, jax.random.key(0), *shapes(config)))
    compiled = jax.jit(p.model.apply).lower(variables, *shapes(config)).compile()
    counted = compiled.cost_analysis()["flops"] / 8
    analytic = cost.forward_flops(resolve(config), train=False)
    # Norms, softmax and activations are left out of the analytic figure.
    assert 0.8 * counted < sum(analytic.values()) < counted


def test_activations_are_what_a_gradient_keeps():
    """Temporary memory of the compiled gradient, of which the activations are nearly all."""
    sizes = {"width": 128, "heads": 4, "depth": 4}
    changes = {f"model__{tower}__{name}": value for tower in ("img", "txt") for name, value in sizes.items()}
    config = tiny.config("clip", model__img__image_size=64, model__txt__context_length=40, **changes)
    p = build.build(config, jax.devices()[:1])
    variables = nn.unbox(jax.eval_shape(p.model.init, jax.random.key(0), *shapes(config, 16)))

    def loss(variables, *inputs):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(p.model.apply(variables, *inputs)))

    kept = jax.jit(jax.grad(loss)).lower(variables, *shapes(config, 16)).compile().memory_analysis()
    assert cost.activation_bytes(config) == pytest.approx(kept.temp_size_in_bytes / 16, rel=0.25)


def shapes(config, b=8):
    image = (b, config.model.img.image_size, config.model.img.image_size, 3)
    return jax.ShapeDtypeStruct(image, "float32"), jax.ShapeDtypeStruct((b, config.model.txt.context_length), "int32")


def test_a_teacher_is_one_more_forward_pass():
    config = tiny.config("xclip", model__img__depth=4)
    whole = cost.step_flops(resolve(config))
    config.objective.nclip.target = "ema"
    assert cost.step_flops(resolve(config)) == pytest.approx(whole * 4 / 3, rel=0.01)


def test_groups_count_as_they_are_rounded():
    """A device orders whole texts: of one none is cut by a share below 1, of three a half are one."""
    config, groups = resolve(tiny.config("clip")), LengthGroups.parse("6:0.5")
    whole, half = cost.step_flops(config), cost.step_flops(config, groups, rows=2)
    assert cost.step_flops(config, groups, rows=1) == whole > half
    assert whole - cost.step_flops(config, groups, rows=3) == pytest.approx(2 / 3 * (whole - half))


def test_xclip_costs_a_tenth_more_than_clip_at_most():
    clip, xclip = (cost.step_flops(resolve(load_config(f"pretrain:objective={name}"))) for name in ("clip", "xclip"))
    assert 1 < xclip / clip <= 1.10
