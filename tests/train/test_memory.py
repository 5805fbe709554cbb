"""Memory of the train step: whether it fits is known before the first step."""

import dataclasses
import os
from itertools import chain

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from tests.helpers import tiny
from xclip_jax.config import schema
from xclip_jax.core import environment
from xclip_jax.core.errors import UserError
from xclip_jax.data.length_groups import LengthGroups
from xclip_jax.parallel.mesh import make_mesh
from xclip_jax.train import build, memory, trainer
from xclip_jax.train.checkpoint import Checkpointer
from xclip_jax.train.training_folder import TrainingFolder


@pytest.fixture(scope="module")
def experiment():
    return build.build(tiny.config("clip", data__batch=512))


def refusal(message):
    def refuse(_):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    return refuse


def test_a_step_that_exceeds_memory_says_by_how_much(experiment, monkeypatch):
    monkeypatch.setattr(memory, "compile_for", refusal("Ran out of memory in memory space hbm. Used 17.20G of 15.75G"))
    assert memory.compile_if_fits(experiment) == (None, "beside the state, it needs 17.20G")


@pytest.mark.parametrize(
    "message",
    [
        "Ran out of memory in memory space vmem. Used 16.15M of 16.00M vmem.",
        "Scoped allocation with size 17.1M exceeded scoped vmem limit by 1.1M.",
    ],
)
def test_vector_memory_has_a_remedy_of_its_own(experiment, monkeypatch, message):
    monkeypatch.setattr(memory, "compile_for", refusal(message))
    with pytest.raises(UserError, match=r"vector memory.*LIBTPU_INIT_ARGS=--xla_tpu_enable_async"):
        memory.compile_if_fits(experiment)


@pytest.fixture(scope="module")
def peak(experiment):
    return memory.usage(experiment, memory.compile_for(experiment))["peak"]


def has(monkeypatch, each, free=None):
    """Give each of the eight devices `each` bytes, of which `free` are free."""
    monkeypatch.setattr(memory, "total", lambda device: 8 * each)
    monkeypatch.setattr(memory, "capacity", lambda device: each if free is None else free)


def test_a_step_never_needs_more_than_all_of_its_values(experiment, peak):
    state = memory.bytes_on_device(experiment.abstract)
    assert state < peak < memory._written(memory.trace(experiment).jaxpr.jaxpr) / 8 + 8 * state


@pytest.mark.parametrize("axes", [{"data"}, {"data", "fsdp"}])
def test_values_of_a_shard_map_count_on_all_devices(axes):
    """Its inner shapes are those of one device."""
    spec = PartitionSpec(tuple(sorted(axes)))
    mesh = make_mesh({"data": 4, "fsdp": 2, "model": 1})
    fn = jax.shard_map(jnp.sin, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=axes)
    assert memory._written(jax.make_jaxpr(jax.jit(fn))(jnp.zeros((64, 16))).jaxpr) == 64 * 16 * 4


def test_microbatches_compute_all_values_of_the_whole_batch(experiment):
    def written(made):
        return memory._written(memory.trace(made).jaxpr.jaxpr)

    # Encoders once more, and the same heads and losses.
    parts = build.build(tiny.config("clip", data__batch=512, optim__microbatches=4))
    assert written(experiment) < written(parts) < 2 * written(experiment)


def test_a_step_that_fits_by_far_is_not_compiled(experiment, monkeypatch, capsys):
    monkeypatch.setattr(memory, "compile_if_fits", lambda _: pytest.fail("compiled"))
    has(monkeypatch, 2**40)
    memory.check(experiment)
    assert capsys.readouterr().out == ""


def test_devices_along_the_model_axis_share_no_activations(monkeypatch):
    """What eight devices would hold in parts, two and their copies may not."""
    made = build.build(tiny.config("clip", data__batch=512, mesh={"data": 2, "fsdp": 1, "model": 4, "strategy": "dp"}))
    written, state = memory._written(memory.trace(made).jaxpr.jaxpr), memory.bytes_on_device(made.abstract)
    compiled = []
    monkeypatch.setattr(memory, "compile_if_fits", lambda made: compiled.append(made) or (None, "it needs more"))
    monkeypatch.setattr(memory, "suggest", lambda *_: "")
    has(monkeypatch, 1.01 * written / 2 + 8 * state)
    memory.check(made)
    assert not compiled
    has(monkeypatch, 0.99 * written / 2 + 8 * state)
    with pytest.raises(UserError, match="does not fit"):
        memory.check(made)
    assert compiled == [made]


def test_a_step_that_fits_just_so(experiment, peak, monkeypatch, capsys):
    has(monkeypatch, 1.1 * peak)
    memory.check(experiment)
    assert capsys.readouterr().out == ""
    has(monkeypatch, 1.1 * peak, free=0.9 * peak)
    memory.check(experiment)
    assert "WARNING: a step takes" in capsys.readouterr().out


