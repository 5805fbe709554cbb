"""A trained model for use: embeddings, zero-shot labels and clusters of images and texts.

    model = xclip_jax.load("runs/mine")
    z_img, z_txt = model.encode_image(["a.jpg", "b.png"]), model.encode_text(["a fox", "a hen"])
    found = model.zero_shot(["a.jpg"], ["fox", "hen"])

NumPy comes out, and any number of items goes in: they are encoded on all devices in batches of a few fixed sizes, so
that each is compiled once. Images are prepared as the model wants them, which its config says.
"""

import dataclasses
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

from xclip_jax import storage
from xclip_jax.data import tokenizer
from xclip_jax.data.base import MAX_BYTES
from xclip_jax.data.prefetch import ThreadPrefetcher
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.errors import BadSample, UserError, check_count
from xclip_jax.evaluators.encoder import Encoder, Features
from xclip_jax.evaluators.text import embedding
from xclip_jax.evaluators.zeroshot import class_scores, distributions
from xclip_jax.models.layers import unstack_blocks
from xclip_jax.models.two_towers import TwoTowers
from xclip_jax.parallel.mesh import make_mesh, replicated
from xclip_jax.train import weights

ImageLike = str | os.PathLike | bytes | np.ndarray | Image.Image

TEMPLATES = ("a photo of a {}.",)
_SMALLER = (1, 8)  # batches for few items
_MESH = {"data": -1, "fsdp": 1, "model": 1}


@dataclasses.dataclass(frozen=True, eq=False)
class ZeroShotResult:
    """What `Model.zero_shot` found for b images among n classes.

    Attributes:
      labels: the likeliest class of each image.
      probabilities: fp32 (b, n), rows sum to 1.
      scores: fp32 (b, n), what the probabilities are made of: cosines, or negative cross-entropies in nats.
    """

    labels: list[str]
    probabilities: np.ndarray
    scores: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Clusters:
    """The likeliest clusters of b items, likeliest first.

    Attributes:
      ids: int (b, top).
      probabilities: fp32 (b, top).
    """

    ids: np.ndarray
    probabilities: np.ndarray


