"""What is computed in float32 and at the highest precision, as jaxprs say: on a CPU the numbers would be the same."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.helpers import util
from xclip_jax.losses import contrastive, noncontrastive
from xclip_jax.models import layers

pytestmark = pytest.mark.long

# Beginnings of the names of primitives that bfloat16 would spoil: exponentials, logarithms, roots, sums and maxima.
SENSITIVE = ("exp", "log", "sqrt", "rsqrt", "reduce_")


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr, and those inside them: of functions, loops, rematerialisation and parts of a mesh."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(value, "eqns"):
                yield from equations(value)


def check_products(function: Callable[..., Any], *args: Any) -> None:
    """All matrix products are of float32 values, which no accelerator may round."""
    products = [x for x in equations(jax.make_jaxpr(function)(*args)) if x.primitive.name == "dot_general"]
    assert products
    for product in products:
        assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2, product
        assert {operand.aval.dtype.name for operand in product.invars} == {"float32"}, product


def check_sensitive(function: Callable[..., Any], *args: Any) -> None:
    """Everything `SENSITIVE` is computed of float32 values, where it is not computed of integers."""
    found = [
        (equation.primitive.name, operand.aval.dtype.name)
        for equation in equations(jax.make_jaxpr(function)(*args))
        for operand in equation.invars
        if equation.primitive.name.startswith(SENSITIVE) and jnp.issubdtype(operand.aval.dtype, jnp.floating)
    ]
    assert {dtype for _, dtype in found} == {"float32"}, found


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize(("name", "scalars"), [("clip", (14.0,)), ("siglip", (10.0, -10.0))])
def test_similarities_have_the_highest_precision_and_so_have_gradients(
    chunk: int, name: str, scalars: tuple[float, ...]
) -> None:
    loss = partial(getattr(contrastive, name), chunk=chunk)
    args = bf16(16, 8), bf16(16, 8), *map(jnp.float32, scalars)
    check_products(jax.grad(loss, (0, 1), has_aux=True), *args)
    check_sensitive(loss, *args)


@pytest.mark.parametrize("shape", [(16, 8), (8, 16)])
def test_the_effective_rank_has_the_highest_precision(shape: tuple[int, int]) -> None:
    check_products(noncontrastive.effective_rank, bf16(*shape))
    check_sensitive(noncontrastive.effective_rank, bf16(*shape))


@pytest.mark.parametrize("causal", [False, True])
def test_the_softmax_of_attention_is_in_float32(causal: bool) -> None:
    function, args = partial(layers.attend, causal=causal), [bf16(2, 2, 5, 4)] * 3
    assert jax.eval_shape(function, *args).dtype == jnp.bfloat16
    check_sensitive(function, *args)


def test_norms_are_in_float32() -> None:
    norm, x = layers.LayerNorm(dtype=jnp.bfloat16), bf16(2, 5, 8)
    variables = jax.eval_shape(norm.init, jax.random.key(0), x)
    assert jax.eval_shape(norm.apply, variables, x).dtype == jnp.bfloat16
    check_sensitive(norm.apply, variables, x)


def test_the_loss_of_clusters_is_in_float32() -> None:
    check_sensitive(noncontrastive.nclip, bf16(16, 8), bf16(16, 8))


def test_parameters_and_all_that_is_sensitive_in_a_model_are_in_float32() -> None:
    """With attention that pools, and a norm of the clusters' logits."""
    model = util.two_towers(
        img={"image_size": 16, "patch": 8, "width": 8, "depth": 1, "heads": 2, "pool": "map"},
        txt={"context_length": 6, "width": 8, "depth": 1, "heads": 2},
        embed=4,
        cluster_head={"clusters": 6, "hidden": 8},
        dtype=jnp.bfloat16,
    )
    args = bf16(4, 16, 16, 3), jax.ShapeDtypeStruct((4, 6), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), *args)
    assert {x.dtype.name for x in jax.tree.leaves(variables)} == {"float32"}
    check_sensitive(partial(model.apply, train=True, mutable=["batch_stats"]), variables, *args)
