"""Train steps on two TPU slices, compiled ahead of time: what crosses the data centre's network between them.

The TPU compiler makes a sum over both slices in two parts: one inside each slice, then one between slices, of a share
of the array on each chip. The second is a pair of `send` and `recv` to a runtime on the hosts.
"""

import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from tests.helpers import tiny
from xclip_jax.commands import plan
from xclip_jax.core.errors import UserError
from xclip_jax.parallel.mesh import num_slices
from xclip_jax.plan import hlo
from xclip_jax.plan.roofline import CHIPS as KINDS
from xclip_jax.plan.roofline import devices_of, grid_of, roofline
from xclip_jax.train import cost

pytestmark = pytest.mark.long

CHIPS = 4  # of a slice
# The transfers of the runtime that joins slices: a chip's part, to the chip of the same place in the other slice.
SEND = re.compile(r"= \((\w+)\[([\d,]*)\]\S* [^=]*? send\(.*_xla_megascale_transfer_type=\"(\w+)\"")
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}


def between_slices(program):
    """{kind of collective: bytes that a chip hands to the runtime for other slices} in a compiled step."""
    sent = Counter()
    for line in program.splitlines():
        if " send(" in line:
            dtype, shape, kind = SEND.search(line).groups()
            sent[kind] += BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
    return dict(sent)


@functools.cache
def compile_step(strategy, fsdp, **changes):
    """(parameters, HLO) of a step on two slices of four chips."""
    pytest.importorskip("libtpu")
    devices, _ = plan.devices_of("v5e:2x2", slices=2)
    assert num_slices(devices) == 2
    wide = {"width": 256, "heads": 4, "depth": 1}
    towers = {f"model__{tower}__{name}": value for tower in ("img", "txt") for name, value in wide.items()}
    c = tiny.config("clip", **towers, model__dtype="bfloat16", data__batch=64, data__length_groups="full", **changes)
    c.mesh.strategy, c.mesh.fsdp, c.model.scan = strategy, fsdp, True
    experiment, compiled, trouble = cost.compile_config(c, devices)
    assert not trouble
    return experiment.abstract.params, compiled.as_text()


@pytest.mark.parametrize(("strategy", "fsdp"), [("dp", 1), pytest.param("zero1", 4, marks=pytest.mark.slow)])
def test_gradients_are_summed_inside_a_slice_and_a_share_of_each_between_slices(strategy, fsdp):
    params, program = compile_step(strategy, fsdp)
    # All collectives on the chips' own network stay inside a slice.
    groups = re.findall(r" (?:all-reduce|reduce-scatter|all-gather)(?:-start)?\(.*replica_groups=(\S+),", program)
    assert set(groups) == {"{{0,1,2,3}}"}
    sent = between_slices(program)
    leaves = jax.tree.leaves(params)
    least, most = (size * sum(x.size for x in leaves) / CHIPS for size in (2, 4))  # gradients are bf16 or fp32
    assert 0.9 * least < sent["ALL_REDUCE"] < 1.05 * most
    # Embeddings, and nothing of the size of parameters.
    assert sum(n for kind, n in sent.items() if kind != "ALL_REDUCE") < 0.05 * least


@pytest.mark.slow
def test_moments_that_are_split_over_all_slices_send_the_parameters_between_them():
    """The reason for an axis "fsdp" with zero1."""
    params, program = compile_step("zero1", 1)
    size = 4 * sum(x.size for x in jax.tree.leaves(params))
    assert between_slices(program)["ALL_GATHER"] > 0.4 * size / CHIPS


@pytest.mark.slow
def test_the_account_of_a_step_has_all_that_is_sent_between_slices():
    _, program = compile_step("zero1", 1)
    sent = hlo.summary(hlo.collectives(program, 2 * CHIPS))
    given = between_slices(program)
    # What is gathered arrives from the other slice beside a chip's own half.
    arrives = given | {"ALL_GATHER": 2 * given["ALL_GATHER"]}
    expected = {f"{kind.lower().replace('_', '-')} between slices": size for kind, size in arrives.items()}
    assert {kind: size for kind, size in sent.items() if kind.endswith("slices")} == expected


@pytest.mark.parametrize(
    ("topology", "links"),
    [
        ("v5e:4x8", 2),
        ("v5e:16x16", 4),
        ("v5e:8x16", 3),
        ("v6e:1x4", 1),
        ("v5p:4x4x8", 6),
        ("v4:2x4x4", 3),
        ("v4:2x2x1", 2),
    ],
)
def test_links_of_a_chip_in_a_corner(topology, links):
    name, grid = grid_of(topology)
    assert KINDS[name].ici(grid) == links * KINDS[name].link


def test_a_topology_is_a_chip_and_a_grid():
    with pytest.raises(UserError, match="write CHIP:GRID"):
        grid_of("v5e")


