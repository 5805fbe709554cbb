"""Parts of a step and their memory traffic against counts by hand, and schedules of Pallas kernels."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import roofline
from tests.train.test_roofline import STEP
from xclip_jax.models import kernels
from xclip_jax.train.cost import hlo
from xclip_jax.train.cost import roofline as topology
from xclip_jax.train.cost.roofline import CHIPS, devices_of

V5E = CHIPS["v5e"]


def test_parts_by_hand():
    size = 512 * 1024 * 4
    rows = {row["part"]: row for row in roofline.parts(STEP, "v5e:2x4", 8)}
    assert rows["MLP"]["image"] == rows["MLP"]["ms"] == pytest.approx(0.01)
    assert rows["MLP"]["hbm_ms"] == pytest.approx(1e3 * 2 * size / 819e9)  # reads %x, writes %y, and sends the rest
    assert rows["copies"]["text"] == pytest.approx(0.002)
    assert rows["copies"]["hbm_ms"] == pytest.approx(1e3 * size / 819e9)  # its result is in vector memory
    assert rows["optimizer"]["neither"] == rows["optimizer"]["hbm_ms"] == pytest.approx(1e3 * 2 * size / 819e9)
    assert set(rows) == {"MLP", "copies", "optimizer"}


SLICED = """\
%slice (stack: f32[12,512,1024], i: s32[], value: f32[1,512,1024]) -> f32[12,512,1024] {
  %stack = f32[12,512,1024]{2,1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %value = f32[1,512,1024]{2,1,0:T(8,128)} parameter(2)
  %one = f32[1,512,1024]{2,1,0:T(8,128)} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,512,1024}
  %sum = f32[1,512,1024]{2,1,0:T(8,128)} add(%one, %value)
  ROOT %new = f32[12,512,1024]{2,1,0:T(8,128)} dynamic-update-slice(%stack, %sum, %i, %zero, %zero)
}

ENTRY %main (a: f32[12,512,1024], b: f32[1,512,1024], i: s32[]) -> f32[12,512,1024] {
  %a = f32[12,512,1024]{2,1,0:T(8,128)} parameter(0)
  %b = f32[1,512,1024]{2,1,0:T(8,128)} parameter(1)
  %i.1 = s32[] parameter(2)
  %prefetch = ((f32[12,512,1024]{2,1,0:T(8,128)}), f32[1,512,1024]{2,1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a)
  ROOT %f = f32[12,512,1024]{2,1,0:T(8,128)} fusion(%a, %i.1, %b), kind=kLoop, calls=%slice
}
"""


def test_slices_move_no_more_than_their_own_bytes():
    program, size = hlo.parse(SLICED), 512 * 1024 * 4
    moved = {each.instruction.name: roofline.traffic(program, each) for each in program.executions(len)}
    assert moved["f"] == pytest.approx(3 * size, abs=8)  # a slice and a value are read, a slice is written
    assert moved["prefetch"] == size


@pytest.mark.parametrize(
    ("text", "plain", "padded", "in_hbm"),
    [
        ("bf16[197,64]{1,0:T(8,128)(2,1)}", 197 * 64 * 2, 200 * 128 * 2, True),
        ("bf16[197,64]{0,1:T(8,128)(2,1)S(1)}", 197 * 64 * 2, 256 * 64 * 2, False),
        ("pred[16]{0}", 16, 16, True),
        ("s4[7]{0}", 3.5, 3.5, True),
    ],
)
def test_bytes_of_a_layout(text, plain, padded, in_hbm):
    (array,) = hlo.arrays(text)
    assert (array.bytes, roofline.padded_bytes(array), roofline.in_hbm(array)) == (plain, padded, in_hbm)
    assert str(array) == text.partition("{")[0]


@pytest.fixture(scope="module")
def kernel():
    pytest.importorskip("libtpu")
    where = jax.sharding.SingleDeviceSharding(devices_of(V5E.smallest)[0][0])
    arrays = [((4, 16, 384), jnp.bfloat16), ((1, 384), jnp.float32)]
    inputs = [jax.ShapeDtypeStruct(*x, sharding=where) for x in arrays]
    program = jax.jit(lambda qkv, bias: kernels.attention(qkv, bias, 64, 13, False)).lower(*inputs).compile()
    return program.as_text()


def test_a_plan_takes_a_share_of_the_peak_for_a_kernel(kernel):
    work = 2 * 2 * 4 * 2 * 16 * 16 * 128
    assert topology.roofline(kernel, V5E.smallest, 1).ms >= 1e3 * work / (V5E.attention * V5E.peak)
