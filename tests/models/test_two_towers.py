import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.helpers.util import two_towers

SIZES = {
    "img": {"image_size": 8, "patch": 4, "width": 8, "depth": 1, "heads": 2},
    "txt": {"vocab": 9, "eot_id": 8, "context_length": 4, "width": 12, "depth": 1, "heads": 2},
    "embed": 6,
}
IMAGE = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
TEXT = np.array([[1, 2, 8, 0], [3, 4, 5, 8]])
HEAD = {"cluster_head": {"clusters": 5, "hidden": 7}}


@pytest.mark.parametrize(
    ("fields", "clip", "bias", "clusters"),
    [({}, 1, 0, 0), ({"bias": True}, 1, 1, 0), ({"embed": 0} | HEAD, 0, 0, 1), (HEAD, 1, 0, 1)],
    ids=["clip", "siglip", "nclip", "xclip"],
)
def test_two_towers_have_what_is_asked_for(fields, clip, bias, clusters):
    model = two_towers(**SIZES | fields)
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGE, TEXT)
    heads = ["proj_img", "proj_txt", "log_scale"] * clip + ["bias"] * bias + ["clusters_img", "clusters_txt"] * clusters
    assert variables["params"].keys() == {"img", "txt", *heads}
    assert ("batch_stats" in variables) == clusters
    out = jax.eval_shape(model.apply, nn.unbox(variables), IMAGE, TEXT)
    outputs = ["z_img", "z_txt", "scale"] * clip + ["bias"] * bias + ["s_img", "s_txt"] * clusters
    assert out.keys() == {"h_img", "h_txt", *outputs}
    sizes = {"h_img": (2, 8), "h_txt": (2, 12), "scale": (), "bias": ()}
    for name, x in out.items():
        assert x.shape == sizes.get(name, (2, 6) if name.startswith("z") else (2, 5)), name
        assert x.dtype == jnp.float32, name
