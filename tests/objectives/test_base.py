"""Objectives as sums of terms: terms of other packages, configs, and what other modules ask."""

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
import pytest

from tests.helpers import tiny
from xclip_jax.config import recipes, schema
from xclip_jax.core.errors import UserError
from xclip_jax.data import loader
from xclip_jax.objectives import (
    RECIPES,
    TERMS,
    Curve,
    Term,
    find_term,
    make_objective,
    objective_of_heads,
    read_objective,
)
from xclip_jax.objectives.similarity import ClusterSimilarity, CosineSimilarity
from xclip_jax.train import build, flops, state
from xclip_jax.train.checkpoint import Checkpointer

SUPERCLIP = "tests.extension.superclip:TokenClassification"


def superclip(run="runs/tiny", **changes):
    """CLIP and the token classification of another package, as a recipe would write it."""
    config = tiny.config("clip", run=run, **changes)
    config.objective.name = "superclip"
    config.objective.terms = {"clip": 1.0, "tokens": 0.5}
    config.objective.plugins = {"tokens": {"type": SUPERCLIP, "momentum": 0.5}}
    return config


def train(p, steps, s=None):
    s, logged = state.create(p.init, p.abstract) if s is None else s, []
    for i in range(steps):
        s, metrics = p.compiled(s, loader.to_global(tiny.batch(i, eot=p.tokenizer.eot_id), p.mesh))
        logged.append({key: float(value) for key, value in jax.device_get(metrics).items()})
    return s, logged


# --- a term of another package


@pytest.mark.slow
def test_a_term_of_another_package_trains_and_resumes(tmp_path):
    p = build.build(superclip(tmp_path))
    assert p.objective.fields == ("image", "text") and p.objective.similarities == (CosineSimilarity(),)
    before = jax.device_get(state.create(p.init, p.abstract).params["token_classifier"])
    assert before["kernel"].shape == (32, p.tokenizer.vocab_size)
    s, logged = train(p, 2)
    for metrics in logged:
        assert metrics["loss"] == pytest.approx(metrics["clip/loss"] + 0.5 * metrics["tokens/loss"], rel=1e-6)
    after = jax.device_get(s.params["token_classifier"])
    assert np.abs(after["kernel"] - before["kernel"]).max() > 1e-4
    assert p.objective.progress(logged[1])[1] == f"tokens {logged[1]['tokens/loss']:.3f}"
    warnings = p.objective.alarms(logged[1] | {"clip/loss": 1.0, "tokens/loss": 30.0})
    assert warnings == ["tokens: the loss is above 20 nats; lower optim.lr."]

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(s, {"samples": 0})
    # The config alone, as the run's folder has it, finds the term again.
    again = build.build(schema.complete(json.loads(json.dumps(schema.to_dict(p.config)))))
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        restored, _ = checkpointer.restore(again.abstract)
    np.testing.assert_array_equal(restored.params["token_classifier"]["kernel"], after["kernel"])
    np.testing.assert_array_equal(restored.loss_state["token_frequency"], s.loss_state["token_frequency"])
    assert np.asarray(restored.loss_state["token_frequency"]).any()
    _, (resumed,) = train(again, 1, restored)
    assert np.isfinite(resumed["loss"]) and resumed["tokens/loss"] < logged[0]["tokens/loss"]


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
    table = page.partition("| `out[...]` |")[2].partition("| what a head")[0]
    names = "".join(row.partition("|")[2].partition("|")[0] for row in table.splitlines())
    written = {"h_img", "h_txt"}
    for name, changes in (("xclip", {}), ("siglip", {}), ("classify", {"objective__classify": {"classes": 3}})):
        config = schema.resolve(tiny.config(name, **changes))
        written |= make_objective(config.objective).outputs(config.model)
    assert set(re.findall(r"`(\w+)`", names)) == written


@pytest.fixture(scope="module")
def on_one_device():
    return train(build.build(superclip(), jax.devices()[:1]), 1)[1][0]


@pytest.mark.parametrize("strategy", ["dp", "fsdp"])
def test_a_term_of_another_package_on_eight_devices(strategy, on_one_device):
    many, expected = build.build(superclip(mesh__strategy=strategy, mesh__data=4, mesh__fsdp=2)), on_one_device
    _, (metrics,) = train(many, 1)
    for key in ("loss", "tokens/loss", "grad_norm"):
        assert metrics[key] == pytest.approx(expected[key], rel=1e-4), key


