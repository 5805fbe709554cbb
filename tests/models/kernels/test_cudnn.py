"""Attention by cuDNN: its arguments against the definition, and train steps as they are exported to CUDA.

Neither a GPU nor cuDNN is needed: XLA computes the same call on the CPU, and JAX lowers a step for CUDA anywhere.
"""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from tests.helpers import tiny
from xclip_jax.config import load as config_file
from xclip_jax.models.kernels import cudnn
from xclip_jax.models.layers import attend
from xclip_jax.train import build, memory
from xclip_jax.train.state import create

pytestmark = pytest.mark.long

FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [12, 13])
def test_values_and_gradients_are_those_of_attend(n, causal):
    rng = np.random.default_rng(0)
    *qkv, weight = jnp.asarray(rng.normal(size=(4, 2, 3, n, 8)), jnp.float32)
    results = []
    for form in (
        functools.partial(cudnn.attention, causal=causal, implementation="xla"),
        functools.partial(attend, causal=causal),
    ):
        results.append((form(*qkv), jax.grad(lambda *x, form=form: (form(*x) * weight).sum(), (0, 1, 2))(*qkv)))
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        assert float(jnp.abs(theirs).max()) > 0.1
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_undefined_rows_reach_neither_the_result_nor_a_gradient(monkeypatch):
    """cuDNN leaves rows beyond the lengths of the sequences undefined, in its result and in its gradients."""
    rng = np.random.default_rng(0)
    *qkv, weight = jnp.asarray(rng.normal(size=(4, 2, 3, 13, 8)), jnp.float32)

    def run():
        form = functools.partial(cudnn.attention, causal=False, implementation="xla")
        return form(*qkv), jax.grad(lambda *x: (form(*x) * weight).sum(), (0, 1, 2))(*qkv)

    defined, attention = run(), jax.nn.dot_product_attention

    def with_undefined_rows(*qkv, query_seq_lengths, **options):
        rows = jnp.arange(14)[:, None, None] < query_seq_lengths[0]

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
    for ours, theirs in zip(*map(jax.tree.leaves, (run(), defined)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


STEPS = [
    pytest.param({"mesh__strategy": "zero1"}, marks=pytest.mark.slow),
    {"mesh__strategy": "fsdp_tp", "mesh__fsdp": 2, "mesh__model": 2},
    pytest.param({"optim__microbatches": 2}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("changes", STEPS, ids=["zero1", "fsdp_tp", "microbatches"])
def test_a_whole_step_is_the_same(changes, monkeypatch):
    calls = []

    def by_xla(query, key, value, *, causal):
        calls.append((query.shape, causal))
        return attention(query, key, value, causal=causal, implementation="xla")

    attention = cudnn.attention
    monkeypatch.setattr(cudnn, "attention", by_xla)
    results = []
    for accepted in (True, False):
        monkeypatch.setattr(cudnn, "accepts", lambda *_, accepted=accepted: accepted)
        experiment = build.build(tiny.config("clip", model__img__scan=True, model__txt__scan=True, **changes))
        state = create(experiment.init, experiment.abstract)
        batch = {key: jnp.asarray(x) for key, x in tiny.batch().items()}
        results.append(experiment.compiled(state, batch)[1])
    assert {causal for _, causal in calls} == {False, True}
    heads = 2 // changes.get("mesh__model", 1)
    assert {shape[1] for shape, _ in calls} == {heads}
    for name, value in results[1].items():
        np.testing.assert_allclose(results[0][name], value, rtol=2e-5, atol=1e-6, err_msg=name)


def lowered(objective, **changes):
    """The step on eight devices for CUDA, towers of two blocks of B/16 in bf16, as StableHLO."""
    config = config_file.load_config(f"pretrain:objective={objective},preset=B/16,batch=64")
    config.model.img.depth = config.model.txt.depth = 2
    config.data.length_groups = "full"
    config.update_from_flattened_dict(changes)
    return memory.trace(build.build(config)).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("strategy", ["dp", "zero1"])
@pytest.mark.parametrize("objective", ["clip", "xclip"])
def test_a_step_for_cuda_has_cudnns_attention_and_no_scores(objective, strategy, monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(cudnn, "accepts", lambda *_: True)
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
    assert not any(cudnn.accepts(gpu, (2, 4, 13, 8), jnp.dtype("bfloat16"), True) for _ in range(2))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("WARNING: XLA computes attention over 13 tokens") and "cuDNN is not detected" in line


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", jnp.bfloat16), ("tpu", jnp.bfloat16), ("gpu", jnp.float32)])
def test_nothing_is_compiled_where_cudnn_cannot_be(platform, dtype, capsys):
    device = type("Device", (), {"platform": platform})()
    assert not cudnn.accepts(device, (2, 4, 13, 8), jnp.dtype(dtype), True)
    assert capsys.readouterr().out == ""
