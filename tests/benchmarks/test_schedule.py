"""Schedules of Pallas kernels by the TPU compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from benchmarks import schedule
from xclip_jax.models import kernels
from xclip_jax.parallel import hlo, topology
from xclip_jax.parallel.topology import CHIPS, devices_of

V5E = CHIPS["v5e"]


@pytest.fixture(scope="module")
def kernel():
    pytest.importorskip("libtpu")
    where = jax.sharding.SingleDeviceSharding(devices_of(V5E.smallest)[0][0])
    arrays = [((4, 16, 384), jnp.bfloat16), ((1, 384), jnp.float32)]
    inputs = [jax.ShapeDtypeStruct(*x, sharding=where) for x in arrays]
    program = jax.jit(lambda qkv, bias: kernels.attention(qkv, bias, 64, 13, False)).lower(*inputs).compile()
    return program.as_text()


def test_a_kernel_has_a_schedule(kernel):
    program = hlo.parse(kernel)
    (call,) = filter(
        None, (schedule.kernel_of(x, program.computations[program.entry]) for x, *_ in program.executions(len))
    )
    made = schedule.schedules("v5e", [call])[call]
    assert call == dataclasses.replace(call, config="of another line") != dataclasses.replace(call, code="another")
    assert made.blocks == 1 and 100 < made.bundles < 3000 and 0 < made.matrix < 1


def test_a_plan_takes_a_share_of_the_peak_for_a_kernel(kernel):
    work = 2 * 2 * 4 * 2 * 16 * 16 * 128
    assert topology.roofline(kernel, V5E.smallest, 1).ms >= 1e3 * work / (V5E.kernels * V5E.peak)