def test_a_heads_flops_count():
    vocab = build.build(superclip()).tokenizer.vocab_size
    configs = map(schema.resolve, (superclip(), tiny.config("clip")))
    with_term, without = (flops.forward(config)["heads"] for config in configs)
    assert with_term - without == 2 * 32 * vocab


@dataclasses.dataclass(frozen=True)
class NoLoss(Term):
    pass


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (
            {"type": SUPERCLIP, "momentun": 0.5},
            "'objective.plugins.tokens.momentun' is unknown; did you mean .*momentum",
        ),
        ({"type": SUPERCLIP, "momentum": 2.0}, r"objective\.plugins\.tokens\.momentum is 2\.0; expected at least 0"),
        ({"type": "tests.extension.superclip:Tokens"}, r"cannot be imported.* did you mean .*:TokenClassification'\?$"),
        ({"type": "tests.helpers.tiny:config"}, "is not a dataclass derived from xclip_jax.objectives.Term"),
        ({"type": f"{__name__}:NoLoss"}, r"NoLoss' does not define __call__, which Term requires; add it\.$"),
        ({}, "unknown objective term 'tokens'"),
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
    _, (metrics,) = train(p, 1)
    assert metrics["loss"] == pytest.approx(0.5 * metrics["clip/loss"] + 0.25 * metrics["siglip/loss"], rel=1e-6)


# --- the built-in terms, as they were before they were terms

VARIANTS = {
    "clip": {},
    "siglip": {},
    "nclip": {},
    "xclip": {},
    "xclip-ema-center": {"objective__nclip__target": "ema", "objective__nclip__balance": "center"},
    "classify-img": {
        "objective__classify__classes": 3,
        "objective__classify__smoothing": 0.1,
        "objective__classify__mixup": 0.8,
        "objective__classify__cutmix": 1.0,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_and_metrics_are_those_of_the_first_edition(variant):
    """Mean magnitude of each tensor at the start, and metrics of three steps, recorded from the version before."""
    expected = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "objectives.json").read_text())[variant]
    config = tiny.config(variant.split("-")[0], objective__nclip__tau=1.0, **VARIANTS[variant])
    if variant.startswith("xclip"):
        config.objective.terms = {"clip": 0.3, "nclip": 0.7}  # recipes were different then
    p = build.build(config, jax.devices()[:1])
    s = state.create(p.init, p.abstract)
    flat = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(s)}
    assert {key: list(x.shape) for key, x in flat.items()} == {
        key: shape for key, (shape, _) in expected["init"].items()
    }
    for key, (_, magnitude) in expected["init"].items():
        assert float(np.abs(flat[key]).mean()) == pytest.approx(magnitude, rel=1e-5, abs=1e-12), key
    for i, metrics in enumerate(expected["metrics"]):
        batch = tiny.batch(i, eot=p.tokenizer.eot_id)
        batch["label"] = np.random.default_rng(i).integers(0, 2, tiny.BATCH, dtype=np.int32)
        s, values = p.compiled(s, loader.to_global({key: batch[key] for key in p.objective.fields}, p.mesh))
        assert values.keys() - {"skipped"} == metrics.keys()
        for key, value in metrics.items():
            assert float(values[key]) == pytest.approx(value, rel=2e-3, abs=2e-4), (i, key)


# --- configs


@pytest.mark.parametrize(
    ("given", "terms"),
    [
        ({"name": "siglip"}, {"siglip": 1.0}),
        ({"name": "nclip", "nclip": {"tau": 0.5}}, {"nclip": 1.0}),
        ({"name": "xclip"}, {"clip": 0.5, "nclip": 0.5}),
        ({"name": "classify", "classify": {"classes": 3}}, {"classify": 1.0}),
        ({"name": "mine", "terms": {"clip": 0.5, "siglip": 0.5}}, {"clip": 0.5, "siglip": 0.5}),
    ],
)
def test_a_named_objective_has_its_terms(given, terms):
    objective = schema.resolve(schema.complete({"steps": 1, "optim": {"warmup": 0}, "objective": given})).objective
    assert dict(objective.terms) == terms and objective.name == given["name"]
    for group in ("nclip", "classify"):
        for key, value in given.get(group, {}).items():
            assert getattr(getattr(objective, group), key) == value


def test_recipes_are_known_terms():
    for name, terms in RECIPES.items():
        assert terms.keys() <= TERMS.keys()
        assert dict(recipes.base(name, "Ti/12").objective.terms.to_dict()) == terms
    with pytest.raises(UserError, match="unknown objective term 'nclop'; did you mean 'nclip'"):
        find_term("nclop")


