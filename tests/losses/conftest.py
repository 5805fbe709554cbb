"""Types are promoted only where that is written: a bfloat16 that silently becomes float32 is an error here."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_types():
    with jax.numpy_dtype_promotion("strict"):
        yield