class Model:
    """Both towers with their weights, tokenizer and preprocessing; made by `load`.

    Where the model has CLIP's projection, embeddings are its (b, e). nCLIP alone has none: there the embedding is the
    distribution over clusters (b, k), scaled to unit length, so that products of embeddings are the cosines that its
    evaluations print.

    Attributes:
      config: of the run; of other weights its groups "model", "objective" and "data".
      card: where the model is from, for the records of what is made with it.
      preprocessing: what `prepare` does, and how pixels are normalised.
      size: side of an image, pixels.
      length: tokens of a text, start and end included.
      batch: items that are encoded at once.
    """

    def __init__(
        self,
        model: TwoTowers,
        variables: Mapping[str, Any],
        config: ml_collections.ConfigDict,
        card: Mapping[str, Any],
        *,
        batch: int,
        threads: int = 0,
    ) -> None:
        self.config, self.preprocessing = config, Preprocessing.from_config(config)
        self.card = dict(card) | {
            "objective": config.objective.name, "size": config.model.img.image_size,
            "preprocessing": self.preprocessing.describe(), "tokenizer": config.data.tokenizer,
        }  # fmt: skip
        self.size, self.length = model.img["image_size"], model.txt["context_length"]
        self.tokenizer = tokenizer.load(config.data.tokenizer)
        self._threads = threads
        self._clusters, self._projects = "s_img" in model.outputs, "z_img" in model.outputs
        self._embedding = ("z",) if self._projects else ("s",)
        self._tau = config.objective.nclip.tau
        mesh = make_mesh(_MESH)
        model, variables = _unrolled(model, variables)
        self._variables = jax.device_put(variables, replicated(mesh))
        self._encoder = Encoder(
            model,
            self.tokenizer,
            text_length=self.length,
            preprocessing=self.preprocessing,
            mesh=mesh,
            batch=batch,
            smaller=[size for size in _SMALLER if size < batch],
            tau=self._tau,
        )
        self.batch = self._encoder.batch

    def encode_image(self, images: Sequence[ImageLike] | np.ndarray) -> np.ndarray:
        """Embeddings of images.

        Args:
          images: paths (of buckets too), Pillow's images, contents of image files (bytes) or uint8 RGB arrays
            (h, w, 3), of any size; or all as one uint8 array (b, h, w, 3).

        Returns:
          fp32 (b, e), rows of unit length.

        Raises:
          UserError: an image that is missing or cannot be decoded; the message names it.
        """
        return self._embed(self._images(images, self._embedding))

    def encode_prepared(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """`encode_image` of what `prepare` gave; anything with `len` and `[]`, read once and in about that order."""
        return self._embed(self._encoder.images(self._variables, images, self._embedding))

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Embeddings (b, e) of fp32 pixels (b, size, size, 3) that are normalised by the model's mean and deviation."""
        pixels = np.asarray(pixels)
        if pixels.dtype != np.float32 or pixels.shape[1:] != (self.size, self.size, 3):
            raise UserError(
                f"pixels are {pixels.dtype} of shape {pixels.shape}; this model takes float32 (b, {self.size}, "
                f"{self.size}, 3) that are normalised. encode_image takes all else."
            )
        return self._embed(self._encoder.images(self._variables, pixels, self._embedding))

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings (b, e) of texts, cut to the model's length."""
        return self._embed(self._texts(texts, self._embedding))

    def encode_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Embeddings of token ids, as `model.tokenizer(texts, model.length)` makes them.

        Args:
          tokens: ids (b, length) of any integer dtype.

        Returns:
          fp32 (b, e), rows of unit length.

        Raises:
          UserError: another dtype or shape, or an id outside of the tokenizer's vocabulary.
        """
        tokens, vocab = np.asarray(tokens), self.tokenizer.vocab_size
        if tokens.dtype.kind not in "iu" or tokens.ndim != 2 or tokens.shape[1] != self.length:
            raise UserError(
                f"tokens are {tokens.dtype} of shape {tokens.shape}; expected integers of shape (b, {self.length}). "
                "Use encode_text for strings."
            )
        if (outside := (tokens < 0) | (tokens >= vocab)).any():
            row, column = np.argwhere(outside)[0]
            raise UserError(
                f"token {tokens[row, column]} in row {row}, column {column} is outside of the model's vocabulary, "
                f"0 to {vocab - 1}; use the model's own tokenizer, model.tokenizer(texts, {self.length})."
            )
        return self._embed(self._encoder.tokens(self._variables, tokens.astype(np.int32), self._embedding))

    def zero_shot(
        self,
        images: Sequence[ImageLike] | np.ndarray,
        class_names: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
    ) -> ZeroShotResult:
        """Which of the classes each image shows.

        A class is the mean over its prompts, each normalised, normalised again. With a projection the score is the
        cosine and the probabilities are its softmax at the learned scale, for SigLIP's models too; nCLIP alone is
        scored by the negative cross-entropy of clusters.

        Args:
          images: as in `encode_image`.
          class_names: at least one.
          templates: prompts, with {} for the class.

        Raises:
          UserError: as in `encode_image`; no class, a template without {}.
        """
        if isinstance(class_names, str) or isinstance(templates, str):
            raise UserError("class_names and templates are lists of strings; put a single one in brackets.")
        if not class_names or not templates:
            raise UserError("zero_shot needs at least one class name and one template.")
        if wrong := [template for template in templates if "{}" not in template]:
            raise UserError(f"template {wrong[0]!r} has no {{}}, where the class name goes.")
        # str.format would stumble over braces in a name.
        prompts = [template.replace("{}", name) for name in class_names for template in templates]
        kinds = ("z",) if self._projects else ("s",)
        img, txt = self._images(images, kinds), self._texts(prompts, kinds)
        found = class_scores(img, txt, [len(templates)] * len(class_names), self._tau)
        scores = found["" if self._projects else "cross_entropy"].astype(np.float32)
        scale = float(jnp.exp(self._variables["params"]["log_scale"])) if self._projects else 1.0
        labels = [class_names[i] for i in scores.argmax(axis=1)]
        return ZeroShotResult(labels, distributions(scale * scores), scores)

    def clusters(
        self,
        images: Sequence[ImageLike] | np.ndarray | None = None,
        *,
        texts: Sequence[str] | None = None,
        top: int = 5,
    ) -> Clusters:
        """The likeliest clusters of images or of texts, for models of nCLIP and xCLIP.

        Raises:
          UserError: a model without cluster heads; both images and texts, or neither; as in `encode_image`.
        """
        if not self._clusters:
            name = self.config.objective.name
            raise UserError(f"a model of objective {name!r} has no cluster heads; those of 'nclip' and 'xclip' have.")
        if (images is None) == (texts is None):
            raise UserError("clusters takes either images or texts=[...].")
        found = self._images(images, ("s",)) if texts is None else self._texts(texts, ("s",))
        p = distributions(found["s"], self._tau)
        if not 1 <= top <= p.shape[1]:
            raise UserError(f"top={top} must be from 1 to the model's {p.shape[1]} clusters.")
        ids = np.argsort(-p, axis=1, kind="stable")[:, :top]
        return Clusters(ids, np.take_along_axis(p, ids, axis=1))

    def prepare(self, image: ImageLike) -> np.ndarray:
        """An image of `encode_image` -> uint8 (size, size, 3).

        Raises:
          BadSample: it cannot be read or decoded.
        """
        if isinstance(image, str | os.PathLike):
            image = read(image)
        elif isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise BadSample("array is no image", f"{image.dtype} of shape {image.shape}; uint8 (h, w, 3) is one")
        elif not isinstance(image, bytes | Image.Image):
            raise BadSample("not an image", f"a {type(image).__name__}")
        return self.preprocessing(image)

    def _images(self, images: Sequence[ImageLike] | np.ndarray, kinds: Sequence[str]) -> Features:
        if isinstance(images, str | bytes | os.PathLike | Image.Image):
            raise UserError("images is a single one; pass a list of them.")

        def make(i: int) -> np.ndarray:
            try:
                return self.prepare(images[i])
            except BadSample as error:
                name = f", {os.fspath(images[i])!r}" if isinstance(images[i], str | os.PathLike) else ""
                raise UserError(f"image {i}{name}: {error}.") from error

        window = 2 * self.batch
        with ThreadPrefetcher(make, len(images), threads=self._threads, window=window) as prepared:
            return self._encoder.images(self._variables, prepared, kinds)

    def _texts(self, texts: Sequence[str], kinds: Sequence[str]) -> Features:
        if isinstance(texts, str):
            raise UserError(f"texts is the string {texts[:40]!r}; pass a list of strings.")
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise UserError(f"texts holds {wrong[0]!r:.40}, a {type(wrong[0]).__name__}; pass strings.")
        return self._encoder.texts(self._variables, texts, kinds)

    def _embed(self, found: Features) -> np.ndarray:
        return embedding(found, self._tau)

    def fingerprint(self) -> str:
        """A number of all weights, for telling whether two models are the same."""
        number = 0
        for leaf in jax.tree.leaves(self._variables):
            number = zlib.crc32(np.ascontiguousarray(leaf), number)
        return f"{number:08x}"


def read(path: str | os.PathLike) -> bytes:
    """Content of a file, of a bucket too. Raises `BadSample`."""
    name = os.fspath(path)
    try:
        data = storage.read(name, MAX_BYTES["image"])
    except FileNotFoundError as error:
        raise BadSample("file does not exist") from error
    except OSError as error:
        raise BadSample("file cannot be read", str(error)) from error
    if not data:
        raise BadSample("file is empty")
    return data


def load(path: str | os.PathLike, *, step: int | None = None, batch: int = 32, threads: int = 0) -> Model:
    """The model at `path`, on all devices of this machine.

    On a CPU, which has no fast bfloat16, it computes in float32.

    Args:
      path: a run's folder, or weights that `xclip_jax.interop.read` reads.
      step: which of a run's checkpoints; the newest by default.
      batch: items that are encoded at once, rounded up to a multiple of the devices; 32 suits the caches of a CPU,
        accelerators take more.
      threads: that read and decode images; 0 for one a core.

    Raises:
      UserError: nothing there that can be read; `batch` below 1 or `threads` below 0.
    """
    check_count("batch", batch, 1)  # before weights are read, which may take a while
    check_count("threads", threads, 0)
    where = os.fspath(path)
    config, parts, variables, at = weights.load(where, step)
    return Model(parts.model, variables, config, {"checkpoint": where, "step": at}, batch=batch, threads=threads)


def _unrolled(model: TwoTowers, variables: Mapping[str, Any]) -> tuple[TwoTowers, Mapping[str, Any]]:
    """On a CPU: in float32, without scans over blocks, which cost a quarter of the time."""
    if jax.default_backend() != "cpu":
        return model, variables
    params = dict(variables["params"])
    towers: dict[str, Mapping[str, Any]] = {}
    for name in ("img", "txt"):
        towers[name] = tower = getattr(model, name)
        if tower.get("scan"):
            towers[name] = {**tower, "scan": False}
            blocks = unstack_blocks(params[name]["transformer"], tower.get("depth", 12))
            params[name] = {**params[name], "transformer": blocks}
    return model.clone(dtype=jnp.float32, **towers), {**variables, "params": params}
