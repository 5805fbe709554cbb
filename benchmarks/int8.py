"""Time of one block's norms, products and activation with Qwix's int8 products, by the TPU compiler, without a TPU.

    pip install '.[tpu]' qwix==0.1.8 && python -m benchmarks.int8 v5e

A block of B/16 with 25,600 rows, forward and backward, without attention: bf16, int8 with scales found in each step, and
int8 with fixed scales, with gradients in int8 and in bf16. Milliseconds of `xclip_jax.train.cost.roofline`.
"""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import qwix

from xclip_jax.models.layers import gelu
from xclip_jax.train.cost import hlo
from xclip_jax.train.cost.roofline import CHIPS, cycles, devices_of, seconds

ROWS, WIDTH = 25_600, 768
FIXED = {"weight_calibration_method": "fixed,-1,1", "act_calibration_method": "fixed,-8,8"}
CASES = {
    "bf16": None,
    "int8": {"bwd_qtype": jnp.int8},
    "int8, fixed scales": {"bwd_qtype": jnp.int8} | FIXED,
    "int8, fixed scales, gradients in bf16": FIXED,
}


class Block(nn.Module):
    """The parts of a block around attention."""

    @nn.compact
    def __call__(self, x: jax.Array, attended: jax.Array) -> tuple[jax.Array, jax.Array]:
        def norm(x: jax.Array, name: str) -> jax.Array:
            return nn.LayerNorm(1e-5, dtype=jnp.float32, name=name)(x).astype(jnp.bfloat16)

        qkv = nn.Dense(3 * WIDTH, dtype=jnp.bfloat16, name="qkv")(norm(x, "before"))
        x = x + nn.Dense(WIDTH, dtype=jnp.bfloat16, name="out")(attended)
        hidden = gelu(nn.Dense(4 * WIDTH, dtype=jnp.bfloat16, name="up")(norm(x, "after")))
        return qkv, x + nn.Dense(WIDTH, dtype=jnp.bfloat16, name="down")(hidden)


def main(chip: str) -> None:
    """Print the time of each case."""
    device = devices_of(CHIPS[chip].smallest)[0][0]
    placed = jax.sharding.SingleDeviceSharding(device)

    def array(shape: tuple[int, ...], dtype: jnp.dtype = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    x, qkv = array((ROWS, WIDTH)), array((ROWS, 3 * WIDTH))
    for name, settings in CASES.items():
        model = Block()
        if settings is not None:
            rule = qwix.QtRule(module_path=".*", weight_qtype=jnp.int8, act_qtype=jnp.int8, **settings)
            model = qwix.quantize_model(model, qwix.QtProvider([rule]))
        shapes = jax.eval_shape(model.init, jax.random.key(0), *(jax.ShapeDtypeStruct(x.shape, x.dtype) for _ in "xa"))
        variables = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), shapes)

        def step(variables, x, attended, gradients, model=model):  # noqa: ANN001, ANN202
            out, backward = jax.vjp(model.apply, variables, x, attended)
            return out, backward(gradients)

        program = hlo.parse(jax.jit(step).lower(variables, x, x, (qkv, x)).compile().as_text())
        executions = program.executions(cycles)
        print(f"{chip}, {name}: {1e3 * sum(seconds(program, each, False, CHIPS[chip]) for each in executions):.1f} ms")


if __name__ == "__main__":
    main(sys.argv[1])
