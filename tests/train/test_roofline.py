import jax
import jax.numpy as jnp
import pytest

from xclip_jax.core.errors import UserError
from xclip_jax.train.cost.roofline import CHIPS as KINDS
from xclip_jax.train.cost.roofline import devices_of, grid_of, roofline

pytestmark = pytest.mark.long


def test_a_topology_is_a_chip_and_a_grid():
    """A chip in a corner has the fewest links."""
    for topology, links in {"v5e:4x8": 2, "v5e:8x16": 3, "v6e:1x4": 1, "v5p:4x4x8": 6, "v4:2x4x4": 3}.items():
        name, grid = grid_of(topology)
        assert KINDS[name].ici(grid) == links * KINDS[name].link
    for topology in ("v5e", "v9:2x2"):
        with pytest.raises(UserError, match="topology"):
            grid_of(topology)


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


@pytest.mark.parametrize("chip", ["v5e", "v5p", "tpu7x"])
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
