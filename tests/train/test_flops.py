import flax.linen as nn
import jax
import pytest

from tests.helpers import tiny
from xclip_jax.config.load import load_config
from xclip_jax.config.schema import resolve
from xclip_jax.data.length_groups import WHOLE, LengthGroups
from xclip_jax.train import build, flops


def test_known_models():
    """Twice the multiply-adds that are quoted for ViT-B/16 at 224 pixels, 17.6 G, and for CLIP's B-size text tower."""
    found = flops.forward(resolve(load_config("pretrain:objective=clip")))
    assert found["img"] == pytest.approx(2 * 17.58e9, rel=0.01)
    tokens, width = 77, 512
    assert found["txt"] == 12 * (tokens * 24 * width**2 + 4 * tokens**2 * width)


@pytest.mark.parametrize(("pool", "stem"), [("cls", "linear"), ("mean", "linear"), ("map", "linear"), ("cls", "hmlp")])
def test_against_the_compilers_count(pool, stem):
    config = tiny.config("xclip", model__img__width=128, model__img__image_size=32, model__txt__width=64)
    config.model.img.pool, config.model.img.stem = pool, stem
    p = build.build(config, jax.devices()[:1])
    variables = nn.unbox(jax.eval_shape(p.model.init, jax.random.key(0), *shapes(config)))
    compiled = jax.jit(p.model.apply).lower(variables, *shapes(config)).compile()
    counted = compiled.cost_analysis()["flops"] / 8
    analytic = flops.forward(resolve(config), train=False)
    # Norms, softmax and activations are left out of the analytic figure.
    assert 0.8 * counted < sum(analytic.values()) < counted


def shapes(config, b=8):
    image = (b, config.model.img.image_size, config.model.img.image_size, 3)
    return jax.ShapeDtypeStruct(image, "float32"), jax.ShapeDtypeStruct((b, config.model.txt.context_length), "int32")


def test_patch_dropout_and_teacher_and_batch():
    config = tiny.config("xclip", model__img__depth=4)
    whole = flops.train_step(resolve(config))
    config.model.img.patch_dropout = 0.5
    assert flops.forward(resolve(config))["img"] < 0.75 * flops.forward(resolve(config), train=False)["img"]
    config.model.img.patch_dropout = 0.0
    config.objective.nclip.target = "ema"
    assert flops.train_step(resolve(config)) == pytest.approx(whole * 4 / 3, rel=0.01)
    # The teacher encodes all patches.
    with_teacher, teacher = flops.train_step(resolve(config)), whole / 3
    config.model.img.patch_dropout = 0.5
    dropped = 3 * (flops.forward(resolve(config), train=False)["img"] - flops.forward(resolve(config))["img"])
    assert flops.train_step(resolve(config)) == pytest.approx(with_teacher - config.data.batch * dropped, rel=0.01)
    assert with_teacher - whole == pytest.approx(teacher, rel=0.01)


def test_groups_count_as_they_are_rounded():
    """A device orders whole texts: of one none is cut by a share below 1, of three a half are one."""
    config, groups = resolve(tiny.config("clip")), LengthGroups.parse("6:0.5")
    whole, third = flops.train_step(config, WHOLE), flops.train_step(config, LengthGroups(((6, 1 / 3),)))
    assert flops.train_step(config, groups, rows=1) == whole > third
    assert flops.train_step(config, groups, rows=3) == pytest.approx(third)
    assert flops.train_step(config, groups, rows=2) == pytest.approx(flops.train_step(config, groups))


def test_xclip_costs_a_tenth_more_than_clip_at_most():
    clip, xclip = (flops.train_step(resolve(load_config(f"pretrain:objective={name}"))) for name in ("clip", "xclip"))
    print(f"xCLIP's FLOPs are {xclip / clip:.4f} times CLIP's, ViT-B/16")
    assert 1 < xclip / clip <= 1.10
