"""An implicit promotion of types, such as of bfloat16 to float32, is an error in these tests."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_types():
    with jax.numpy_dtype_promotion("strict"):
        yield
