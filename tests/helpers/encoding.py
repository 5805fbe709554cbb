"""A small model behind an encoder, shared by the tests of evaluators, sets and picture."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers.util import two_towers
from xclip_jax.data.preprocessing import Preprocessing, mean_std
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.evaluators.results import flat, items
from xclip_jax.objectives.similarity import ClusterSimilarity, CosineSimilarity
from xclip_jax.parallel.mesh import AXES, make_mesh

SIZE, LENGTH, K = 8, 6, 10
PREPARE = Preprocessing(SIZE, *mean_std("imagenet"))


def tokenize(texts, length):
    rows = [[*t.encode()][: length - 1] for t in texts]
    return np.array([row + [99] * (length - len(row)) for row in rows], np.int32)


def noise(n, seed=0):
    """Random images of the small model's size."""
    return list(np.random.default_rng(seed).integers(0, 256, (n, SIZE, SIZE, 3), np.uint8))


@functools.cache
def small_model(embed=8, clusters=K):
    tower = {"width": 16, "depth": 1, "heads": 2}
    model = two_towers(
        img={"image_size": SIZE, "patch": 4, **tower},
        txt={"vocab": 128, "eot_id": 99, "context_length": LENGTH, **tower},
        embed=embed,
        cluster_head={"clusters": clusters, "hidden": 12} if clusters else None,
    )
    image, text = jnp.zeros((2, SIZE, SIZE, 3)), jnp.zeros((2, LENGTH), jnp.int32)
    return model, nn.unbox(jax.jit(model.init)(jax.random.key(0), image, text))


def build_encoder(model, devices=8, batch=16, sizes=(-1, 1, 1), **options):
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()[:devices])
    outputs = {head.output for head in model.heads.values()}
    known = similarities("z_img" in outputs, "s_img" in outputs)
    return Encoder(model, tokenize, PREPARE, mesh, **{"similarities": known, "batches": (batch,)} | options)


def similarities(embedding, clusters, tau=1.0):
    """Those of a model with a projection, with cluster heads, or with both."""
    return (CosineSimilarity(),) * bool(embedding) + (ClusterSimilarity(tau),) * bool(clusters)


def make_encoder(embed=8, clusters=K, devices=8, batch=16, sizes=(-1, 1, 1)):
    """Shared by the tests, so that each model is compiled once."""
    return cached_encoder(embed, clusters, devices, batch, sizes)


@functools.cache
def cached_encoder(embed, clusters, devices, batch, sizes):
    return build_encoder(small_model(embed, clusters)[0], devices, batch, sizes)


def by_name(results):
    """{name: value} and {name: items} of results."""
    return flat(results), items(results)
