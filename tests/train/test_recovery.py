import dataclasses
import types
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import tiny
from tests.torture.soak import CLOCKS
from xclip_jax import optim
from xclip_jax.config import schema
from xclip_jax.core.errors import Diverged, UserError
from xclip_jax.core.run_folder import RunReader
from xclip_jax.data import loader
from xclip_jax.objectives import Term
from xclip_jax.train import build, recovery, trainer
from xclip_jax.train import step as train_step

pytestmark = pytest.mark.long

# First token of a text: what is not finite at a step with it.
LOSS, GRADIENT, STATE = 201, 202, 203


@dataclasses.dataclass(frozen=True)
class Poison(Term):
    title: ClassVar[str] = "poison"

    def initial_state(self, model, vocab):
        return {"poison": jnp.zeros(3)}

    def __call__(self, out, teacher, state, batch, *, chunk=0):
        def marked(token):
            return (batch["text"][:, 0] == token).any()

        zero = out["z_img"].sum() * 0
        root = jnp.sqrt(jnp.where(marked(GRADIENT), zero, zero + 1.0))  # infinite slope at 0, times 0
        loss = root - jax.lax.stop_gradient(root) + jnp.where(marked(LOSS), jnp.nan, 0.0)
        return loss, {"loss": loss}, {"poison": state["poison"] + jnp.where(marked(STATE), jnp.inf, 1.0)}


def config(objective="clip", **changes):
    c = tiny.config(objective, **changes)
    c.objective.name = f"poisoned_{objective}"
    c.objective.terms = c.objective.terms.to_dict() | {"poison": 1.0}
    c.objective.plugins = {"poison": {"type": f"{__name__}:Poison"}}
    return c


def mark(batch, token):
    text = batch["text"].copy()
    text[5, 0] = token
    return batch | {"text": text}


def assert_same(a, b):
    chex.assert_trees_all_equal(jax.device_get(a), jax.device_get(b))


def test_a_bad_batch_changes_nothing_but_the_step():
    """And the steps after it are those of a run that never saw its update."""
    changes = {"objective__nclip__target": "ema", "optim__grad_clip_norm": 1.0}
    p = build.build(config("xclip", mesh={"data": -1, "fsdp": 1, "model": 1, "strategy": "zero1"}, **changes))
    batches = [tiny.batch(i, eot=p.tokenizer.eot_id) for i in range(3)]

    def step(s, batch):
        return p.compiled(s, loader.to_global(batch, p.mesh))

    s, metrics = step(tiny.drawn(p), batches[0])
    assert not metrics["skipped"]
    before = jax.device_get(s)
    assert len(jax.tree.leaves(before.ema_batch_stats)) and before.loss_state["poison"].any()
    for count, (token, bad) in enumerate(((LOSS, ["loss"]), (GRADIENT, ["grad_norm"]), (STATE, [])), 2):
        s, metrics = step(s, mark(batches[1], token))
        assert metrics["skipped"]
        assert [name for name in ("loss", "grad_norm") if not np.isfinite(metrics[name])] == bad
        assert int(s.step) == count
        for name in ("params", "batch_stats", "ema_params", "ema_batch_stats", "loss_state", "seed"):
            assert_same(getattr(s, name), getattr(before, name))
        assert_same(s, train_step.with_step(state_like(before, p), count))
        # The learning rate moves on, the correction of the moments' bias does not.
        assert (counts(s, optax.ScaleByScheduleState), counts(s, optax.ScaleByAdamState)) == ([count], [1])
    s, metrics = step(s, batches[2])
    expected, _ = step(train_step.with_step(state_like(before, p), 4), batches[2])
    assert not metrics["skipped"] and np.isfinite(metrics["loss"])
    assert_same(s, expected)
    assert not np.array_equal(jax.tree.leaves(s.params)[0], jax.tree.leaves(before.params)[0])
    assert p.compiled._cache_size() == 1


def counts(s, kind):
    nodes = jax.tree.leaves(s.opt_state, is_leaf=lambda x: isinstance(x, kind))
    return [int(x.count) for x in nodes if isinstance(x, kind)]


def state_like(host, p):
    """A state in memory of the host, laid out on the devices."""
    return jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), host, p.abstract)


