"""Train steps on two TPU slices, compiled ahead of time: what crosses the data centre's network between them.

The TPU compiler makes a sum over both slices in two parts: one inside each slice, then one between slices, of a share
of the array on each chip. The second is a pair of `send` and `recv` to a runtime on the hosts.
"""

import functools
import math
import re
from collections import Counter

import jax
import pytest

from tests.helpers import tiny
from xclip_jax.commands import plan
from xclip_jax.core.errors import UserError
from xclip_jax.parallel import hlo
from xclip_jax.parallel.mesh import num_slices
from xclip_jax.parallel.topology import CHIPS as KINDS
from xclip_jax.parallel.topology import grid_of
from xclip_jax.train import memory

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
    wide = {"width": 256, "heads": 4, "scan": True, "depth": 1}
    towers = {f"model__{tower}__{name}": value for tower in ("img", "txt") for name, value in wide.items()}
    c = tiny.config("clip", **towers, model__dtype="bfloat16", data__batch=64, data__length_groups="full", **changes)
    c.mesh.strategy, c.mesh.fsdp = strategy, fsdp
    experiment, compiled, trouble = memory.compile_config(c, devices)
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
