import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from tests.helpers import tiny
from tests.objectives.test_term import SUPERCLIP, superclip
from xclip_jax.config import schema
from xclip_jax.core.errors import UserError
from xclip_jax.data import loader
from xclip_jax.objectives import make_objective, read_objective
from xclip_jax.objectives.nclip import Nclip
from xclip_jax.objectives.similarity import ClusterSimilarity, CosineSimilarity
from xclip_jax.train import build, state

CLASSIFY = {"classes": 3, "smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0}


@pytest.mark.parametrize(
    "variant",
    ["clip", "siglip", "classify-img", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nclip", "xclip"))],
)
def test_parameters_and_metrics_are_those_of_the_first_edition(variant):
    """Mean magnitude of each tensor at the start, and metrics of three steps, recorded from the version before."""
    expected = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "objectives.json").read_text())[variant]
    classify = {"objective__classify": CLASSIFY} if variant == "classify-img" else {}
    config = tiny.config(variant.split("-")[0], objective__nclip__tau=1.0, **classify)
    if variant.startswith("xclip"):
        config.objective.terms = {"clip": 0.3, "nclip": 0.7}  # recipes were different then
    p = build.build(config, jax.devices()[:1])
    s = state.create(p.init, p.abstract)
    flat = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(s)}
    shapes = {key: shape for key, (shape, _) in expected["init"].items()}
    assert {key: list(x.shape) for key, x in flat.items()} == shapes
    for key, (_, magnitude) in expected["init"].items():
        assert float(np.abs(flat[key]).mean()) == pytest.approx(magnitude, rel=1e-5, abs=1e-12), key
    for i, metrics in enumerate(expected["metrics"]):
        batch = tiny.batch(i, eot=p.tokenizer.eot_id)
        batch["label"] = np.random.default_rng(i).integers(0, 2, tiny.BATCH, dtype=np.int32)
        s, values = p.compiled(s, loader.to_global({key: batch[key] for key in p.objective.fields}, p.mesh))
        assert values.keys() - {"skipped"} == metrics.keys()
        for key, value in metrics.items():
            assert float(values[key]) == pytest.approx(value, rel=2e-3, abs=2e-4), (i, key)


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
    batch = tiny.batch() | {"label": np.arange(tiny.BATCH, dtype=np.int32) % 3}
    metrics = jax.eval_shape(p.step, p.abstract, {key: batch[key] for key in fields})[1].keys()
    for name, term in objective.terms.items():
        assert term.curves()
        for curve in term.curves():
            keys = [key for key, _ in curve.lines] + [x for _, x in curve.levels if isinstance(x, str)]
            assert {f"{name}/{key}" for key in keys} <= metrics
    flat, recipe = schema.flatten(schema.to_dict(resolved)), objective.recipe(resolved.model)
    assert {f"objective.terms.{term}" for term in objective.terms} <= recipe.keys()
    assert all(flat[key] == value for key, value in recipe.items())
    assert objective.outputs(resolved.model) == {head.output for head in p.model.heads.values()}


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
    [
        ("clip", (ClusterSimilarity(0.5),), ["flat"]),
        ("nclip", (CosineSimilarity(),), ["plateau"]),
        ("", (CosineSimilarity(), ClusterSimilarity(0.5)), ["plateau", "flat"]),
    ],
)
def test_a_term_of_weight_0_neither_speaks_for_the_model_nor_warns(idle, own, alarms):
    config = tiny.config("xclip")
    config.objective.terms = {name: float(name != idle) for name in ("clip", "nclip")}
    objective = make_objective(schema.resolve(config).objective)
    assert objective.similarities == own
    both = {"clip/loss": 5.545, "clip/ln_b": np.log(256.0), "nclip/ln_k": np.log(24.0), "nclip/ln_b": np.log(32.0)}
    both |= {"nclip/agreement": 0.1, "nclip/loss": 1.5}
    for m in ("img", "txt"):
        both |= {f"nclip/mutual_information_{m}": 0.0, f"nclip/clusters_{m}": 9.0}
        both |= {f"nclip/{key}_{m}": 3.1 for key in ("marginal_entropy", "entropy")}
    assert [text.partition(":")[0] for text in objective.alarms(both)] == alarms
    assert objective.progress(both) == ["clip 5.545 (ln b 5.55)", "nclip 1.500 (0.00 nats, 9 clusters)"]


def test_terms_that_overwrite_each_other_are_refused():
    config = tiny.config("clip")
    config.objective.terms, config.objective.name = {"tokens": 0.5, "words": 0.5}, "two"
    config.objective.plugins = {name: {"type": SUPERCLIP} for name in ("tokens", "words")}
    config = schema.resolve(config)
    objective, model = make_objective(config.objective), config.model
    with pytest.raises(UserError, match=r"'words' carries 'token_batches', like an earlier term"):
        objective.initial_state(model, vocab=8)

    @dataclasses.dataclass(frozen=True)
    class Renamed(Nclip):
        def heads(self, model, vocab):
            return {f"own_{name}": head for name, head in super().heads(model, vocab).items()}

    clashing = dataclasses.replace(objective, terms={"nclip": Nclip(), "sharp": Renamed()})
    with pytest.raises(UserError, match=r"'own_clusters_img' with output 's_img' differs from the head 'clusters_img'"):
        clashing.heads(model, vocab=8)


@pytest.mark.parametrize(
    ("objective", "title", "formula"),
    [
        ({"name": "clip"}, "CLIP", "1 CLIP"),
        ({"name": "classify", "classify": {"classes": 3}}, "fine-tuning", "1 fine-tuning"),
        ({"name": "xclip"}, "xCLIP", "0.5 CLIP + 0.5 nCLIP"),
        ({"name": "mine", "terms": {"clip": 1.0, "siglip": 0.5}}, "mine", "1 CLIP + 0.5 SigLIP"),
        ({"name": "mine", "terms": {"tokens": 2.0}, "plugins": {"tokens": {"type": SUPERCLIP}}}, "mine", "2 tokens"),
    ],
)
def test_titles(objective, title, formula):
    made = read_objective(objective)
    assert (made.title, made.formula) == (title, formula)


def test_a_card_lists_the_options_of_a_term_of_another_package():
    resolved = schema.resolve(superclip())
    recipe = make_objective(resolved.objective).recipe(resolved.model)
    clip = {f"objective.clip.{name}" for name in ("label_smoothing", "positives", "gce_q")}
    tokens = {f"objective.plugins.tokens.{name}" for name in ("spread", "outputs")}
    assert recipe.keys() == {"objective.terms.clip", "objective.terms.tokens"} | clip | tokens
    assert recipe["objective.terms.tokens"] == recipe["objective.plugins.tokens.spread"] == 0.5