@pytest.mark.parametrize(("b1", "b2"), [(0.0, 0.0), (0.999999, 0.0), (0.0, 0.999999), (0.9999999, 0.9999999)])
def test_updates_are_finite_within_the_bounds_of_the_optimizer(b1, b2):
    largest = {"lr": 1000.0, "lr_end": 1000.0, "weight_decay": 1000.0, "eps": 1e-15}
    c = tiny.config(**{f"optim__{key}": value for key, value in (largest | {"b1": b1, "b2": b2}).items()})
    tx = optim.make_optimizer(schema.resolve(c).optim, 10, {})
    values = np.array([0.0, 1e-45, -1e-38, 1e-23, 1e-10, -1.0, 1e10, 1.8e19], np.float32)  # squares that fp32 holds
    params = {"kernel": jnp.asarray(np.repeat(values, len(values)))}
    opt_state, rng = tx.init(params), np.random.default_rng(0)
    for i in range(20):  # each value after each, as a gradient and as a parameter
        grads = {"kernel": jnp.asarray(np.tile(rng.permutation(values) if i % 2 else np.roll(values, i), len(values)))}
        updates, opt_state = tx.update(grads, opt_state, params)
        chex.assert_tree_all_finite((updates, opt_state, optax.apply_updates(params, updates)))


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "MOST_SKIPPED", 2)
        yield


def train(c, monkeypatch, poisoned, start=0, kill=None):
    """Run `c` from step `start` to a kill before step `kill`; steps `poisoned` are bad. Returns the steps' batches."""
    original, batches = loader.to_global, {}

    def to_global(batch, mesh):
        step = start + len(batches) + 1
        if step == kill:
            raise tiny.CutOff
        batches[step] = mark({name: x.copy() for name, x in batch.items()}, LOSS) if step in poisoned else batch
        return original(batches[step], mesh)

    with monkeypatch.context() as patch:
        patch.setattr(loader, "to_global", to_global)
        trainer.run(c)
    return batches


def run_config(pairs, run, **changes):
    defaults = {"data__sources": (f"folder:{pairs}",), "checkpoint__every": 2, "checkpoint__keep": 20}
    return config(run=run, **defaults | changes)


def test_a_run_goes_on_without_the_bad_steps(pairs, tmp_path, monkeypatch, capsys):
    c = run_config(pairs, tmp_path / "run")
    train(c, monkeypatch, poisoned={4, 5, 9})
    out = capsys.readouterr().out
    assert out.count("the step is skipped") == 3
    assert "WARNING: step 5 has values that are not finite, loss nan, " in out
    assert "skipped, 2 in a row, 2 in all" in out
    b = tiny.BATCH
    entries = [[line[key] for key in ("step", "position", "samples", "loss")]
               for line in tiny.lines(c.run, "skipped_steps.jsonl")]  # fmt: skip
    assert entries == [[4, 3 * b, b, None], [5, 4 * b, b, None], [9, 8 * b, b, None]]
    assert [(line["step"], line["skipped_steps"]) for line in tiny.lines(c.run)] == [
        (1, 0), (2, 0), (3, 0), (6, 2), (7, 2), (8, 2), (10, 3)
    ]  # fmt: skip
    rates = {line["step"]: line["lr"] for line in tiny.lines(c.run)}  # of 10 steps, the first of them warm-up
    cosine = {step: 1e-5 + 4.95e-4 * (1 + np.cos(np.pi * (step - 2) / 9)) for step in rates}
    assert rates == pytest.approx(cosine | {1: 0.0}, rel=1e-4)
    final, position = tiny.restored(c)
    assert position["counters"]["skipped"] == {"total": 3, "in_a_row": 0, "rewound": 0}
    assert position["samples"] == 10 * b
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(final)))


def test_too_many_in_a_row_stop_the_run(pairs, tmp_path, monkeypatch):
    c = run_config(pairs, tmp_path / "run", checkpoint__keep=1)
    message = "step 8 has .* after 2 skipped steps in a row, and is not saved; the last checkpoint has step 4"
    with pytest.raises(Diverged, match=message):
        train(c, monkeypatch, poisoned={2, 3, 6, 7, 8, 9})
    assert [line["step"] for line in tiny.lines(c.run, "skipped_steps.jsonl")] == [2, 3, 6, 7, 8]
    assert RunReader(c.run).latest_step() == 4


def rewind_config(pairs, run):
    return run_config(pairs, run, steps=12, optim__on_bad_steps="rewind")


POISONED = {5, 6, 7}


