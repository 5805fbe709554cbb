"""Distillation: another model's stored embeddings as targets; a term, a source and a recipe outside the package.

    xclip-jax embed --checkpoint TEACHER --images folder:/my/pairs --captions --out teacher.parquet
    PYTHONPATH=. xclip-jax train --config examples/distill.py:pairs=folder:/my/pairs,targets=teacher.parquet

The recipe is `small` with two more keys of its argument: targets (files of embeddings), and scale (of the teacher's
logits). The weights of the terms are `objective.terms`.

Sources: Vasu et al., "MobileCLIP", arXiv 2311.17049 (embeddings stored with the data set, the loss and its weights);
Wu et al., "TinyCLIP", arXiv 2309.12314 (affinity mimicking).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from configs import small
from xclip_jax.commands.inputs import Images
from xclip_jax.config import recipes
from xclip_jax.core import storage
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.core.fields import above, at_least, key
from xclip_jax.data import embeddings, sources
from xclip_jax.data.base import Record, Source, SourceKind, SourceOptions, WrappedSource, split_columns
from xclip_jax.losses.contrastive import dot
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives import Curve, Term
from xclip_jax.objectives.clip import Clip
from xclip_jax.objectives.similarity import CosineSimilarity, Similarity
from xclip_jax.objectives.term import Arrays, Result
from xclip_jax.parallel.sharding import argmax, constrain

ARGUMENTS = small.ARGUMENTS | {"targets": "", "scale": 100.0}
WEIGHT = 0.75  # of distillation, MobileCLIP's on a billion pairs; on 12 million it is 1


@dataclasses.dataclass(frozen=True)
class Distill(Term):
    """Divergence of the student's matches within a batch from the teacher's, see `divergence`.

    It trains the embeddings and the scale of another term, `clip` or `siglip`, whose weight may be 0.
    """

    title: ClassVar[str] = "distillation"

    size: int = key(512, "size of the teacher's embeddings", at_least(1))
    scale: float = key(100.0, "scale of the teacher's logits, the inverse of its temperature", above(0))

    @property
    def similarity(self) -> Similarity:
        """Compare the embeddings, also if the weight of their own term is 0."""
        return CosineSimilarity()

    @property
    def columns(self) -> Mapping[str, int]:
        """Return the teacher's embeddings."""
        return {"target_img": self.size, "target_txt": self.size}

    def __call__(
        self, out: Arrays, teacher: Arrays | None, state: Arrays, batch: Mapping[str, Any], *, chunk: int = 0
    ) -> Result:
        """Compute the loss, see `Term.__call__`."""
        student = (out["z_img"], out["z_txt"], out["scale"])
        return (*divergence(student, (batch["target_img"], batch["target_txt"], self.scale), chunk), {})

    def constrain(self, params: Any) -> Any:
        """Limit the student's logit scale like CLIP."""
        return Clip().constrain(params)

    def flops(self, model: ModelConfig, batch: int) -> float:
        """Return the FLOPs of the logits."""
        return 4 * batch * (model.embed + self.size)

    def curves(self) -> tuple[Curve, ...]:
        """Return charts of the loss and of the share of items whose best match is the teacher's."""
        return (
            Curve("Divergence from the teacher", (("loss", "distillation"),), "nats"),
            Curve("Best match of the teacher", (("agree", "images and texts"),), "%"),
        )


Embeddings = tuple[jax.Array, jax.Array, Any]


