"""Nested losses of examples/matryoshka.py against their definition on the global batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.matryoshka import Nested
from tests.helpers import tiny
from tests.helpers.util import assert_close, central_differences, rows_over
from tests.losses.test_contrastive import embeddings, oracle
from xclip_jax.config import schema
from xclip_jax.core.errors import UserError
from xclip_jax.train import build

DIMS = (1, 3, 4)


def nested(form="clip", **changes):
    config = tiny.config(form, **changes)
    config.objective.name, config.objective.terms = "matryoshka", {form: 1.0, "nested": 0.5}
    config.objective.plugins = {"nested": {"type": "examples.matryoshka:Nested", "form": form, "dims": DIMS}}
    return config


@pytest.mark.parametrize(
    ("form", "scalars", "chunk", "devices"),
    [("clip", [14.0], 0, 1), ("clip", [14.0], 4, 8), ("siglip", [10.0, -10.0], 0, 8)],
)
def test_is_the_sum_over_sizes(form, scalars, chunk, devices):
    def expected(*args):
        total = 0.0
        for size in DIMS:
            z_img, z_txt = (z[:, :size] / np.linalg.norm(z[:, :size], axis=1)[:, None] for z in args[:2])
            total += oracle(form, None, z_img, z_txt, *args[2:])
        return total

    args = [*embeddings(8, 6, seed=1), *scalars]
    arrays = [jnp.asarray(arg, jnp.float32) for arg in args]
    arrays[:2] = jax.device_put(arrays[:2], rows_over(devices))

    def loss(*arrays):
        out = dict(zip(("z_img", "z_txt", "scale", "bias"), arrays, strict=False))
        value, metrics, _ = Nested(DIMS, form)(out, None, {}, {}, chunk=chunk)
        return value, metrics

    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, tuple(range(len(args))), has_aux=True))(*arrays)
    assert float(value) == pytest.approx(expected(*args), rel=1e-5)
    assert_close(grads, central_differences(expected, args), 3e-5)
    scores = args[0][:, :3] @ (args[1][:, :3] / np.linalg.norm(args[1][:, :3], axis=1)[:, None]).T
    assert float(metrics["acc_img_3"]) == np.mean(scores.argmax(axis=1) == np.arange(8)) > 0


def test_the_heads_are_those_of_the_whole_embedding():
    assert build.build(nested()).model.heads == build.build(tiny.config("clip")).model.heads


def test_the_embeddings_are_compared_if_their_own_term_is_idle():
    config = nested()
    config.objective.terms = {"clip": 0.0, "nested": 1.0, "nclip": 1.0}
    similarities = build.build(config).objective.similarities
    assert [similarity.name for similarity in similarities] == ["embedding", "clusters"]


@pytest.mark.parametrize(
    ("dims", "message"),
    [((4, 16), r"model\.embed is 16; set it above 16"), ((), "rising"), ((0, 4), "rising"), ((8, 4), "rising")],
)
def test_sizes_that_make_no_sense(dims, message):
    config = nested()
    config.objective.plugins.nested.dims = dims
    with pytest.raises(UserError, match=message):
        schema.resolve(config)