# --- what other modules ask


@pytest.mark.parametrize(
    ("name", "similarities", "fields"),
    [
        ("clip", (CosineSimilarity(),), ("image", "text")),
        ("siglip", (CosineSimilarity(),), ("image", "text")),
        ("nclip", (ClusterSimilarity(0.5),), ("image", "text")),
        ("xclip", (CosineSimilarity(), ClusterSimilarity(0.5)), ("image", "text")),
        ("classify", (), ("image", "label")),
    ],
)
def test_terms_describe_themselves(name, similarities, fields):
    config = tiny.config(name, objective__classify__classes=3, objective__nclip__tau=0.5)
    resolved = schema.resolve(config)
    objective = make_objective(resolved.objective)
    assert objective.similarities == similarities and objective.fields == fields
    p = build.build(resolved)
    metrics = metrics_of_a_step(p)
    for term, curves in objective.curves().items():
        assert curves
        for curve in curves:
            assert isinstance(curve, Curve)
            keys = [key for key, _ in curve.lines] + [x.value for x in curve.levels if isinstance(x.value, str)]
            assert {f"{term}/{key}" for key in keys} <= metrics
    flat, recipe = schema.flatten(schema.to_dict(resolved)), objective.recipe(resolved.model)
    assert {f"objective.terms.{term}" for term in objective.terms} <= recipe.keys()
    assert all(flat[key] == value for key, value in recipe.items())
    assert objective.outputs(resolved.model) == set(p.model.outputs) and objective.describe(resolved.model)


def test_the_models_own_similarity_is_that_of_embeddings_whatever_the_terms_are_called():
    config = tiny.config("clip")
    config.objective.name, config.objective.terms = "mine", {"nclip": 0.5, "siglip": 0.5}
    objective = make_objective(schema.resolve(config).objective)
    assert [*objective.terms] == ["nclip", "siglip"]
    assert objective.similarities == (CosineSimilarity(), ClusterSimilarity(0.5))
    # Two terms with one similarity, and two of one name, of which the first one's counts.
    config.objective.terms = {"clip": 0.5, "nclip": 0.5, "sharp": 0.5, "siglip": 0.5}
    config.objective.plugins = {"sharp": {"type": "xclip_jax.objectives.nclip:Nclip", "tau": 0.1}}
    similarities = make_objective(schema.resolve(config).objective).similarities
    assert similarities == (CosineSimilarity(), ClusterSimilarity(0.5))


@pytest.mark.parametrize(
    ("idle", "own", "alarms"),
    [("clip", ClusterSimilarity(0.5), ["flat"]), ("nclip", CosineSimilarity(), ["plateau"]), ("", None, None)],
)
def test_a_term_of_weight_0_neither_speaks_for_the_model_nor_warns(idle, own, alarms):
    config = tiny.config("xclip")
    config.objective.terms = {name: float(name != idle) for name in ("clip", "nclip")}
    objective = make_objective(schema.resolve(config).objective)
    assert objective.similarities[0] == (own or CosineSimilarity()) and len(objective.similarities) == 2
    both = {"clip/loss": 5.545, "clip/ln_b": np.log(256.0), "nclip/ln_k": np.log(24.0), "nclip/ln_b": np.log(32.0)}
    both |= {"nclip/agreement": 0.1, "nclip/loss": 1.5}
    for m in ("img", "txt"):
        both |= {f"nclip/mutual_information_{m}": 0.0, f"nclip/clusters_{m}": 9.0}
        both |= {f"nclip/{key}_{m}": 3.1 for key in ("marginal_entropy", "entropy")}
    assert [text.partition(":")[0] for text in objective.alarms(both)] == (alarms or ["plateau", "flat"])


def metrics_of_a_step(p):
    """Names of the metrics; nothing is compiled."""
    batch = tiny.batch() | {"label": np.arange(tiny.BATCH, dtype=np.int32) % 3}
    return jax.eval_shape(p.step, p.abstract, {key: batch[key] for key in p.objective.fields})[1].keys()