def divergence(student: Embeddings, teacher: Embeddings, chunk: int = 0) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the KL divergence between the softmax over the batch of a teacher and a student, in nats.

    For image i it is KL(softmax_j(s' t_i . u_j) || softmax_j(s z_i . w_j)), with image and text embeddings t and u and
    scale s' of the teacher, and z, w and s of the student; for text j the same over images. The loss is the mean over
    images and texts: MobileCLIP's distillation loss without its constant part, the entropy of the targets.

    Args:
      student: image and text embeddings of the global batch, (b, e), L2-normalised, and scale ().
      teacher: the same, of any size; row i of both belongs to pair i.
      chunk: queries to compare with all items at a time, a divisor of b; 0 for all.

    Returns:
      The loss and metrics "loss" and "agree", the fraction of images and texts with the same best match in both.
    """

    def directed(queries: int, items: int) -> Any:
        def compare(rows: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
            models = zip(rows, (student, teacher), strict=True)
            logits = [constrain(model[2] * dot(model[items], row), "batch", None) for row, model in models]
            log_q, log_p = (jax.nn.log_softmax(x, axis=0) for x in logits)
            same = argmax(logits[0], 0) == argmax(logits[1], 0)
            return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=0), same

        # Each device holds all queries: slices of a split array would be sent one by one.
        rows = [constrain(model[queries], None, None) for model in (student, teacher)]
        if not chunk:
            return compare(rows)
        return jax.lax.map(jax.checkpoint(compare), [x.reshape(-1, chunk, x.shape[1]) for x in rows])

    (kl_img, same_img), (kl_txt, same_txt) = directed(0, 1), directed(1, 0)
    loss = 0.5 * (jnp.mean(kl_img) + jnp.mean(kl_txt))
    agree = 0.5 * (jnp.mean(same_img, dtype=jnp.float32) + jnp.mean(same_txt, dtype=jnp.float32))
    return loss, {"loss": loss, "agree": agree}


@functools.lru_cache(maxsize=1)
def _read(files: tuple[str, ...], digest: str) -> dict[tuple[str, str], np.ndarray]:
    """Return the embeddings in files with the hash `digest` by ("image", id) and ("text", text)."""
    rows: dict[tuple[str, str], np.ndarray] = {}
    for columns in map(embeddings.read, files):
        keys = zip(columns["kind"], columns["id"], columns["text"], strict=True)
        for (kind, name, text), row in zip(keys, columns["embedding"], strict=True):
            known = (kind, name if kind == "image" else text)
            if known in rows and not np.allclose(rows[known], row, atol=1e-3):
                raise UserError(f"{', '.join(files)}: {kind} {known[1]!r} has different embeddings; embed it once.")
            rows[known] = row
    return rows


class PairsWithTargets(WrappedSource):
    """Pairs with the columns "target_img" and "target_txt": embeddings of the image and of the drawn caption."""

    def __init__(self, spec: str, source: Source, pattern: str) -> None:
        """Find the pairs in files of embeddings, which are kept in memory; `UserError` if they are not there."""
        super().__init__(source)
        files = storage.expand(pattern)
        self._digest = storage.fingerprint(files)
        self._rows = _read(tuple(files), self._digest)
        self._images = Images(source, split_columns(spec)[0])
        first = [self._images.name(index) for index in range(min(len(source), 1000))]
        if not any(("image", name) in self._rows for name in first):
            raise UserError(
                f"{pattern!r} has no image {first[0]!r}, nor the next ones of {spec!r}; embed the pairs by the same "
                f"name, xclip-jax embed --captions --images {spec}."
            )

    def _target(self, kind: str, name: str) -> np.ndarray:
        if (kind, name) not in self._rows:
            raise BadSample(f"{kind} without target", name)
        return self._rows[kind, name]

    def __getitem__(self, index: int) -> Record:
        """Return a record with targets; `BadSample` for an image without one."""
        image = self._target("image", self._images.name(index))
        return self.source[index] | {"target_img": image, "target_txt": functools.partial(self._target, "text")}

    def fingerprint(self) -> dict[str, Any]:
        """Add the hash of the files to the pairs'."""
        known = self.source.fingerprint()
        return known | {"hash": f"{known['hash']}, targets {self._digest}"}


class Pairs(SourceKind):
    """The source `examples.distill:Pairs:FILES@SPEC`: the pairs of SPEC, and embeddings of `xclip-jax embed`."""

    @classmethod
    def open(cls, rest: str, options: SourceOptions) -> PairsWithTargets:
        """Open pairs and embeddings."""
        files, _, spec = rest.partition("@")
        return PairsWithTargets(spec, sources.open_pairs(spec, options), files)


def _small(arg: str | None) -> tuple[str, str, float]:
    """Return the argument for `small`, the files of embeddings and the teacher's scale."""
    args = recipes.parse_arg(arg, **ARGUMENTS)
    if not (args.pairs and args.targets):
        raise UserError("examples/distill.py needs pairs=SOURCE and targets=FILES, see xclip-jax embed --captions.")
    values = {name: args[name] for name, default in small.ARGUMENTS.items() if args[name] != default}
    values["pairs"] = f"examples.distill:Pairs:{args.targets}@{sources.spec_from_path(args.pairs)}"
    return ",".join(f"{name}={value}" for name, value in values.items()), args.targets, args.scale


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """See the module's docstring."""
    return small.get_config(_small(arg)[0])


def fill_in(config: ml_collections.ConfigDict, arg: str | None = None) -> recipes.Describe:
    """Fill in the recipe `small`, and add the term."""
    of_small, targets, scale = _small(arg)
    describe = small.fill_in(config, of_small)
    size = embeddings.read(storage.expand(targets)[0])["embedding"].shape[1]
    others = {name: weight * (1 - WEIGHT) for name, weight in config.objective.terms.items() if name != "distill"}
    if not others.keys() & {"clip", "siglip"}:
        others["clip"] = 0.0  # for its heads
    config.objective.name = "distilled"
    config.objective.terms = others | {"distill": WEIGHT}
    config.objective.plugins = {"distill": {"type": "examples.distill:Distill", "size": size, "scale": scale}}
    return describe
