"""The model that the tests of commands embed with."""

import pytest

import xclip_jax


@pytest.fixture(scope="session")
def model(run):
    return xclip_jax.load(run, batch=8)
