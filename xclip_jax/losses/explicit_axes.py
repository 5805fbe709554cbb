"""Functions of the global batch on meshes with explicit axes, the default of `jax.make_mesh`."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def on_any_mesh(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let a function of the global batch, with replicated results, take arrays on explicit mesh axes.

    On such axes JAX asks for the sharding of each ambiguous product. Inside the function the axes are automatic: XLA
    chooses the shardings and inserts the collectives. On other meshes the function is called as it is.
    """

    @functools.wraps(function)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        leaves, tree = jax.tree.flatten((args, kwargs))
        arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}
        meshes = (jax.typeof(array).sharding.mesh for array in arrays.values())
        mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
        if mesh is None:
            return function(*args, **kwargs)

        def on_automatic_axes(arrays: dict[int, jax.Array]) -> Any:
            args, kwargs = jax.tree.unflatten(tree, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
            return function(*args, **kwargs)

        replicated = NamedSharding(mesh, PartitionSpec())
        # Without `jit`, JAX would place constants on the first device.
        automatic = jax.sharding.auto_axes(on_automatic_axes, axes=mesh.explicit_axes, out_sharding=replicated)
        return jax.jit(automatic)(arrays)

    return wrapped
