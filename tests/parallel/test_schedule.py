"""Schedules of Pallas kernels by the TPU compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from xclip_jax.kernels import attention
from xclip_jax.parallel import hlo, roofline, schedule
from xclip_jax.parallel.topology import CHIPS, devices_of

V5E = CHIPS["v5e"]


@pytest.fixture(scope="module")
def kernel():
    pytest.importorskip("libtpu")
    where = jax.sharding.SingleDeviceSharding(devices_of(V5E.smallest)[0][0])
    arrays = [((4, 16, 384), jnp.bfloat16), ((1, 384), jnp.float32)]
    inputs = [jax.ShapeDtypeStruct(*x, sharding=where) for x in arrays]
    program = jax.jit(lambda qkv, bias: attention.attention(qkv, bias, 64, 13, False)).lower(*inputs).compile()
    return program.as_text()


def test_a_kernel_takes_its_schedule(kernel):
    (row,) = roofline.roofline(kernel, V5E.smallest, 1).kernels
    program = hlo.parse(kernel)
    (call,) = filter(
        None, (schedule.kernel_of(x, program.computations[program.entry]) for x, *_ in program.executions(len))
    )
    made = schedule.schedules("v5e", [call])[call]
    assert call == dataclasses.replace(call, config="of another line") != dataclasses.replace(call, code="another")
    assert made.blocks == 1 and 100 < made.bundles < 3000 and 0 < made.matrix < 1
    assert row == {"name": "attention", "count": 1, "ms": pytest.approx(1e3 * made.bundles / 1.5e9), "by": "schedule"}


def test_a_kernel_without_a_schedule_takes_its_flops_and_bytes(kernel, monkeypatch):
    monkeypatch.setattr(schedule, "_schedules", {})
    monkeypatch.setattr(schedule, "_make", lambda chip, kernels: [None] * len(kernels))
    (row,) = roofline.roofline(kernel, V5E.smallest, 1).kernels
    size = sum(4 * 16 * lanes * 2 for lanes in (384, 128)) + 8 * 384 * 4
    work = 2 * 2 * 4 * 2 * 16 * 16 * 128
    by_flops, by_bytes = 1e3 * work / V5E.peak, 1e3 * size / V5E.bandwidth  # what is in vector memory does not count
    assert row["by"] == "FLOPs and bytes" and by_flops <= row["ms"] <= max(by_flops, by_bytes)
