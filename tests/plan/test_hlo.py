"""The parser against programs whose traffic is known, and every strategy against its analytic minimum."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.helpers import tiny
from xclip_jax.losses import contrastive, noncontrastive
from xclip_jax.parallel.mesh import AXES, make_mesh
from xclip_jax.parallel.sharding import FactoredLogits, MeshLayout, layout_scope
from xclip_jax.plan import hlo
from xclip_jax.plan.hlo import Collective, collectives, summary
from xclip_jax.plan.roofline import devices_of
from xclip_jax.train import build

MESH = make_mesh({"data": 4, "fsdp": 2, "model": 1})
P = PartitionSpec
WHOLE = P()


def sent(fn, *specs, out=WHOLE, args=((64, 16),)):
    found = (
        jax.jit(jax.shard_map(fn, mesh=MESH, in_specs=specs, out_specs=out, check_vma=False))
        .lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in args))
        .compile()
    )
    return [(x.kind, x.bytes, x.group, x.count) for x in collectives(found.as_text(), 8)]


def test_all_reduce_and_all_gather_and_reduce_scatter():
    assert sent(lambda x: jax.lax.psum(x, "data"), P("data")) == [("all-reduce", 16 * 16 * 4, 4, 1)]
    assert sent(lambda x: jax.lax.all_gather(x, "fsdp"), P("fsdp")) == [("all-gather", 64 * 16 * 4, 2, 1)]
    scattered = sent(lambda x: jax.lax.psum_scatter(x, "data", tiled=True), P(), out=P("data"))
    assert scattered == [("reduce-scatter", 64 * 16 * 4, 4, 1)]


def test_a_loop_counts_each_round():
    def rounds(x):
        following = [(i, (i + 1) % 4) for i in range(4)]
        return jax.lax.fori_loop(0, 7, lambda _, x: jnp.sin(jax.lax.ppermute(x, "data", following)), x)

    found = sent(rounds, P("data"), out=P("data"))
    assert sum(bytes_ * count for _, bytes_, _, count in found) == 7 * 16 * 16 * 4
    assert {kind for kind, *_ in found} == {"collective-permute"}


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


def test_a_sliced_product_on_a_tpu_sends_a_slice_in_each_of_its_turns():
    """A loop of u32 that counts by two: each turn sends four slices, and one more is sent at the end."""
    pytest.importorskip("libtpu")
    chips, _ = devices_of("v5e:4x4")
    split = NamedSharding(jax.sharding.Mesh(np.array(chips), ("data",)), P("data"))

    def gradient(x, g):
        return jax.lax.with_sharding_constraint(jax.lax.dot_general(x, g, (((0,), (0,)), ((), ()))), split)

    rows = [jax.ShapeDtypeStruct((16 * 6400, d), jnp.bfloat16, sharding=split) for d in (768, 3072)]
    text = jax.jit(gradient).lower(*rows).compile().as_text()
    assert "windowed_dot_general" in text
    assert summary(collectives(text, 16)) == {"collective-permute": 17 * 48 * 3072 * 2}


def test_sums_between_slices_are_those_of_a_shard():
    """In a slice gradients are scattered, a shard is summed over the slices, and then gathered."""
    pytest.importorskip("libtpu")
    chips, _ = devices_of("v5e:2x2", 3)
    mesh = make_mesh({"data": -1, "fsdp": 1, "model": 1}, chips)
    x = jax.ShapeDtypeStruct((12 * 512, 1024), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    program = jax.jit(lambda x, g: x.T @ g, out_shardings=NamedSharding(mesh, P())).lower(x, x).compile()
    found, size = collectives(program.as_text(), 12), 1024 * 1024 * 4
    assert summary(found) == {"reduce-scatter": size, "all-reduce between slices": size / 4, "all-gather": size}
    assert {x.kind: x.group for x in found} == {"reduce-scatter": 4, "all-reduce between slices": 3, "all-gather": 4}
    assert sum(x.sent for x in found) == 2 * size * 3 / 4 + 2 * size / 4 * 2 / 3


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


def test_a_split_mlp_sums_activations_over_the_model_and_gradients_over_the_data():
    b, d, f = 32, 16, 64
    mesh = make_mesh({"data": 4, "fsdp": 1, "model": 2})
    specs = (P("data"), P(None, "model"), P("model", None))
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
        for shape, where in zip(((b, d), (d, f), (f, d)), shardings, strict=True)
    ]

    def loss(x, up, down):
        return jnp.sum(jnp.square(jnp.sin(x @ up) @ down))

    step = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=shardings)
    found = collectives(step.lower(*args).compile().as_text(), 8)
    by_group = {n: sum(x.total for x in found if x.group == n) for n in (2, 4)}
    assert by_group == {2: 2 * 4 * (b // 4) * d, 4: 2 * 4 * d * f // 2}
    assert len(found) == sum(x.count for x in found) and {x.kind for x in found} == {"all-reduce"}


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups=[4,8]<=[32]", 8),
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=mesh['x'=8,'y'=4] {'y'}, dimensions={0}", 4),
        ("replica_groups=mesh['x'=1,'y'=8,'z'=4], device_ids=([4,8]T(1,0)) {'y'}, dimensions={1}", 8),
        ("replica_groups=mesh['x'=8,'y'=4] {'x':(2)4,'y'}", 16),
        ("replica_groups={}", 32),
    ],
)
def test_groups_are_written_in_many_ways(text, group):
    program = (
        f"ENTRY %main (a: f32[8]) -> f32[64] {{\n  ROOT %g = f32[64]{{0}} all-gather(%a), channel_id=1, {text}\n}}"
    )
    assert [x.group for x in collectives(program, 32)] == [group]


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


CASES = [
    ("zero1", 8, 1),
    ("fsdp", 2, 4),
    *(pytest.param(*x, marks=pytest.mark.slow) for x in (("dp", 8, 1), ("fsdp", 1, 8))),
]


@pytest.mark.parametrize("objective", [pytest.param("clip", marks=pytest.mark.slow), "xclip"])
@pytest.mark.parametrize(("strategy", "data", "fsdp"), CASES)
def test_no_strategy_moves_much_more_than_it_must(objective, strategy, data, fsdp):
    """Payload at most 1.2 times the minimum: gradients once, both embeddings once, parameters as the strategy must.

    Kernels whose clusters are split are not sent: hidden rows are gathered, and their gradient is scattered.

    zero1 gathers the updated parameters once. fsdp gathers each split kernel once, since without rematerialisation
    what was gathered for the forward pass is kept, and sums gradients over "fsdp", then a shard of them over "data".
    """
    b, e, hidden = 32, 64, 256
    p = build.build(
        tiny.config(
            objective,
            data__batch=b,
            mesh__strategy=strategy,
            mesh__data=data,
            mesh__fsdp=fsdp,
            mesh__model=1,
            model__img__width=256,
            model__img__depth=2,
            model__txt__width=128,
            model__embed=e,
            model__cluster_head={"clusters": 512, "hidden": hidden, "layers": 1},
        )
    )
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tiny.batch(b=b))
    found = collectives(p.compiled.lower(p.abstract, batch).compile().as_text(), 8)
    everything = jax.tree.leaves(p.abstract.params)
    leaves = [x for x in everything if AXES not in x.sharding.spec]
    every = 4 * sum(x.size for x in leaves)
    split = 4 * sum(x.size for x in leaves if x.sharding.shard_shape(x.shape) != x.shape)
    least = every + 2 * 4 * b * e
    if objective == "xclip":
        assert len(everything) - len(leaves) == 4  # kernel and bias of both heads
        least += 2 * 2 * 4 * b * hidden
    least += {"dp": 0, "zero1": every, "fsdp": split + (every / fsdp if data > 1 else 0)}[strategy]
    total = sum(x.total for x in found)
    print(f"{objective} {strategy} {data} x {fsdp}: {total / least:.3f} of the minimum, {summary(found)}")
    assert 0.8 * least < total < 1.2 * least
    large = [x for x in jax.tree.leaves(p.abstract.opt_state) if x.size > 1 << 15 and AXES not in x.sharding.spec]
    shares = {x.size // math.prod(x.sharding.shard_shape(x.shape)) for x in large}
    assert max(shares) == {"dp": 1, "zero1": 8, "fsdp": fsdp}[strategy]
    assert len(shares) == 1 or strategy == "fsdp"  # which leaves embeddings whole


# --- layouts and loops


LOOP = """\
%condition (p: (f32[8], u32[])) -> pred[] {
  %p = (f32[8]{0}, u32[]{:T(128)}) parameter(0)
  %counter = u32[]{:T(128)} get-tuple-element(%p), index=1
  %limit = u32[]{:T(128)} constant(8), metadata={op_name="limit"}
  ROOT %less = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%body (p.1: (f32[8], u32[])) -> (f32[8], u32[]) {
  %p.1 = (f32[8]{0}, /*index=1*/u32[]{:T(128)}) parameter(0)
  %by = u32[]{:T(128)} constant(2)
  %x = f32[8]{0} get-tuple-element(%p.1), index=0
  %y = f32[8]{0} multiply(%x, %x)
  %counter.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=1
  %next = u32[]{:T(128)} add(%counter.1, %by)
  ROOT %t = (f32[8]{0}, u32[]{:T(128)}) tuple(%y, /*index=1*/%next)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %first = u32[]{:T(128)} constant(START)
  %copy.1 = u32[]{:T(128)} copy(%first)
  %start = (f32[8]{0}, u32[]{:T(128)}) tuple(%a, %copy.1)
  %w = (f32[8]{0}, u32[]{:T(128)}) while(%start), condition=%condition, body=%body
  ROOT %r = f32[8]{0} get-tuple-element(%w), index=0
}
"""


@pytest.mark.parametrize(("start", "turns"), [(0, 4), (1, 4), (4, 2), (7, 1)])
def test_a_loop_may_count_by_two_and_from_any_number(start, turns):
    program = hlo.parse(LOOP.replace("START", str(start)))
    counts = {each.instruction.name: each.count for each in program.executions(len)}
    assert (counts["y"], counts["a"]) == (turns, 1)


def test_nested_loops_multiply():
    def twice(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.fori_loop(0, 5, lambda _, x: x * jnp.sin(x), x), x)

    program = hlo.parse(jax.jit(twice).lower(jnp.ones(64)).compile().as_text())
    inner = (each for outer in program.executions(len) for each in (outer, *program.inside(outer)))
    assert sum(each.count for each in inner if each.instruction.opcode == "multiply") == 15
