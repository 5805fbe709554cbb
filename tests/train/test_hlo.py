import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.helpers import tiny
from xclip_jax.losses import contrastive, noncontrastive
from xclip_jax.parallel.mesh import AXES, make_mesh
from xclip_jax.parallel.sharding import FactoredLogits, MeshLayout, layout_scope
from xclip_jax.train import build
from xclip_jax.train.cost import hlo
from xclip_jax.train.cost.hlo import Collective, collectives, summary

MESH = make_mesh({"data": 4, "fsdp": 2, "model": 1})
P = PartitionSpec
WHOLE = P()


def sent(fn, *specs, out=WHOLE):
    mapped = jax.jit(jax.shard_map(fn, mesh=MESH, in_specs=specs, out_specs=out, check_vma=False))
    found = mapped.lower(jax.ShapeDtypeStruct((64, 16), jnp.float32)).compile()
    return [(x.kind, x.bytes, x.group, x.count) for x in collectives(found.as_text(), 8)]


def test_all_reduce_and_all_gather_and_reduce_scatter():
    assert sent(lambda x: jax.lax.psum(x, "data"), P("data")) == [("all-reduce", 16 * 16 * 4, 4, 1)]
    assert sent(lambda x: jax.lax.all_gather(x, "fsdp"), P("fsdp")) == [("all-gather", 64 * 16 * 4, 2, 1)]
    scattered = sent(lambda x: jax.lax.psum_scatter(x, "data", tiled=True), P(), out=P("data"))
    assert scattered == [("reduce-scatter", 64 * 16 * 4, 4, 1)]


TPU = """\
%condition.1 (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%start.1 (a: f32[4,8]) -> f32[16,8] {
  ROOT %all-gather.1 = f32[16,8]{1,0} all-gather(%a), PIECE
}

%async_collective_fusion.2 (a: f32[4,8]) -> f32[16,8] {
  ROOT %all-gather.2 = f32[16,8]{1,0} all-gather(%a), PIECE
}

%all-reduce-scatter.3 (a: f32[32,8]) -> f32[8,8] {
  %all-reduce.1 = f32[32,8]{1,0} all-reduce(%a), channel_id=46, replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %ds = f32[8,8]{1,0} dynamic-slice(%all-reduce.1, %i, %j), dynamic_slice_sizes={8,8}
}

%body.1 (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.1 = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %f = f32[16,8]{1,0} fusion(%a), kind=kOutput, calls=%async_collective_fusion.2
  %all-reduce.3 = (bf16[8]{0}, f32[2,3]{1,0}) all-reduce(%x, %y), channel_id=7, replica_groups={{0,1},{2,3}}
  %next = s32[]{:T(128)} add(%i.1, %one)
  ROOT %t.1 = (s32[]{:T(128)}, f32[8]{0}) tuple(%next, %x)
}

ENTRY %main (a: f32[4,8]) -> f32[8] {
  %s = f32[16,8]{1,0} fusion(%a), kind=kCustom, calls=%start.1
  %w = (s32[]{:T(128)}, f32[8]{0}) while(%t), condition=%condition.1, body=%body.1
  %ag = (f32[4,8]{1,0}, f32[32,8]{1,0}) all-gather-start(%a), channel_id=9, replica_groups=[1,8]<=[8], dimensions={0}
  %agd = f32[32,8]{1,0} all-gather-done(%ag)
  %rs = f32[8,8]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.3
  %alone = f32[4,8]{1,0} all-gather(%a), channel_id=10, replica_groups=[8,1]<=[8]
}
""".replace("PIECE", """channel_id=45, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, chain_id="3\"""")


def test_the_tpu_compilers_ways_of_writing():
    found = sorted(collectives(TPU, 8), key=lambda x: x.bytes)
    assert found == [
        Collective("all-reduce", ("bf16[8]", "f32[2,3]"), 40, 2, 12),  # the loop's bound is in its condition
        Collective("all-gather", ("f32[16,8]",), 512, 4, 1),  # one gather, spread over the loop
        Collective("all-gather", ("f32[32,8]",), 1024, 8, 1),  # asynchronous; nothing moves in a group of one
        Collective("reduce-scatter", ("f32[32,8]",), 1024, 4, 1),
    ]
    assert summary(found) == {"all-reduce": 480, "all-gather": 1536, "reduce-scatter": 1024}
    assert [x.sent for x in found] == [480, 512 * 3 / 4, 1024 * 7 / 8, 1024 * 3 / 4]


