"""Objectives: the loss that a run minimises, a weighted sum of terms.

    clip      softmax contrastive
    siglip    sigmoid contrastive
    nclip     non-contrastive; xCLIP is the sum of clip and nclip
    classify  fine-tuning of one tower on labelled items

A term is one class in one file, see `term.Term`. `TERMS` lists the terms of this package; a term of another package is
named "package.module:Class" in the config, see `ObjectiveConfig`.
"""

from xclip_jax.objectives.objective import OBJECTIVES as OBJECTIVES
from xclip_jax.objectives.objective import RECIPES as RECIPES
from xclip_jax.objectives.objective import TERMS as TERMS
from xclip_jax.objectives.objective import Objective as Objective
from xclip_jax.objectives.objective import ObjectiveConfig as ObjectiveConfig
from xclip_jax.objectives.objective import make_objective as make_objective
from xclip_jax.objectives.objective import read_objective as read_objective
from xclip_jax.objectives.objective import with_terms as with_terms
from xclip_jax.objectives.similarity import Similarity as Similarity
from xclip_jax.objectives.term import Check as Check
from xclip_jax.objectives.term import Curve as Curve
from xclip_jax.objectives.term import Health as Health
from xclip_jax.objectives.term import LossConfig as LossConfig
from xclip_jax.objectives.term import Term as Term
