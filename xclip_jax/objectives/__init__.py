"""Objectives: the loss that a run minimises, a weighted sum of terms.

    clip      softmax contrastive
    siglip    sigmoid contrastive
    nclip     non-contrastive; xCLIP is the sum of clip and nclip
    classify  fine-tuning of one tower on labelled items

A term is one class in one file, see `term.Term`. `TERMS` lists the terms of this package; a term of another package is
named "package.module:Class" in the config, see `ObjectiveConfig`.
"""

from xclip_jax.objectives.objective import (
    OBJECTIVES,
    RECIPES,
    TERMS,
    Objective,
    ObjectiveConfig,
    make_objective,
    read_objective,
    with_terms,
)
from xclip_jax.objectives.similarity import Similarity
from xclip_jax.objectives.term import Check, Curve, Health, LossConfig, Term

__all__ = [
    "OBJECTIVES", "RECIPES", "TERMS", "Check", "Curve", "Health", "LossConfig", "Objective", "ObjectiveConfig",
    "Similarity", "Term", "make_objective", "read_objective", "with_terms",
]  # fmt: skip