@pytest.fixture(scope="module")
def rewound(pairs, tmp_path_factory):
    c = rewind_config(pairs, tmp_path_factory.mktemp("rewound") / "run")
    with pytest.MonkeyPatch.context() as patch:
        return c, train(c, patch, POISONED)


def test_a_rewind_undoes_the_last_steps_and_goes_on_behind_the_bad_ones(rewound):
    c, batches = rewound
    rewind = {"step": 7, "rewound_to": 2}  # the parameters of step 4 failed
    assert tiny.lines(c.run, "skipped_steps.jsonl")[-1] == rewind
    p = build.build(c)
    s = train_step.with_step(tiny.restored(c, 2)[0], 7)
    for step in range(8, 13):
        s, _ = p.compiled(s, loader.to_global(batches[step], p.mesh))
    final, position = tiny.restored(c)
    assert_same(final, s)
    assert position["counters"]["skipped"] == {"total": 3, "in_a_row": 0, "rewound": 7}
    assert [line["step"] for line in tiny.lines(c.run)] == [1, 2, 3, 4, 8, 9, 10, 11, 12]


@pytest.mark.parametrize(("kill", "resume"), [(7, 4), pytest.param(9, 8, marks=pytest.mark.slow)])
def test_a_run_killed_near_a_rewind_resumes_bit_exactly(pairs, tmp_path, monkeypatch, rewound, kill, resume):
    """Before it, and after the next checkpoint."""
    c = rewind_config(pairs, tmp_path / "run")
    with pytest.raises(tiny.CutOff):
        train(c, monkeypatch, POISONED, kill=kill)
    train(c, monkeypatch, POISONED, start=resume)
    for step in (8, 12):
        assert_same(tiny.restored(c, step), tiny.restored(rewound[0], step))
    logged = [[{k: v for k, v in x.items() if k not in CLOCKS} for x in tiny.lines(run.run)] for run in (rewound[0], c)]
    assert logged[0] == logged[1]
    assert tiny.lines(c.run, "skipped_steps.jsonl") == tiny.lines(rewound[0].run, "skipped_steps.jsonl")


@pytest.mark.parametrize(("damaged", "target"), [((), 4), ((4,), 2), ((2, 4), 5)])
def test_a_rewind_wastes_steps_and_passes_over_damaged_checkpoints(tmp_path, monkeypatch, damaged, target):
    """Steps 3, 7 and 8 are skipped; the checkpoint of step 5 was saved by an interrupt, others are preferred."""
    config = tiny.config(optim__on_bad_steps="rewind", steps=100, checkpoint__every=2)
    folder = types.SimpleNamespace(skipped_steps_file=tmp_path / "skipped_steps.jsonl")
    run = types.SimpleNamespace(config=config, folder=folder, experiment=types.SimpleNamespace(abstract=None))
    whole = types.SimpleNamespace(
        steps=lambda: [2, 4, 5], find_fault=lambda step: step in damaged or None, restore=lambda _, step: (step, {})
    )
    monkeypatch.setattr(recovery, "MOST_SKIPPED", 1)
    monkeypatch.setattr(recovery, "with_step", lambda state, step: (state, step))
    skipped = recovery.SkippedSteps(run, 0, types.SimpleNamespace(counters={}), whole)
    bad = dict.fromkeys(("loss", "grad_norm", "param_norm"), jnp.nan)
    for step in range(1, 9):
        skipped.check(step, bad | {"skipped": jnp.asarray(step in (3, 7, 8))})
    assert skipped.exceeded and skipped.wasted == {3, 7, 8}
    assert skipped.rewind({}) == (target, 8)
    assert skipped.wasted == {3, *range(target + 1, 9)}


def test_a_rewind_that_did_not_help_is_the_last(pairs, tmp_path, monkeypatch):
    c = rewind_config(pairs, tmp_path / "run")
    with pytest.raises(Diverged, match=r"steps 8 to 10 are skipped, and no checkpoint is left to rewind to"):
        train(c, monkeypatch, {*POISONED, 8, 9, 10})


def test_a_rewind_needs_two_checkpoints():
    kept = tiny.config(optim__on_bad_steps="rewind", checkpoint__keep=1)
    with pytest.raises(UserError, match=r"optim\.on_bad_steps 'rewind' may need .*; raise checkpoint\.keep to 2"):
        schema.resolve(kept)