def test_chunks_send_texts_and_their_gradients_once():
    b, e = 256, 64
    mesh = make_mesh({"data": 8, "fsdp": 1, "model": 1})
    z = jax.ShapeDtypeStruct((b, e), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    loss = jax.jit(jax.value_and_grad(partial(contrastive.clip, chunk=64), (0, 1), has_aux=True))
    with layout_scope(MeshLayout(mesh, "dp")):
        found = summary(collectives(loss.lower(z, z, 10.0).compile().as_text(), 8))
    assert 2 * 4 * b * e < sum(found.values()) < 2.3 * 4 * b * e


def test_chunks_sum_the_gradients_of_the_heads_once():
    b, k, d = 256, 2048, 64
    mesh = make_mesh({"data": 8, "fsdp": 1, "model": 1})
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    shapes = [((b, d), rows), ((d, k), whole), ((k,), whole)] * 2
    args = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where) for shape, where in shapes]

    def loss(*args):
        return noncontrastive.nclip(FactoredLogits(*args[:3]), FactoredLogits(*args[3:]), chunk=64)

    out = ((whole, whole), tuple(where for _, where in shapes))
    with layout_scope(MeshLayout(mesh, "dp")):
        step = jax.jit(jax.value_and_grad(loss, tuple(range(6)), has_aux=True), out_shardings=out)
        total = sum(x.total for x in collectives(step.lower(*args).compile().as_text(), 8))
    least = 2 * 4 * (d * k + k)
    assert least < total < 1.2 * least


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups=[4,8]<=[32]", 8),
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=mesh['x'=1,'y'=8,'z'=4], device_ids=([4,8]T(1,0)) {'y'}, dimensions={1}", 8),
        ("replica_groups=mesh['x'=8,'y'=4] {'x':(2)4,'y'}", 16),
        ("replica_groups={}", 32),
    ],
)
def test_groups_are_written_in_many_ways(text, group):
    gather = f"ROOT %g = f32[64]{{0}} all-gather(%a), channel_id=1, {text}"
    found = collectives(f"ENTRY %main (a: f32[8]) -> f32[64] {{\n  {gather}\n}}", 32)
    assert [x.group for x in found] == [group]


BRANCHES = """\
%large.1 (a: f32[8]) -> f32[8] {
  %r.1 = f32[8]{0} all-reduce(%a), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %r.2 = f32[4]{0} all-reduce(%b), channel_id=2, replica_groups={{0,1}}, to_apply=%add
}

%small.2 (a: f32[8]) -> f32[8] {
  %r.3 = f32[9]{0} all-reduce(%a), channel_id=3, replica_groups={{0,1}}, to_apply=%add
}

%none.3 (a: f32[8]) -> f32[8] {
  %copy = f32[8]{0} copy(%a)
}

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c.1 = (f32[8]{0}) conditional(%p, %t, %t), true_computation=%none.3, false_computation=%small.2
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %c.2 = (f32[8]{0}) conditional(%n, %t, %t, %t), branch_computations={%small.2, %large.1, %none.3}
  %w = (s32[], f32[8]) while(%t), condition=%cond.1, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_the_largest_branch_counts():
    found = sorted(collectives(BRANCHES, 2), key=lambda x: x.bytes)
    assert [(x.shapes, x.count) for x in found] == [(("f32[4]",), 1), (("f32[8]",), 1), (("f32[9]",), 5)]


@pytest.mark.parametrize(("strategy", "data", "fsdp"), [("zero1", 8, 1), ("fsdp", 2, 4)])
def test_no_strategy_moves_much_more_than_it_must(strategy, data, fsdp):
    """Payload at most 1.2 times the minimum: gradients once, both embeddings once, parameters as the strategy must.

    Of split clusters no kernel is sent: hidden rows are gathered, and their gradient is scattered. zero1 gathers the
    updated parameters once. fsdp gathers each split kernel once, since without rematerialisation what was gathered for
    the forward pass is kept, and sums gradients over "fsdp", then a shard of them over "data".
    """
    b, e, hidden = 32, 64, 256
    mesh = {"strategy": strategy, "data": data, "fsdp": fsdp, "model": 1}
    sizes = {"model__img__width": 256, "model__img__depth": 2, "model__txt__width": 128, "model__embed": e}
    head = {"clusters": 512, "hidden": hidden, "layers": 1}
    p = build.build(tiny.config("xclip", data__batch=b, mesh=mesh, model__cluster_head=head, **sizes))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tiny.batch(b=b))
    found = collectives(p.compiled.lower(p.abstract, batch).compile().as_text(), 8)
    everything = jax.tree.leaves(p.abstract.params)
    leaves = [x for x in everything if AXES not in x.sharding.spec]
    assert len(everything) - len(leaves) == 4  # kernel and bias of both heads
    every = 4 * sum(x.size for x in leaves)
    split = 4 * sum(x.size for x in leaves if x.sharding.shard_shape(x.shape) != x.shape)
    least = every + 2 * 4 * b * e + 2 * 2 * 4 * b * hidden
    least += {"zero1": every, "fsdp": split + every / fsdp}[strategy]
    assert 0.8 * least < sum(x.total for x in found) < 1.2 * least
    large = [x for x in jax.tree.leaves(p.abstract.opt_state) if x.size > 1 << 15 and AXES not in x.sharding.spec]
    shares = {x.size // math.prod(x.sharding.shard_shape(x.shape)) for x in large}
    assert max(shares) == {"zero1": 8, "fsdp": fsdp}[strategy]
    assert len(shares) == 1 or strategy == "fsdp"  # which leaves embeddings whole


def test_nested_loops_multiply():
    def twice(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.fori_loop(0, 5, lambda _, x: x * jnp.sin(x), x), x)

    program = hlo.parse(jax.jit(twice).lower(jnp.ones(64)).compile().as_text())
    inner = (each for outer in program.executions(len) for each in (outer, *program.inside(outer)))
    assert sum(each.count for each in inner if each.instruction.opcode == "multiply") == 15
