import math
import pathlib
import re

import jax
import numpy as np
import pytest

from tests.helpers import tiny
from tests.losses.test_contrastive import embeddings
from xclip_jax.config import schema
from xclip_jax.core.errors import UserError
from xclip_jax.objectives import Check, Term, make_objective
from xclip_jax.train import build, cost

pytestmark = pytest.mark.long

SUPERCLIP = "examples.superclip:Tokens"


def superclip(run="runs/tiny", **changes):
    """CLIP and the token classification of another package, as a recipe would write it."""
    config = tiny.config("clip", run=run, **changes)
    config.objective.name = "superclip"
    config.objective.terms = {"clip": 1.0, "tokens": 0.5}
    config.objective.plugins = {"tokens": {"type": SUPERCLIP, "spread": 0.5}}
    return config


def test_a_term_without_heads_uses_the_embeddings_of_clip():
    config = tiny.config("clip")
    config.objective.name, config.objective.terms = "cyclip", {"clip": 1.0, "cyclic": 0.25}
    config.objective.plugins = {"cyclic": {"type": "tests.extension.cyclip:Consistency"}}
    resolved, alone = schema.resolve(config), schema.resolve(tiny.config("clip"))
    objective, clip = make_objective(resolved.objective), make_objective(alone.objective)
    assert objective.heads(resolved.model, 9) == clip.heads(alone.model, 9)
    rng = np.random.default_rng(0)
    img, txt = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 5, 4)).astype(np.float32))
    loss, metrics, _ = objective({"z_img": img, "z_txt": txt, "scale": np.float32(10)}, None, {}, {})
    metrics = {key: float(value) for key, value in metrics.items()}
    pairs = [(i, j) for i in range(5) for j in range(5)]
    cyclic = sum((img[i] @ txt[j] - img[j] @ txt[i]) ** 2 + (img[i] @ img[j] - txt[i] @ txt[j]) ** 2 for i, j in pairs)
    assert metrics["cyclic/loss"] == pytest.approx(cyclic / 5, rel=1e-5)
    assert float(loss) == pytest.approx(metrics["clip/loss"] + 0.25 * metrics["cyclic/loss"], rel=1e-6)


def test_the_documented_outputs_are_those_of_the_model():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "extend.md").read_text()
    table = page.partition("| `out[...]` |")[2].partition("| a head's `output`")[0]
    names = "".join(row.partition("|")[2].partition("|")[0] for row in table.splitlines())
    written = {"h_img", "h_txt", "tokens"}  # the last of examples/superclip.py
    classify = {"objective__classify": {"classes": 3}}
    for name, changes in (("xclip", {}), ("siglip", {}), ("classify", classify)):
        config = schema.resolve(tiny.config(name, **changes))
        written |= make_objective(config.objective).outputs(config.model)
    assert set(re.findall(r"`(\w+)`", names)) == written


def test_terms_of_other_packages_on_eight_devices():
    """Three examples at once, in microbatches and chunks, against the whole batch on one device."""
    plugins = {
        "tokens": {"type": SUPERCLIP, "spread": 0.5},
        "nested": {"type": "examples.matryoshka:Nested", "dims": (1, 3, 4)},
        "distill": {"type": "examples.distill:Distill", "size": 3, "scale": 20.0},
    }

    def make(devices, **changes):
        config = tiny.config("clip", **changes)
        config.objective.name, config.objective.plugins = "examples", plugins
        config.objective.terms = {"clip": 0.25, "tokens": 0.5, "nested": 0.75, "distill": 1.0}
        return build.build(config, jax.devices()[:devices])

    split = {"mesh__strategy": "fsdp", "mesh__data": 4, "mesh__fsdp": 2}
    one, eight = make(1), make(8, optim__microbatches=2, loss__chunk_size=8, **split)
    targets = dict(zip(("target_img", "target_txt"), map(np.float32, embeddings(tiny.BATCH, 3)), strict=True))
    names = ("tokens/loss", "distill/loss", "distill/agree", "nested/loss_1", "nested/loss_3", "nested/acc_img_4")
    metrics = tiny.assert_same_step(one, eight, tiny.batch() | targets, *names)
    total = sum(weight * metrics[f"{name}/loss"] for name, weight in one.config.objective.terms.items())
    assert metrics["loss"] == pytest.approx(total, rel=1e-5)
    for name, term in one.objective.terms.items():
        assert {f"{name}/{key}" for curve in term.curves() for key, _ in curve.lines} <= metrics.keys()


def test_a_heads_flops_count():
    vocab = build.build(superclip()).tokenizer.vocab_size
    configs = map(schema.resolve, (superclip(), tiny.config("clip")))
    with_term, without = (cost.forward_flops(config)["heads"] for config in configs)
    assert with_term - without == 2 * 32 * vocab


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ({"type": SUPERCLIP, "spraed": 0.5}, "'objective.plugins.tokens.spraed' is unknown; did you mean .*spread"),
        ({"type": SUPERCLIP, "spread": 0.0}, r"objective\.plugins\.tokens\.spread is 0\.0; expected .* above 0"),
        ({"type": "examples.superclip:Token"}, r"cannot be imported.* has no attribute 'Token'"),
        ({"type": "tests.helpers.tiny:config"}, "is not a dataclass derived from xclip_jax.objectives.term.Term"),
    ],
)
def test_wrong_plugins_are_named(plugin, message):
    config = superclip()
    config.objective.plugins = {"tokens": plugin}
    with pytest.raises(UserError, match=message):
        schema.resolve(config)


def test_a_term_under_two_names_shares_its_heads():
    config = tiny.config("clip")
    config.objective.name = "both"
    config.objective.terms = {"clip": 0.5, "siglip": 0.25}
    p = build.build(config)
    assert set(p.model.heads) == {"proj_img", "proj_txt", "log_scale", "bias"}
    z = np.eye(4, dtype=np.float32)
    _, metrics, _ = p.objective({"z_img": z, "z_txt": z, "scale": np.float32(2), "bias": np.float32(-1)}, None, {}, {})
    expected = 0.5 * float(metrics["clip/loss"]) + 0.25 * float(metrics["siglip/loss"])
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-6)


def check(value, **options):
    return Check("empty", value, 2.0, "Fails when it is empty.", "it is empty. Fill it.", **options)


@pytest.mark.parametrize(
    ("value", "options", "failed"),
    [(1.0, {}, True), (2.0, {}, False), (1.0, {"applies": False}, False), (math.nan, {}, False)],
)
def test_a_check_fails_below_its_threshold(value, options, failed):
    assert check(value, **options).failed is failed
    assert check(value).warning == "empty: it is empty. Fill it."


def test_a_term_without_charts_has_a_chart_of_its_loss():
    class Plain(Term):
        title = "plain"

        def __call__(self, out, teacher, state, batch, *, chunk=0):
            return 0.0, {}, {}

    term = Plain()
    assert [curve.title for curve in term.curves()] == ["plain loss"] and term.alarms({"loss": 1.0}) == []
    assert (term.progress({"loss": 1.0}), term.progress({})) == ("1.000", "")