def test_what_does_not_fit_is_refused_with_a_change_that_does(experiment, peak, monkeypatch, capsys):
    has(monkeypatch, 0.9 * peak)
    monkeypatch.setattr(memory, "remedies", lambda config: [{"optim.microbatches": 3}, {"optim.microbatches": 4}])
    with pytest.raises(UserError, match=r"does not fit .* it takes .*fits with --config.optim.microbatches=4"):
        memory.check(experiment)
    assert "looking for a change that fits" in capsys.readouterr().out


def test_a_smaller_batch_is_the_last_resort(experiment, peak, monkeypatch):
    tried = []
    compile_config = memory.compile_config
    monkeypatch.setattr(memory, "compile_config", lambda c, d: tried.append(c.data.batch) or compile_config(c, d))
    monkeypatch.setattr(memory, "remedies", lambda config: [])
    has(monkeypatch, 0.9 * peak)
    with pytest.raises(UserError, match=r"fits with --config.optim.microbatches=1 --config.data.batch=128, or start"):
        memory.check(experiment)
    assert tried == [128]


def test_remedies_that_save_too_little_are_not_compiled(experiment, monkeypatch):
    config, tried = tiny.config("clip", data__batch=4096), []
    monkeypatch.setattr(memory, "compile_config", lambda c, _: tried.append(c.optim.microbatches) or (None, None, ""))
    assert memory.suggest(config, jax.devices(), 1e9, peak=1e11) == ""
    assert tried == [16, 64, 1, 1]  # the last two in batches of a 16th and a 64th


def test_nothing_fits_a_state_that_is_too_large(experiment, monkeypatch):
    has(monkeypatch, memory.bytes_on_device(experiment.abstract) / 2)
    with pytest.raises(UserError, match=r"the state alone takes .*fsdp.*--config small:pairs=PATH"):
        memory.check(experiment)


def test_a_run_may_resume_with_every_remedy_for_its_batch(pairs, trained):
    """What an error recommends is not refused by the folder, and restores the same state."""
    folder, changes = TrainingFolder(trained), memory.remedies(tiny.short(pairs, trained))
    changes = [change for change in changes if tiny.BATCH % change.get("optim.microbatches", 1) == 0]
    assert {"mesh.strategy", "model.img.remat", "model.txt.remat", "optim.microbatches"} <= {*chain(*changes)}
    for change in [*changes, {"data.read_timeout": 1.0}]:
        config = tiny.short(pairs, trained)
        config.update_from_flattened_dict(change)
        folder.check(schema.resolve(config))
    most = tiny.short(pairs, trained, model__img__remat="full", model__txt__remat="full")
    with Checkpointer(trained, read_only=True) as checkpointer:
        state, _ = checkpointer.restore(build.build(most).abstract)
    assert int(state.step) == 4


def test_a_run_is_refused_before_its_folder_is_made(pairs, tmp_path, monkeypatch):
    c = tiny.short(pairs, tmp_path / "run")
    has(monkeypatch, 1.2 * memory.bytes_on_device(build.build(c).abstract))
    monkeypatch.setattr(memory, "suggest", lambda *_: "")
    with pytest.raises(UserError, match="no change that was tried makes it fit"):
        trainer.run(c)
    assert not (tmp_path / "run").exists()


def test_suggestions_are_tried_with_the_groups_that_were_chosen(experiment, peak, monkeypatch):
    made = dataclasses.replace(experiment, length_groups=LengthGroups.parse("4:0.5"))
    suggested = []
    monkeypatch.setattr(memory, "suggest", lambda config, *_: suggested.append(config.data.length_groups) or "")
    has(monkeypatch, 0.9 * peak)
    with pytest.raises(UserError, match="does not fit"):
        memory.check(made)
    assert suggested == ["4:0.5"]


@pytest.mark.parametrize(
    ("folder", "limit", "usage", "cache"),
    [
        (".", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_memory_of_a_container(folder, limit, usage, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_CGROUP", tmp_path)
    machine = memory.host_memory("MemTotal")
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / limit).write_text("1000000\n")
    assert memory.host_memory() == memory.host_memory("MemTotal") == 1e6 < machine
    (tmp_path / folder / usage).write_text("700000\n")
    (tmp_path / folder / "memory.stat").write_text(f"anon 400000\nactive_file 50000\n{cache} 250000\n")
    assert memory.host_memory() == 550_000 and memory.host_memory("MemTotal") == 1e6
    (tmp_path / folder / usage).write_text("1300000\n")
    assert memory.host_memory() == 0
    (tmp_path / folder / limit).write_text("max\n")
    assert memory.host_memory("MemTotal") == machine


def test_memory_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_CGROUP", tmp_path)  # as outside of a container
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory.host_memory("MemTotal") == memory.total(jax.devices()[0]) == pytest.approx(whole, rel=0.01)
    assert 2**26 < memory.host_memory() < whole
