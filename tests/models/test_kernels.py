"""Attention by kernels against its definition, `layers.attend`, and in whole towers and steps.

For cuDNN neither a GPU nor the library is needed: XLA computes the same call on the CPU, and JAX lowers a step for CUDA
anywhere.
"""

import collections
import functools
import re
import types

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from tests.helpers import tiny
from tests.helpers.util import assert_close
from xclip_jax.config import load as config_file
from xclip_jax.models import block_kernels, kernels, layers, transformer
from xclip_jax.models.layers import attend
from xclip_jax.models.transformer import Transformer, TransformerConfig
from xclip_jax.parallel import sharding
from xclip_jax.parallel.mesh import make_mesh
from xclip_jax.train import build, cost

pytestmark = pytest.mark.long

# Channels of a head, rows, tokens that count, causal.
CASES = [(64, 16, 13, False), (64, 13, 13, True), (128, 24, 21, True)]


def arrays(kv, n, dtype=np.float64, b=4, d=256):
    rng = np.random.default_rng(0)
    qkv, bias = rng.normal(size=(b, n, 3, d // kv, kv)), rng.normal(size=(3, d // kv, kv))
    return qkv.astype(dtype), bias.astype(dtype)


def fused(qkv, bias, tokens, causal):
    """(b, n, 3, heads, kv), (3, heads, kv) -> (b, tokens, d) by the kernel."""
    kv = qkv.shape[-1]
    grouped, grouped_bias = kernels.group_heads(qkv), kernels.group_heads(bias.astype(jnp.float32))[None]
    return kernels.attention(grouped, grouped_bias, kv, tokens, causal, interpret=True)[:, :tokens]


def defined(qkv, bias, tokens, causal):
    """The same by `attend` on the tokens that count."""
    heads = einops.rearrange((qkv + bias)[:, :tokens], "b n three heads kv -> three b heads n kv")
    return einops.rearrange(attend(*heads, causal=causal), "b heads n kv -> b n (heads kv)")


def exact(qkv, bias, tokens, causal):
    """The same in NumPy's float64."""
    query, key, value = einops.rearrange((qkv + bias)[:, :tokens], "b n three heads kv -> three b heads n kv")
    scores = query @ key.swapaxes(-1, -2) / query.shape[-1] ** 0.5
    scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf) if causal else scores
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return einops.rearrange(weights @ value, "b heads n kv -> b n (heads kv)")


@pytest.mark.parametrize(("kv", "n", "tokens", "causal"), CASES)
def test_values_and_gradients_are_those_of_attend(kv, n, tokens, causal):
    inputs = [jnp.asarray(x, jnp.float32) for x in arrays(kv, n)]
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(4, tokens, 256)), jnp.float32)
    np.testing.assert_allclose(fused(*inputs, tokens, causal), exact(*arrays(kv, n), tokens, causal), atol=4e-6)
    grads = [
        jax.grad(lambda *x, form=form: (form(*x, tokens, causal) * weight).sum(), (0, 1))(*inputs)
        for form in (fused, defined)
    ]
    for ours, theirs in zip(*grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6 * float(jnp.abs(theirs).max()) + 1e-5)
    assert not np.any(grads[0][0][:, tokens:]), "padding has no gradient"


@pytest.mark.parametrize(("kv", "n", "tokens", "causal"), CASES[1:])
def test_bf16_is_as_near_to_float64_as_attend(kv, n, tokens, causal):
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in arrays(kv, n)]
    whole = exact(*(np.asarray(x, np.float64) for x in inputs), tokens, causal)
    errors = [np.abs(np.asarray(form(*inputs, tokens, causal), np.float64) - whole) for form in (fused, defined)]
    assert errors[0].max() <= 1.2 * errors[1].max() and errors[0].mean() <= 1.05 * errors[1].mean()


def test_which_sequences_fit():
    assert kernels.fits(197, 12, 768) and kernels.fits(577, 16, 1024) and kernels.fits(77, 8, 1024)
    assert not kernels.fits(50, 2, 64) and not kernels.fits(50, 3, 192) and not kernels.fits(1024, 12, 768)