# --- time of a step: counts by hand, and what the compiler says of single operations

GATHER = "channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}, use_global_device_ids=true"


def about(source, cycles):
    return f'metadata={{op_name="jit(step)/jvp(TwoTowers.{source}"}}, backend_config={{"estimated_cycles":"{cycles}"}}'


UP, COPY = about("encode_image)/img/mlp/up/dot_general", 15000), about("encode_text)/txt/mlp", 3000)
PAIR = "(f32[512,1024]{1,0:T(8,128)}, f32[512,1024]{1,0:T(8,128)})"


# On v5e a cycle is 2/3 of a nanosecond: 1,500,000 are a millisecond. The gather of 8.75 million bytes at 2x4 chips,
# two links of 50 GB/s, takes 7/8 of 87.5 microseconds. A chain is one collective.
STEP = f"""\
%pass (x: f32[512,1024], s: f32[64,1024]) -> (f32[512,1024], f32[512,1024]) {{
  %s = f32[64,1024]{{1,0:T(8,128)}} parameter(1)
  %x = f32[512,1024]{{1,0:T(8,128)}} parameter(0)
  %g.2 = f32[512,1024]{{1,0:T(8,128)}} all-gather(%s), {GATHER}, frontend_attributes={{chain_id="0"}}
  %y = f32[512,1024]{{1,0:T(8,128)}} multiply(%x, %x)
  ROOT %t = {PAIR} tuple(%y, %g.2)
}}

%begin (s.1: f32[64,1024]) -> f32[512,1024] {{
  %s.1 = f32[64,1024]{{1,0:T(8,128)}} parameter(0)
  ROOT %g.1 = f32[512,1024]{{1,0:T(8,128)}} all-gather(%s.1), {GATHER}, frontend_attributes={{chain_id="0"}}
}}

%end (s.2: f32[64,1024]) -> f32[512,1024] {{
  %s.2 = f32[64,1024]{{1,0:T(8,128)}} parameter(0)
  ROOT %g.3 = f32[512,1024]{{1,0:T(8,128)}} all-gather(%s.2), {GATHER}, frontend_attributes={{chain_id="0"}}
}}

ENTRY %main (a: f32[512,1024], b: f32[64,1024]) -> f32[512,1024] {{
  %a = f32[512,1024]{{1,0:T(8,128)}} parameter(0)
  %b = f32[64,1024]{{1,0:T(8,128)}} parameter(1)
  %start = f32[512,1024]{{1,0:T(8,128)}} fusion(%b), kind=kCustom, calls=%begin
  %f = {PAIR} fusion(%a, %b), kind=kOutput, calls=%pass, {UP}
  %done = f32[512,1024]{{1,0:T(8,128)}} fusion(%b), kind=kCustom, calls=%end
  %h = f32[512,1024]{{1,0:T(8,128)S(1)}} copy(%a), {COPY}
  %alone = f32[512,1024]{{1,0:T(8,128)}} all-gather(%b), {GATHER}
  ROOT %u = f32[512,1024]{{1,0:T(8,128)}} add(%a, %h), metadata={{op_name="jit(step)/cond/branch_1_fun/add"}}
}}
"""


def test_an_account_by_hand():
    found = roofline(STEP, "v5e:2x4", 8)
    size = 512 * 1024 * 4
    whole = 7 / 8 * size / 100e9  # a gather
    assert found.exposed_ms == pytest.approx(1e3 * (whole - 10e-6 + whole))  # a fusion of 10 microseconds beside it
    assert found.hidden_ms == pytest.approx(1e3 * 10e-6)
    # The sum has no cycles, and moves its result twice.
    assert found.ms == pytest.approx(0.01 + 0.002 + 1e3 * 2 * size / 819e9)
    assert found.step_ms == pytest.approx(found.ms + found.exposed_ms)


@pytest.mark.parametrize("chip", list(KINDS))
def test_a_large_product_and_a_sum_come_near_their_limits(chip):
    """Clocks: cycles of products are those of the peak and a little more, and of sums those of the memory."""
    pytest.importorskip("libtpu")
    where = jax.sharding.SingleDeviceSharding(devices_of(KINDS[chip].smallest)[0][0])

    def account(fn, dtype, n):
        x = jax.ShapeDtypeStruct((n, n), dtype, sharding=where)
        text = jax.jit(fn).lower(*[x] * fn.__code__.co_argcount).compile().as_text()
        return roofline(text, KINDS[chip].smallest, 1)

    n = 8192
    product, total = account(lambda a, b: a @ b, jnp.bfloat16, n), account(lambda a: a + 1, jnp.float32, n)
    assert 1.0 < product.ms / (2e3 * n**3 / KINDS[chip].peak) < 1.5
    assert 1.0 < total.ms / (1e3 * 2 * 4 * n * n / KINDS[chip].bandwidth) < 1.5
