"""SuperCLIP's term in the objective: heads, costs, similarity and title."""

from tests.helpers import tiny
from xclip_jax.config import schema
from xclip_jax.objectives import make_objective
from xclip_jax.objectives.similarity import CosineSimilarity
from xclip_jax.train import cost


def test_superclip_is_clip_and_tokens():
    config = schema.resolve(tiny.config("superclip"))
    objective = make_objective(config.objective)
    assert (objective.title, objective.formula) == ("SuperCLIP", "1 CLIP + 1 tokens")
    assert objective.similarities == (CosineSimilarity(),) and objective.fields == ("image", "text")
    assert {name: x.shape for name, x in objective.initial_state(config.model, 259).items()} == {
        "token_frequency": (259,),
        "token_batches": (),
    }
    assert not objective.teacher and objective.recipe(config.model)["objective.terms.tokens"] == 1.0


def test_the_heads_flops_count():
    superclip, clip = (cost.forward_flops(schema.resolve(tiny.config(name))) for name in ("superclip", "clip"))
    assert superclip["heads"] - clip["heads"] == 2 * 32 * 259 and superclip["loss"] == clip["loss"]


def test_the_term_of_another_package_comes_first():
    config = tiny.config("superclip")
    config.objective.plugins = {"tokens": {"type": "tests.extension.superclip:TokenClassification"}}
    objective = make_objective(schema.resolve(config).objective)
    assert objective.formula == "1 CLIP + 1 token classification"
    assert "objective.plugins.tokens.momentum" in objective.recipe(schema.resolve(config).model)
