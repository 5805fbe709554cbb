"""Evaluation sets for tests of studies: grey images and the words for them, one for validation and one for tests."""

import numpy as np

from xclip_jax.evaluators.base import SetKind
from xclip_jax.evaluators.results import VALIDATION, Provenance
from xclip_jax.evaluators.zeroshot import ZeroShotSet

VALIDATION_SET, TEST_SET = "tests.studies.greys:Greys/validation", "tests.studies.greys:Greys/test"


class Greys(SetKind):
    """Four shades of grey by name; "/misnamed" calls itself validation and is not."""

    @classmethod
    def load(cls, spec, prepare, data, profile):
        levels = np.linspace(10, 240, 24).astype(np.uint8) + (5 if spec.endswith("/test") else 0)
        images = [np.full((prepare.size, prepare.size, 3), level) for level in levels]
        card = Provenance("greys", split_hash=spec, role=VALIDATION if spec.endswith("/validation") else "")
        names = [[name] for name in ("black", "dark", "light", "white")]
        return ZeroShotSet(spec, images, np.arange(24) // 6, names, card=card)
