"""A kind of evaluation sets, pairs of grey images, and an evaluator of their order, as another package has them."""

import numpy as np

from xclip_jax.evaluators.base import Column, Evaluator, Layout, SetKind
from xclip_jax.evaluators.results import Provenance
from xclip_jax.evaluators.statistics import PerExample


class GreyImages:
    """Grey images from black to white."""

    evaluator = "tests.extension.greys:Neighbours"
    card = Provenance("greys", split_hash="1", protocol="the next image is nearer than the one after", metric="nearer")

    def __init__(self, name, images):
        self.name, self.images = name, images


class Greys(SetKind):
    """Sets named tests.extension.greys:Greys/NUMBER, of NUMBER images."""

    @classmethod
    def load(cls, spec, prepare, data, profile):
        """Return the set `spec`."""
        levels = np.linspace(0, 255, int(spec.partition("/")[2])).astype(np.uint8)
        return GreyImages(spec, [np.full((prepare.size, prepare.size, 3), level) for level in levels])


class Neighbours(Evaluator):
    """Whether an image is nearer to the next one than to the one after: "order of images/<set>/nearer", in percent."""

    family = "order of images"
    layouts = (
        Layout(
            "order of images, %",
            (Column("images", "images"), Column("nearer", "nearer", "next one nearer", chance=True)),
        ),
    )

    def measure(self, variables):
        """Return the results that the class names."""
        z = self.encoder.images(variables, self.data.images, ("embedding",))["embedding"]
        near, far = (np.einsum("ne,ne->n", z[:-2], z[step : len(z) - 2 + step]) for step in (1, 2))
        nearer = PerExample((near > far).astype(float))
        return [self.result("nearer", nearer, chance=50.0), self.count("images", len(self.data.images))]
