"""Negative texts of a batch, on the way from its arrays to the gradients: against a definition without any splits."""

import dataclasses
import shutil
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.util import jit
from tests.train.test_step import catching
from xclip_jax.config import schema
from xclip_jax.core.errors import UserError
from xclip_jax.data import loader, transforms
from xclip_jax.data.length_groups import LengthGroups
from xclip_jax.train import build, cost, trainer
from xclip_jax.train.step import NOISE, BatchNoise, TrainStep

pytestmark = pytest.mark.long

K = 2
NEGATIVES = {"data__negatives": K, "data__negative_columns": ("wrong",)}
PLAIN = {"data__flip_prob": 0.0, "data__color_jitter": 0.0}


def make(objective, devices, k=K, **changes):
    negatives = {"data__negatives": k, "data__negative_columns": ("wrong",) * bool(k)}
    return build.build(tiny.config(objective, **negatives, **PLAIN, **changes), jax.devices()[:devices])


def batch_of(p):
    """A batch in which every fifth negative is missing, so that the caption stands for it."""
    batch = tiny.batch(eot=p.tokenizer.eot_id)
    wrong = tiny.batch(1, b=K * tiny.BATCH, eot=p.tokenizer.eot_id)["text"].reshape(tiny.BATCH, K, -1)
    wrong.reshape(-1, tiny.LENGTH)[::5] = np.repeat(batch["text"], K, axis=0)[::5]
    return batch | {"negatives": wrong}


def defined(p, params, batch):
    """The loss of all images and all texts at once."""
    images = transforms.normalize(jnp.asarray(batch["image"]), *transforms.STATISTICS["imagenet"])
    exists = np.arange(K * tiny.BATCH) % 5 > 0
    texts = np.concatenate([batch["text"], batch["negatives"].reshape(-1, tiny.LENGTH)[exists]])
    variables = {"params": params}
    h = [p.model.apply(variables, x, method=f"encode_{m}") for x, m in ((images, "image"), (texts, "text"))]
    out = p.model.apply(variables, *h, method="project")
    logits = out["scale"] * out["z_img"] @ out["z_txt"].T + out.get("bias", 0.0)
    index = jnp.arange(tiny.BATCH)
    if "bias" in out:
        signs = jnp.where(index[:, None] == jnp.arange(len(texts)), 1, -1)
        return -jnp.sum(jax.nn.log_sigmoid(signs * logits)) / tiny.BATCH
    of_img, of_txt = (jax.nn.log_softmax(x, axis=1)[index, index] for x in (logits, logits[:, : tiny.BATCH].T))
    return -jnp.mean(of_img + of_txt) / 2


