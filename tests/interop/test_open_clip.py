"""Both towers with open_clip's weights, and the sizes that have open_clip's names."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import open_clip
import pytest
import torch
from flax.traverse_util import unflatten_dict

from tests.helpers.util import jit, two_towers
from xclip_jax.core.errors import UserError
from xclip_jax.interop import names
from xclip_jax.interop import open_clip as ours_of_open_clip
from xclip_jax.losses import contrastive
from xclip_jax.models.two_towers import preset


def numpy(tensor):
    return tensor.detach().numpy()


# --- parity with open_clip


def torch_features(model, image, text):
    """h_img, tokens of patches and h_txt of open_clip's towers, without their projections."""
    visual = model.visual
    projections = visual.proj, model.text_projection
    visual.proj = model.text_projection = None
    visual.output_tokens = True
    h_img, patches = visual(image)
    h_txt = model.encode_text(text)
    visual.output_tokens = False
    visual.proj, model.text_projection = projections
    return h_img, patches, h_txt


def carry(weights, model):
    """open_clip's arrays as our parameters; the map is linear and loses nothing, so it carries gradients as well."""
    return unflatten_dict(names.read(weights, model, 100, ours_of_open_clip._clip()), sep="/")


@pytest.fixture(scope="module", params=["xclip", "openai"])
def parity(request):
    """What open_clip computes, and what our towers compute with its weights."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2}
    text = {"context_length": 12, "vocab_size": 100, "width": 48, "heads": 3, "layers": 2}
    model = open_clip.model.CLIP(40, vision, text, quick_gelu=request.param == "openai")
    with torch.no_grad():
        for p in model.parameters():  # else biases are zero and norms are one
            p += 0.1 * torch.randn_like(p)

    rng = np.random.default_rng(0)
    image = rng.normal(size=(5, 32, 32, 3)).astype(np.float32)
    tokens = rng.integers(1, 99, size=(5, 12))
    for row, end in enumerate([11, 3, 6, 1, 8]):
        tokens[row, end], tokens[row, end + 1 :] = 99, 0

    torch_image, torch_tokens = torch.tensor(image).permute(0, 3, 1, 2), torch.tensor(tokens)
    h_img, patches, h_txt = torch_features(model, torch_image, torch_tokens)
    z_img, z_txt = model.encode_image(torch_image, normalize=True), model.encode_text(torch_tokens, normalize=True)
    logits = model.get_logits(torch_image, torch_tokens)[0]
    loss = open_clip.ClipLoss()(z_img, z_txt, model.logit_scale.exp())
    loss.backward()
    theirs = {"h_img": h_img, "h_txt": h_txt, "z_img": z_img, "z_txt": z_txt, "logits": logits, "loss": loss}
    theirs["patches"] = patches.reshape(5, 4, 4, 64)
    shared = {"depth": 2, "mlp_ratio": 4.0, "style": request.param}
    sizes = {
        "img": {"image_size": 32, "patch": 8, "width": 64, "heads": 2, "pool": "cls"} | shared,
        "txt": {"context_length": 12, "width": 48, "heads": 3} | shared, "embed": 40,
    }  # fmt: skip
    named = dict(model.named_parameters())
    towers = two_towers(**sizes | {"txt": sizes["txt"] | {"vocab": 100, "eot_id": 99}})

    @jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def ours(params):
        out = towers.apply({"params": params}, image, tokens)
        loss, _ = contrastive.clip(out["z_img"], out["z_txt"], out["scale"])
        return loss, out | {"logits": out["scale"] * out["z_img"] @ out["z_txt"].T}

    params = carry({name: numpy(p) for name, p in named.items()}, sizes)
    (loss, out), gradients = ours(params)
    out |= {"patches": jit(lambda params: towers.img.patch_features(params, image, jnp.float32))(params["img"])}
    there = {name: numpy(x) for name, x in theirs.items()}
    there["gradients"] = carry({name: numpy(p.grad) for name, p in named.items()}, sizes)
    return there, out | {"loss": loss, "gradients": gradients}


def test_outputs_equal_open_clips(parity):
    theirs, ours = parity
    for name in ("h_img", "h_txt", "z_img", "z_txt", "logits", "loss", "patches"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5, err_msg=name)


def test_gradients_equal_open_clips(parity):
    theirs, ours = parity
    chex.assert_trees_all_equal_structs(ours["gradients"], theirs["gradients"])

    def check(path, ours, theirs):
        # Relative to the tensor's largest entry: the gradient of a key's bias is zero but for rounding.
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error < 1e-4, f"{jax.tree_util.keystr(path)}: {error}"

    jax.tree_util.tree_map_with_path(check, ours["gradients"], theirs["gradients"])


# --- presets


def count(**fields):
    # Scanned blocks hold the same parameters and are traced once.
    sizes = fields | {tower: fields[tower] | {"scan": True} for tower in ("img", "txt")}
    image, text = jnp.zeros((1, 224, 224, 3)), jnp.zeros((1, 77), jnp.int32)
    shapes = jax.eval_shape(two_towers(**sizes).init, jax.random.key(0), image, text)
    return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("B/32", 151_277_313), ("B/16", 149_620_737), ("L/14", 427_616_513), ("L/16", None), ("S/16", None)],
)
def test_presets_have_the_parameters_of_open_clips_models(name, parameters):
    with torch.device("meta"):
        model = open_clip.model.CLIP(**open_clip.get_model_config("ViT-" + name.replace("/", "-")))
    theirs = sum(p.numel() for p in model.parameters())
    assert count(**preset(name)) == theirs
    assert parameters in (None, theirs)


# --- styles


def test_a_tower_of_no_style_is_refused():
    assert names.find_style("quick_gelu", 1e-5) == "openai"
    assert names.find_style("gelu_tanh", 1e-6, siglip=True) == "siglip"
    with pytest.raises(UserError, match=r"activation 'gelu' and eps 0\.001 in LayerNorm; no style"):
        names.find_style("gelu", 1e-3)
