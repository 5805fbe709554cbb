"""Objectives: what a run minimises, a weighted sum of terms.

    clip      softmax contrastive
    siglip    sigmoid contrastive
    nclip     non-contrastive; xCLIP is the sum of clip and nclip
    classify  fine-tuning of one tower on labelled items

A term is one class in one file, see `base.Term`. `TERMS` is the table of this package's; one of another package is
named "package.module:Class" in the config, see `ObjectiveConfig`.
"""

from xclip_jax.objectives.base import LossConfig, Objective, Term
from xclip_jax.objectives.config import (
    OBJECTIVES,
    RECIPES,
    TERMS,
    ObjectiveConfig,
    find_term,
    make_objective,
    objective_of_heads,
    read_objective,
    with_terms,
)
from xclip_jax.objectives.display import Curve, Health, Level, Light
from xclip_jax.objectives.similarity import Similarity

__all__ = [
    "OBJECTIVES",
    "RECIPES",
    "TERMS",
    "Curve",
    "Health",
    "Level",
    "Light",
    "LossConfig",
    "Objective",
    "ObjectiveConfig",
    "Similarity",
    "Term",
    "find_term",
    "make_objective",
    "objective_of_heads",
    "read_objective",
    "with_terms",
]