@pytest.mark.parametrize(
    ("objective", "devices", "changes"),
    [
        ("clip", 8, {}),
        ("clip", 2, {"optim__microbatches": 2, "loss__chunk_size": 4}),
        pytest.param(
            "siglip",
            4,
            {"optim__microbatches": 2, "mesh__data": 2, "mesh__fsdp": 2, "mesh__strategy": "fsdp"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_gradients_are_those_of_the_definition(objective, devices, changes):
    p = make(objective, devices, **changes)
    batch = batch_of(p)
    if "optim__microbatches" in changes:  # half of the pairs of each device and microbatch have short texts alone
        short = np.arange(tiny.BATCH) // changes["optim__microbatches"] % 2 == 0
        for texts in (batch["text"], batch["negatives"]):
            texts[short, ..., 7], texts[short, ..., 8:] = p.tokenizer.eot_id, 0
        p = dataclasses.replace(p, length_groups=LengthGroups.parse("8:0.5"))
    step, first = catching(p)
    params = jax.device_get(first.params)
    after, metrics = step(first, loader.to_global(batch, p.mesh))
    assert metrics.get("text/cut", 1.0) == 1.0
    value, grads = jit(jax.value_and_grad(lambda params: defined(p, params, batch)))(params)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    assert float(metrics[f"{objective}/negatives"]) == pytest.approx(25 / 16)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(grads))
    chex.assert_trees_all_close(jax.device_get(after.opt_state), grads, rtol=1e-4, atol=1e-5 * largest)


def test_cluster_heads_get_captions_alone():
    """xCLIP's nCLIP, its teacher and the statistics of BatchNorm are as without negatives."""
    changes = {"objective__nclip__target": "ema", "ema__momentum": 0.9}
    results = []
    for negatives in (K, 0):
        p = make("xclip", 1, negatives, **changes)
        step, first = catching(p)
        batch = {name: x for name, x in batch_of(p).items() if negatives or name != "negatives"}
        results.append(step(first, loader.to_global(batch, p.mesh)))
    (with_some, metrics), (without, metrics_0) = results
    assert float(metrics["clip/loss"]) > float(metrics_0["clip/loss"])
    for name in (name for name in metrics_0 if name.startswith(("nclip", "rank"))):
        assert float(metrics[name]) == pytest.approx(float(metrics_0[name]), rel=1e-5), name
    chex.assert_trees_all_close(with_some.batch_stats, without.batch_stats, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(with_some.ema_batch_stats, without.ema_batch_stats, rtol=1e-5, atol=1e-7)


def test_each_negative_has_random_inputs_of_its_own():
    """Of a tower that drops something of each text."""
    tower = types.SimpleNamespace(sample_noise=lambda random_key, b: {"drop": jnp.arange(b)})
    objective = types.SimpleNamespace(towers=("txt",), draw=lambda random_key, inputs, size: inputs)
    config = types.SimpleNamespace(flip_prob=0.0, color_jitter=0.0)
    noise = BatchNoise(config, types.SimpleNamespace(size=1), objective, {"txt": tower})
    batch = {"text": jnp.ones((3, 5), int), "negatives": 2 + jnp.arange(30).reshape(3, 2, 5)}
    inputs = noise.sample(jax.random.key(0), batch)
    assert inputs[NOISE]["txt"]["drop"].tolist() == np.arange(9).reshape(3, 3).tolist()
    model = types.SimpleNamespace(apply=lambda _, text, drop, method: 1.0 * text[:, :2] + 100 * drop[:, None])
    step = TrainStep(model, None, objective, noise, None)
    h_img, h_txt, h_negatives = step._features({}, inputs, None)
    assert h_img is None and h_txt.tolist() == [[1, 1], [301, 301], [601, 601]]
    expected = batch["negatives"].reshape(6, 5)[:, :2] + 100 * np.array([[1], [2], [4], [5], [7], [8]])
    assert h_negatives.tolist() == expected.tolist()


def test_flops_count_negatives_but_for_a_teacher():
    some, none = (make("xclip", 1, k, objective__nclip__target="ema").config for k in (K, 0))
    parts, parts_0 = cost.forward_flops(some), cost.forward_flops(none)
    assert [parts[name] / parts_0[name] for name in ("txt", "loss", "img")] == [3, 3, 1]
    more = 3 * tiny.BATCH * (parts["txt"] + parts["loss"] - parts_0["txt"] - parts_0["loss"])
    assert cost.step_flops(some) - cost.step_flops(none) == pytest.approx(more)
    groups = LengthGroups.parse("4:1")
    assert cost.forward_flops(some)["txt"] == 3 * some.model.tower("txt").flops(True)
    cut = cost.step_flops(some) - cost.step_flops(some, groups)
    assert cut == pytest.approx(3 * (cost.step_flops(none) - cost.step_flops(none, groups)) * (10 / 12), rel=0.1)
    assert cost.activation_bytes(some) > cost.activation_bytes(none)


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        ("nclip", NEGATIVES, "data.negatives is for objectives with the term clip or siglip"),
        ("clip", {"data__negatives": 2}, r"data.negatives is 2 and negative_columns \(\); set both or neither"),
        ("clip", {"data__negative_columns": ("wrong",)}, "data.negatives is 0 and negative_columns"),
        ("clip", {"data__negatives": -1}, "data.negatives is -1; expected at least 0"),
    ],
)
def test_what_does_not_go_together(objective, changes, message):
    with pytest.raises(UserError, match=message):
        schema.resolve(tiny.config(objective, **changes))


@pytest.mark.slow
def test_a_run_with_negatives_of_some_pairs(tmp_path, capsys):
    """It logs them, and resumes to the same losses."""
    pairs = tiny.folder(tmp_path / "pairs")
    for i in range(0, 40, 2):
        (pairs / f"{i:03d}.wrong.txt").write_text(f"picture {i + 1}\nnumber {i + 1}\n")
    config = tiny.short(pairs, tmp_path / "run", **NEGATIVES)
    trainer.run(config)
    losses = tiny.losses(config.run)
    assert all(0 < line["clip/negatives"] < K for line in tiny.lines(config.run) if "loss" in line)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    trainer.run(config)
    assert "resuming at step 2" in capsys.readouterr().out and tiny.losses(config.run) == losses