def test_progress_and_alarms_are_the_terms():
    objective = make_objective(schema.resolve(tiny.config("xclip")).objective)
    flat = {
        f"nclip/{key}_{m}": 0.0 for key in ("mutual_information", "marginal_entropy", "entropy") for m in ("img", "txt")
    }
    flat |= {"nclip/marginal_entropy_img": 3.1, "nclip/marginal_entropy_txt": 3.1, "nclip/entropy_img": 3.1}
    flat |= {"nclip/clusters_img": 9.0, "nclip/clusters_txt": 8.0, "nclip/entropy_txt": 3.1, "nclip/agreement": 0.1}
    flat |= {
        "nclip/ln_k": np.log(24.0),
        "nclip/ln_b": np.log(32.0),
        "nclip/loss": 1.5,
        "clip/loss": 3.0,
        "clip/ln_b": 3.47,
    }
    assert objective.progress(flat) == ["clip 3.000 (ln b 3.47)", "nclip 1.500 (0.00 nats, 8 clusters)"]
    assert [text.split(":")[0] for text in objective.alarms(flat)] == ["flat"]


@pytest.mark.parametrize(
    ("loss", "smoothing", "alarm"), [(5.545, 0.0, True), (5.769, 0.0, True), (5.4, 0.0, False), (5.5, 0.8, False)]
)
def test_a_loss_that_stays_at_ln_b_is_an_alarm(loss, smoothing, alarm):
    """The first two are of runs that learned nothing; smoothed targets leave less to learn."""
    config = tiny.config("clip", objective__clip={"label_smoothing": smoothing})
    clip = make_objective(schema.resolve(config).objective).terms["clip"]
    metrics = {"loss": loss, "ln_b": np.log(256.0)}
    warnings, (light,) = clip.alarms(metrics), clip.health(metrics).lights
    assert [text.partition(":")[0] for text in warnings] == [light.name] * alarm
    assert (light.value < light.threshold) == alarm and all("Lengthen optim.warmup" in text for text in warnings)
    one_pair = {"loss": 0.0, "ln_b": 0.0}
    assert clip.alarms(one_pair) == [] and clip.health(one_pair).lights[0].impossible


@pytest.mark.parametrize(("k", "b"), [(1, 16), (24, 1), (1, 1)])
def test_one_cluster_or_a_batch_of_one_pair_gives_no_warning(k, b):
    """ln 1 = 0 nats are no information to lose, whichever side of 0 rounding is on."""
    metrics = {
        f"{key}_{m}": -1e-7 for key in ("mutual_information", "marginal_entropy", "entropy") for m in ("img", "txt")
    }
    metrics |= {"clusters_img": 1.0, "clusters_txt": 1.0, "agreement": 0.0}
    metrics |= {"ln_k": np.log(float(k)), "ln_b": np.log(float(b))}
    nclip = make_objective(schema.resolve(tiny.config("nclip")).objective).terms["nclip"]
    assert nclip.alarms(metrics) == [] and all(light.impossible for light in nclip.health(metrics).lights)


@pytest.mark.parametrize(
    ("objective", "title", "formula"),
    [
        ({"name": "clip"}, "CLIP", "1 CLIP"),
        ({"name": "siglip"}, "SigLIP", "1 SigLIP"),
        ({"name": "xclip"}, "xCLIP", "0.5 CLIP + 0.5 nCLIP"),
        ({"name": "mine", "terms": {"clip": 1.0, "siglip": 0.5}}, "mine", "1 CLIP + 0.5 SigLIP"),
        (
            {"name": "mine", "terms": {"tokens": 2.0}, "plugins": {"tokens": {"type": SUPERCLIP}}},
            "mine",
            "2 token classification",
        ),
    ],
)
def test_titles(objective, title, formula):
    made = read_objective(objective)
    assert (made.title, made.formula) == (title, formula)


def test_the_heads_of_weights_decide_their_objective():
    heads = {"proj_img", "proj_txt", "log_scale"}
    assert objective_of_heads(heads) == {"name": "clip"}
    assert objective_of_heads(heads | {"bias"}) == {"name": "siglip"}
    assert objective_of_heads({"clusters_img", "clusters_txt"}) == {"name": "nclip"}
    with pytest.raises(UserError, match="no objective has just the heads log_scale, proj_img"):
        objective_of_heads({"proj_img", "log_scale"})


def test_a_card_lists_the_options_of_a_term_of_another_package():
    resolved = schema.resolve(superclip())
    recipe = make_objective(resolved.objective).recipe(resolved.model)
    assert recipe == {
        "objective.terms.clip": 1.0,
        "objective.terms.tokens": 0.5,
        "objective.clip.label_smoothing": 0.0,
        "objective.plugins.tokens.momentum": 0.5,
    }
