"""Tensors by the names of other projects: what does not fit, and axes of length 1."""

import numpy as np
import pytest
import torch

from tests.interop.test_tensor_files import saved
from xclip_jax import interop
from xclip_jax.core.errors import UserError


def test_tensors_that_do_not_fit_are_listed_by_name(tmp_path):
    def change(state):
        del state["transformer.resblocks.1.ln_2.bias"]
        state["visual.extra"] = torch.zeros(1)
        state["ln_final.weight"] = torch.zeros(7)

    with pytest.raises(UserError) as error:
        interop.read(saved(tmp_path, change))
    for part in ("missing: transformer.resblocks.1.ln_2.bias", "unknown: visual.extra",
                 "ln_final.weight has shape (7,), expected (64,)"):  # fmt: skip
        assert part in str(error.value)


def test_axes_of_length_1_make_no_difference(tmp_path):
    def change(state):
        state["logit_scale"] = state["logit_scale"].reshape(1, 1)
        state["visual.positional_embedding"] = state["visual.positional_embedding"][None]

    _, expected = interop.read(saved(tmp_path / "plain", lambda _: None))
    _, found = interop.read(saved(tmp_path / "more", change))
    for key in ("log_scale", "img"):
        np.testing.assert_equal(found["params"][key], expected["params"][key])
