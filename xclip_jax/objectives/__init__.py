"""Objectives: what a run minimises, a weighted sum of terms.

    clip      softmax contrastive                                         xCLIP is 0.3 clip + 0.7 nclip
    siglip    sigmoid contrastive
    nclip     non-contrastive
    classify  fine-tuning of one tower on labelled items

A term is one class in one file, see `base.Term`; `TERMS` is the table of those of this package. A term of another
package is named "package.module:Class".
"""

from xclip_jax.objectives.base import Curve, LossConfig, Objective, Term
from xclip_jax.objectives.config import OBJECTIVES, TERMS, ObjectiveConfig, make_objective

__all__ = ["OBJECTIVES", "TERMS", "Curve", "LossConfig", "Objective", "ObjectiveConfig", "Term", "make_objective"]