@pytest.fixture
def everywhere(monkeypatch):
    """The program for TPUs with its kernels interpreted, wherever sizes fit; a switch to turn them on and off."""
    on, platform = {"kernel": True}, sharding.platform
    for module in (sharding, layers, transformer):
        monkeypatch.setattr(module, "platform", lambda: "tpu" if on["kernel"] and platform() else platform())
    monkeypatch.setattr(transformer, "device", lambda: types.SimpleNamespace(num_cores=1))
    for module, name in ((kernels, "attention"), (block_kernels, "project"), (block_kernels, "finish")):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), interpret=True))

    def fuses(self, tokens, _):
        shards = sharding.shards_of("heads")
        return on["kernel"] and kernels.fits(tokens, self.heads // shards, self.width // shards)

    def fuses_products(self, x):
        return on["kernel"] and sharding.shards_of("heads") == 1

    monkeypatch.setattr(TransformerConfig, "fuses", fuses)
    monkeypatch.setattr(TransformerConfig, "fuses_products", fuses_products)
    return on


@pytest.mark.parametrize(
    ("strategy", "scan", "remat"), [("dp", False, "dots"), ("fsdp", True, "none"), ("fsdp_tp", True, "full")]
)
def test_a_tower_on_eight_devices_is_the_same(everywhere, strategy, scan, remat):
    config = TransformerConfig(width=256, depth=2, heads=4, scan=scan, remat=remat)
    tower = Transformer(config, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (8, 13, 256))
    params = nn.unbox(tower.init(jax.random.key(1), x))
    params = jax.tree.map(lambda p: p + 0.02 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    mesh = make_mesh({"data": 8, "fsdp": 1, "model": 1} if strategy == "dp" else {"data": 2, "fsdp": 2, "model": 2})
    at = None if scan else jnp.full(8, 5)

    @jax.jit
    def run(params, x):
        with sharding.layout_scope(sharding.MeshLayout(mesh, strategy)):
            return jax.value_and_grad(lambda *a: jnp.square(tower.apply(*a, at=at)[:, :3]).sum(), (0, 1))(params, x)

    results = []
    for everywhere["kernel"] in (True, False):
        jax.clear_caches()
        results.append(run(params, x))
        program = str(jax.make_jaxpr(run)(params, x))
        assert ("attention_gradient" in program) == everywhere["kernel"]
        assert ("finish_gradient" in program) == (everywhere["kernel"] and strategy != "fsdp_tp")
    assert_close(*map(jax.tree.leaves, results), 1e-5)


@pytest.mark.parametrize(
    ("topology", "kv", "n", "tokens", "causal"),
    [
        ("v4:2x2x1", 64, 200, 197, False),
        ("v5e:2x2", 128, 584, 577, False),
        ("v5p:2x2x1", 64, 77, 77, True),
        ("v6e:2x2", 64, 200, 197, False),
        ("tpu7x:2x2x1", 64, 77, 77, True),
    ],
)
def test_it_compiles_for_each_generation(topology, kv, n, tokens, causal):
    pytest.importorskip("libtpu")
    from xclip_jax.commands import plan

    device = plan.devices_of(topology)[0][0]
    where = jax.sharding.SingleDeviceSharding(device)
    shapes = [((8, n, 768), jnp.bfloat16), ((1, 768), jnp.float32), ((8, n, 256), jnp.bfloat16)]
    qkv, bias, g = (jax.ShapeDtypeStruct(*shape, sharding=where) for shape in shapes)

    def both(qkv, bias, g):
        out, pullback = jax.vjp(lambda *x: kernels.attention(*x, kv, tokens, causal), qkv, bias)
        return out, pullback(g)

    program = jax.jit(both).lower(qkv, bias, g).compile().as_text()
    assert program.count("tpu_custom_call") == 2
    assert f"{n},{n}]" not in program


FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"


@pytest.fixture
def undefined_rows(monkeypatch):
    """cuDNN leaves rows beyond the lengths of the sequences undefined, in its result and in its gradients."""
    attention = jax.nn.dot_product_attention

    def with_undefined_rows(*qkv, query_seq_lengths, **options):
        rows = jnp.arange(qkv[0].shape[1])[:, None, None] < query_seq_lengths[0]

        @jax.custom_vjp
        def call(*qkv):
            return forward(*qkv)[0]

        def forward(*qkv):
            out, pullback = jax.vjp(lambda *x: attention(*x, query_seq_lengths=query_seq_lengths, **options), *qkv)
            return jnp.where(rows, out, jnp.nan), pullback

        def backward(pullback, g):
            return tuple(jnp.where(rows, x, jnp.nan) for x in pullback(g))

        call.defvjp(forward, backward)
        return call(*qkv)

    monkeypatch.setattr(jax.nn, "dot_product_attention", with_undefined_rows)


@pytest.mark.parametrize(("n", "causal"), [(12, True), (13, False)])
def test_cudnns_values_and_gradients_are_those_of_attend(undefined_rows, n, causal):
    rng = np.random.default_rng(0)
    *qkv, weight = jnp.asarray(rng.normal(size=(4, 2, 3, n, 8)), jnp.float32)
    results = []
    for form in (
        functools.partial(kernels.cudnn_attention, causal=causal, implementation="xla"),
        functools.partial(attend, causal=causal),
    ):
        results.append((form(*qkv), jax.grad(lambda *x, form=form: (form(*x) * weight).sum(), (0, 1, 2))(*qkv)))
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        assert float(jnp.abs(theirs).max()) > 0.1
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.slow
def test_a_whole_step_with_cudnn_is_the_same(monkeypatch):
    changes = {"mesh__strategy": "fsdp_tp", "mesh__fsdp": 2, "mesh__model": 2, "model__scan": True}
    calls = []

    def by_xla(query, key, value, *, causal):
        calls.append((query.shape, causal))
        return attention(query, key, value, causal=causal, implementation="xla")

    attention = kernels.cudnn_attention
    monkeypatch.setattr(kernels, "cudnn_attention", by_xla)
    results = []
    for accepted in (True, False):
        monkeypatch.setattr(kernels, "cudnn_accepts", lambda *_, accepted=accepted: accepted)
        experiment = build.build(tiny.config("clip", **changes))
        state = tiny.drawn(experiment)
        batch = {key: jnp.asarray(x) for key, x in tiny.batch().items()}
        results.append(experiment.compiled(state, batch)[1])
    assert {causal for _, causal in calls} == {False, True}
    assert {shape[1] for shape, _ in calls} == {1}  # of two heads on a device
    for name, value in results[1].items():
        np.testing.assert_allclose(results[0][name], value, rtol=2e-5, atol=1e-6, err_msg=name)


def lowered(objective, **changes):
    """The step on eight devices for CUDA, towers of two blocks of B/16 in bf16, as StableHLO."""
    config = config_file.load_config(f"pretrain:objective={objective},preset=B/16,batch=64")
    config.model.img.depth = config.model.txt.depth = 2
    config.data.length_groups = "full"
    config.update_from_flattened_dict(changes)
    return cost.trace(build.build(config)).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("objective", "strategy"), [("clip", "dp"), ("xclip", "zero1")])
def test_a_step_for_cuda_has_cudnns_attention_and_no_scores(objective, strategy, monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(kernels, "cudnn_accepts", lambda *_: True)
    program = lowered(objective, **{"mesh.strategy": strategy})
    # One block of each tower, since the blocks are scanned; remat=dots computes it once more in the backward pass.
    assert collections.Counter(re.findall(r"custom_call @([\w$]+)", program)) == {FORWARD: 4, BACKWARD: 2}
    assert not re.search(r"x(197x197|198x198|77x77|78x78)x", program)
    # Eight images of a device, heads of 64 channels; one token of padding.
    assert "tensor<8x198x12x64xbf16>" in program and "tensor<8x78x8x64xbf16>" in program


def test_without_cudnn_a_step_for_cuda_is_xlas_alone():
    program = lowered("clip")
    assert "custom_call" not in program
    assert "tensor<64x12x197x197xf32>" in program


def test_a_refusal_is_printed_once(monkeypatch, capsys):
    """cuDNN is missing here, as on a machine with another GPU."""
    cpu = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    monkeypatch.setattr(jax.sharding, "SingleDeviceSharding", lambda _: cpu)
    gpu = type("Device", (), {"platform": "gpu"})()
    assert not any(kernels.cudnn_accepts(gpu, (2, 4, 13, 8), jnp.dtype("bfloat16"), True) for _ in range(2))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("WARNING: XLA computes attention over 13 tokens") and "cuDNN is not detected" in line


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", jnp.bfloat16), ("tpu", jnp.bfloat16), ("gpu", jnp.float32)])
def test_nothing_is_compiled_where_cudnn_cannot_be(platform, dtype, capsys):
    device = type("Device", (), {"platform": platform})()
    assert not kernels.cudnn_accepts(device, (2, 4, 13, 8), jnp.dtype(dtype), True)
    assert capsys.readouterr().out == ""
