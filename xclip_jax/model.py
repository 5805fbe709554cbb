"""Use a trained model: embeddings, zero-shot labels and clusters of images and texts.

    model = xclip_jax.load("runs/mine")
    z_img, z_txt = model.encode_image(["a.jpg", "b.png"]), model.encode_text(["a fox", "a hen"])
    result = model.zero_shot(["a.jpg"], ["fox", "hen"])

Results are NumPy arrays. Items are encoded on all devices in batches of a few fixed sizes, each compiled once. Images
are resized, cropped and normalised by the model's config.
"""

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from xclip_jax.core import imports, storage
from xclip_jax.core.errors import BadSample, UserError, check_count
from xclip_jax.data.base import MAX_BYTES
from xclip_jax.data.records import ThreadPrefetcher
from xclip_jax.evaluators.encoder import Encoder, Features, Rows
from xclip_jax.evaluators.zeroshot import class_scores
from xclip_jax.interop import hub
from xclip_jax.models.two_towers import TwoTowers, Variables
from xclip_jax.objectives.similarity import cluster_similarity, features, softmax, unit
from xclip_jax.parallel.mesh import make_mesh, replicated
from xclip_jax.train import weights
from xclip_jax.train.build import Experiment, make_model
from xclip_jax.train.learner import ImageLike

__all__ = ["Clusters", "Model", "ZeroShotResult", "load"]

TEMPLATES = ("a photo of a {}.",)
_SMALLER = (1, 8)  # batch sizes for few items


class ZeroShotResult(NamedTuple):
    """Zero-shot classification of b images among n classes.

    Attributes:
      labels: most probable class of each image.
      probabilities: fp32 (b, n), rows sum to 1.
      scores: fp32 (b, n), from which probabilities are computed: cosines, negative cross-entropies in nats, or the sum
        of both, each over its standard deviation.
    """

    labels: list[str]
    probabilities: np.ndarray
    scores: np.ndarray


class Clusters(NamedTuple):
    """Ids and probabilities (b, top) of the most probable clusters of b items, in descending order."""

    ids: np.ndarray
    probabilities: np.ndarray


class Model:
    """Both towers with their weights, tokenizer and preprocessing; `load` returns one.

    Embeddings come from the model's default similarity, see `Objective.similarities`: projections (b, e), or
    distributions over clusters (b, k), scaled to unit length, so that their products are the cosines in evaluations.

    Attributes:
      config: config of the run or the weights.
      card: origin of the model, for records of its results.
      preprocessing: resizing, cropping and normalisation of images.
      size: side of an image, pixels.
      length: tokens per text, including start and end.
      batch: number of items encoded at once.
      dims: number of kept dimensions of embeddings, 0 for all.
      similarities: the model's similarities, its default first; empty for a pure classifier.
    """

    def __init__(
        self, experiment: Experiment, variables: Variables, card: Mapping[str, Any], *, batch: int, dims: int = 0
    ) -> None:
        self.config = experiment.config
        self.preprocessing = experiment.preprocessing
        self.tokenizer = experiment.tokenizer
        self.size = experiment.image_size
        self.length = experiment.context_length
        self.card = dict(card) | {
            "objective": self.config.objective.name, "size": self.size,
            "preprocessing": self.preprocessing.describe(), "tokenizer": self.config.data.tokenizer,
        } | ({"dims": dims} if dims else {})  # fmt: skip
        self._experiment = experiment
        self.similarities = experiment.objective.similarities
        mesh = make_mesh({"data": -1, "fsdp": 1, "model": 1})
        self._model = experiment.model
        if jax.default_backend() == "cpu":
            self._model, variables = unrolled(experiment, variables)
        self._variables = jax.device_put(variables, replicated(mesh))
        sizes = [batch, *(size for size in _SMALLER if size < batch)]
        self._encoder = Encoder(self._model, self.tokenizer, self.preprocessing, mesh, self.similarities, batches=sizes)
        self.batch = self._encoder.batch
        self.dims = dims
        if dims and dims != self.encode_text([]).shape[1]:
            raise UserError(f"dims is {dims}; expected a number from 1 to the size of this model's embeddings.")

    def encode_image(self, images: Sequence[ImageLike] | np.ndarray) -> np.ndarray:
        """Return embeddings of images, fp32 (b, e).

        Args:
          images: paths (also in buckets), Pillow images, contents of image files (bytes) or uint8 RGB arrays (h, w, 3),
            of any size; or one uint8 array (b, h, w, 3).

        Raises:
          UserError: a missing or undecodable image, named in the message.

        Example:
          >>> model.encode_image(["fox.png", "hen.png"]).shape
          (2, 16)
        """
        return self._embed(self._images, images)

    def encode_prepared(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return embeddings of images from `prepare`; the sequence is read once, roughly in order.

        Example:
          >>> model.encode_prepared([model.prepare("fox.png")]).shape
          (1, 16)
        """
        return self._embed(self._prepared, _by_position(images))

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Return embeddings (b, e) of fp32 pixels (b, size, size, 3), normalised by the model's mean and deviation.

        Example:
          >>> model.encode_pixels(np.zeros((3, model.size, model.size, 3), np.float32)).shape
          (3, 16)
        """
        pixels = np.asarray(pixels)
        if pixels.dtype != np.float32 or pixels.shape[1:] != (self.size, self.size, 3):
            raise UserError(
                f"pixels are {pixels.dtype} of shape {pixels.shape}; this model takes normalised float32 "
                f"(b, {self.size}, {self.size}, 3); use encode_image for other inputs."
            )
        return self._embed(self._prepared, pixels)

    def encode_text(self, texts: Iterable[str]) -> np.ndarray:
        """Return embeddings (b, e) of texts, which are cut to the model's length.

        Example:
          >>> z_txt = model.encode_text(["a fox", "a hen"])
          >>> similarities = model.encode_image(["fox.png"]) @ z_txt.T  # cosines (1, 2)
        """
        return self._embed(self._texts, texts)

    def encode_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Return embeddings (b, e) of token ids (b, length) from `model.tokenizer(texts, model.length)`.

        Raises:
          UserError: not integers of this shape, an id outside the vocabulary, or a row without the end token.

        Example:
          >>> model.encode_tokens(model.tokenizer(["a fox"], model.length)).shape
          (1, 16)
        """
        tokens = np.asarray(tokens)
        known = self.tokenizer
        fits = tokens.dtype.kind in "iu" and tokens.ndim == 2 and tokens.shape[1] == self.length
        fits = fits and not ((tokens < 0) | (tokens >= known.vocab_size)).any()
        if fits and getattr(self._model.txt, "pool", "") == "eot":
            fits = (tokens == known.eot_id).any(axis=1).all()
        if not fits:
            raise UserError(
                f"tokens are {tokens.dtype} of shape {tokens.shape}; expected integers (b, {self.length}) from 0 to "
                f"{known.vocab_size - 1}, with the end {known.eot_id} in each row, from model.tokenizer(texts, "
                f"{self.length}). Use encode_text for strings."
            )
        return self._embed(functools.partial(self._encoder.tokens, self._variables), tokens.astype(np.int32))

    def zero_shot(
        self,
        images: Sequence[ImageLike] | np.ndarray,
        class_names: Iterable[str],
        templates: Iterable[str] = TEMPLATES,
        *,
        by: str = "",
    ) -> ZeroShotResult:
        """Classify images by texts of classes, with the model's default similarity unless `by` names another score.

        With a projection a class is the normalised mean of its normalised prompts, the score is the cosine, and the
        probabilities are its softmax at the learned scale, also after training with the sigmoid loss. Without a
        projection the score is the negative cross-entropy of distributions over clusters.

        Args:
          images: see `encode_image`.
          class_names: at least one.
          templates: prompts, with {} for the class.
          by: name of another score in evaluations; the probabilities are its softmax. xCLIP has "cosine" and (negative)
            "cross_entropy" of clusters, and "both", the sum of the cosine of embeddings and the cross-entropy, each
            over its standard deviation among these images and classes; nCLIP has the first two.

        Raises:
          UserError: see `encode_image`; no class, a template without {}, an unknown score.

        Example:
          >>> found = model.zero_shot(["fox.png", "hen.png"], ["fox", "hen", "owl"])
          >>> len(found.labels), found.probabilities.shape
          (2, (2, 3))
        """
        class_names = _strings("class_names", class_names)
        templates = _strings("templates", templates)
        if not class_names or not templates or not all("{}" in template for template in templates):
            raise UserError(
                f"class_names and templates must be lists of at least one string, templates with {{}} for the class "
                f"name; templates are {templates!r:.80}."
            )
        # str.format would fail on braces in a name.
        prompts = [template.replace("{}", name) for name in class_names for template in templates]
        used = self.similarities if by else self.similarities[:1]
        img = self._images(images, features(used))
        txt = self._texts(prompts, features(used))
        first = used[0]
        if self.dims and not first.is_distribution:
            img, txt = ({**x, first.feature: unit(x[first.feature][:, : self.dims])} for x in (img, txt))
        by_score = class_scores(used, img, txt, [len(templates)] * len(class_names))
        if by not in by_score:
            known = ", ".join(repr(name) for name in by_score if name) or "only its default"
            raise UserError(f"by={by!r} is not a score of this model, which has {known}; omit it for the default.")
        scores = by_score[by or used[0].logits].astype(np.float32)
        logits = scores if by else self._encoder.logits_of(by_score, self._variables)
        return ZeroShotResult([class_names[i] for i in scores.argmax(axis=1)], softmax(logits), scores)

    @property
    def has_clusters(self) -> bool:
        """Whether the model has distributions over clusters, for `clusters`."""
        return cluster_similarity(self.similarities) is not None

    def clusters(
        self,
        images: Sequence[ImageLike] | np.ndarray | None = None,
        *,
        texts: Iterable[str] | None = None,
        top: int = 5,
    ) -> Clusters:
        """Return the `top` (or all) most probable clusters of images or texts.

        Raises:
          UserError: a model without cluster heads; both images and texts, or neither; see `encode_image`.

        Example:
          >>> model.clusters(["fox.png"], top=3).ids.shape
          (1, 3)
        """
        check_count("top", top, 1)
        similarity = cluster_similarity(self.similarities)
        if similarity is None or (images is None) == (texts is None):
            raise UserError("clusters takes either images or texts=[...], and a model trained by nclip or xclip.")
        encode: Any = self._images if texts is None else self._texts
        outputs = encode(images if texts is None else texts, [similarity.feature])
        p = similarity.rows(outputs[similarity.feature])
        ids = np.argsort(-p, axis=1, kind="stable")[:, :top]
        return Clusters(ids, np.take_along_axis(p, ids, axis=1))

    def prepare(self, image: ImageLike) -> np.ndarray:
        """Resize and crop an image, see `encode_image`, to uint8 (size, size, 3); raise `BadSample` if unreadable.

        Example:
          >>> model.prepare("fox.png").shape
          (16, 16, 3)
        """
        if isinstance(image, str | os.PathLike):
            try:
                image = storage.read(os.path.expanduser(image), MAX_BYTES["image"])
            except (OSError, ValueError) as error:  # a ValueError for a zero byte, or a URL with an unknown scheme
                raise storage.unreadable(error, "file does not exist") from error
        if not isinstance(image, bytes | np.ndarray | Image.Image):
            raise BadSample("not an image", f"type {type(image).__name__}")
        return self.preprocessing(image)

    def _images(self, images: Sequence[ImageLike] | np.ndarray, keys: Sequence[str]) -> Features:
        if isinstance(images, str | bytes | os.PathLike | Image.Image):
            raise UserError("images is a single image; pass a list.")
        images = _by_position(images)
        locks: dict[int, threading.Lock] = {}

        def make(i: int) -> np.ndarray:
            image = images[i]
            is_shared = isinstance(image, Image.Image)  # a list may repeat one, which only one thread may decode
            try:
                with locks.setdefault(id(image), threading.Lock()) if is_shared else contextlib.nullcontext():
                    return self.prepare(image)
            except BadSample as error:
                name = f", {os.fspath(image)!r}" if isinstance(image, str | os.PathLike) else ""
                raise UserError(f"image {i}{name}: {error}.") from None

        with ThreadPrefetcher(make, len(images), window=2 * self.batch) as prepared:
            return self._prepared(prepared, keys)

    def _prepared(self, images: Rows, keys: Sequence[str]) -> Features:
        return self._encoder.images(self._variables, images, keys)

    def _texts(self, texts: Iterable[str], keys: Sequence[str]) -> Features:
        return self._encoder.texts(self._variables, _strings("texts", texts), keys)

    def _embed(self, encode: Callable[[Any, Sequence[str]], Features], items: Any) -> np.ndarray:
        (output,) = encode(items, features(self.similarities[:1])).values()
        rows = self.similarities[0].embedding(output)
        return unit(rows[:, : self.dims]) if self.dims else rows

    def nnx(self) -> Any:
        """Return towers and heads as a Flax NNX module, through Flax's bridge, for your own training code.

        `module(pixels, tokens)` returns the outputs of `TwoTowers`, such as "z_img" and "z_txt" (b, e) of unit length
        and "scale"; `module.encode_image(pixels)` and `module.encode_text(tokens)` return features (b, d). Inputs are
        fp32 pixels (b, size, size, 3), see `encode_pixels`, and int32 tokens (b, length). Steps of an `nnx.Optimizer`
        change the module's weights but not this model's.

        Example:
          >>> module = model.nnx()
          >>> pixels = np.zeros((1, model.size, model.size, 3), np.float32)
          >>> module(pixels, model.tokenizer(["a fox"], model.length))["z_img"].shape
          (1, 16)
        """
        from flax import nnx  # takes a second to import

        module = nnx.bridge.ToNNX(self._model)
        for name, value in nnx.bridge.variables.linen_vars_to_nnx_attrs(self._variables).items():
            setattr(module, name, nnx.data(value))
        return module

    @property
    def num_parameters(self) -> int:
        """Number of parameters, heads included."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._variables["params"]))

    def fingerprint(self) -> str:
        """Return a checksum of weights, tokenizer and preprocessing, see `train.weights.fingerprint`.

        Example:
          >>> model.fingerprint() == xclip_jax.load(path).fingerprint()
          True
        """
        return weights.fingerprint(self._experiment, self._variables)


def load(
    path: str | os.PathLike, *, step: int | None = None, batch: int = 32, dims: int = 0, trust: bool = False
) -> Model:
    """Load a model on all devices of this machine; on a CPU it computes in float32.

    Args:
      path: a run's folder, or weights for `xclip_jax.interop.read`, such as "hf:ORG/NAME".
      step: step of a run's checkpoint; the newest by default.
      batch: number of items encoded at once, rounded up to a multiple of the devices; 32 suits the caches of a CPU,
        accelerators work better with more.
      dims: number of dimensions of embeddings to keep, the first ones, normalised again; 0 for all.
      trust: whether to import, and so to run, modules of other packages named in the config.

    Raises:
      UserError: `path` is neither a run nor weights; `batch` below 1; more `dims` than there are; without `trust`, a
        config with a class from a package that the caller has not imported.

    Example:
      >>> import xclip_jax
      >>> learner = xclip_jax.create("Ti/12", objective="clip", steps=1, batch=16, image_size=24)
      >>> learner.save("model", learner.init())
      >>> model = xclip_jax.load("model")
      >>> model.encode_text(["a fox", "a hen"]).shape
      (2, 128)
    """
    check_count("batch", batch, 1)  # before weights are read, which may take a while
    check_count("dims", dims, 0)
    place = hub.locate(os.fspath(path))
    with imports.trusting(trust):
        loaded = weights.load(place, step)
    card = {"checkpoint": place.name, "step": loaded.step} | ({"commit": place.commit} if place.commit else {})
    return Model(loaded.experiment, loaded.variables, card, batch=batch, dims=dims)


def _by_position(items: Any) -> Any:
    """Return a sequence indexed by position; a pandas Series is indexed by labels."""
    return items if isinstance(items, Sequence | np.ndarray) else list(items)


def _strings(name: str, texts: Any) -> list[str]:
    """Return the strings of an iterable; `UserError` for a single string or other items."""
    items = list(texts) if isinstance(texts, Iterable) and not isinstance(texts, str) else [None]
    if not all(isinstance(item, str) for item in items):
        raise UserError(f"{name} is {texts!r:.40}; pass a list of strings.")
    return items


def unrolled(experiment: Experiment, variables: Variables) -> tuple[TwoTowers, Variables]:
    """Return the model in float32 without scans over blocks, which on a CPU cost a quarter more."""
    config = dataclasses.replace(experiment.config.model, dtype="float32")
    model = make_model(config, experiment.objective, experiment.tokenizer)
    towers = {name: getattr(model, name).unrolled() for name in model.towers}
    params = {name: tower.convert(variables["params"][name])[0] for name, tower in towers.items()}
    return model.clone(**towers), {**variables, "params": {**variables["params"], **params}}
