"""The train step of an objective for your own loop: `xclip_jax.create` makes a `Learner`."""

import dataclasses
import functools
import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from PIL import Image

from xclip_jax import interop
from xclip_jax.config import recipes, schema
from xclip_jax.core import fields, storage
from xclip_jax.core.errors import UserError, check_choice
from xclip_jax.data.base import MAX_BYTES
from xclip_jax.objectives import OBJECTIVES
from xclip_jax.parallel.mesh import replicated
from xclip_jax.train import state, weights
from xclip_jax.train.build import Experiment, build
from xclip_jax.train.state import TrainState
from xclip_jax.train.step import Metrics

__all__ = ["Learner", "create"]

ImageLike = str | os.PathLike | bytes | np.ndarray | Image.Image
_UNREAD = ("eval", "log", "checkpoint")  # groups of keys that a step does not read


@dataclasses.dataclass(frozen=True)
class Learner:
    """Towers, objective and optimizer as a pure train step, compiled for one device or a mesh.

    Attributes:
      experiment: the parts: `config`, `model` (`TwoTowers`), `objective`, `tx` (the optimizer), `mesh`, and `step`, the
        step before compilation.
    """

    experiment: Experiment

    def init(self, seed: int | None = None) -> TrainState:
        """Return the initial state on the mesh; `seed` replaces the config's, 0 by default."""
        config = self.experiment.config
        init = functools.partial(self.experiment.init, config.seed if seed is None else seed)
        initial = state.create(init, self.experiment.abstract)
        if not config.init.weights:
            return initial
        return weights.init_from_weights(weights.read_initial(config, self.experiment.abstract)[0], initial)

    def step(self, state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Metrics]:
        """Return the state after an update, and metrics; the memory of the old state is reused.

        Args:
          state: the result of `init` or of the last step.
          batch: "image", uint8 (b, size, size, 3), and "text", int32 (b, length); see `preprocess` and `tokenize`. With
            `data.negatives` also "negatives", int32 (b, negatives, length); the caption's tokens if one is missing.
            With `positives` "caption" or "image" also "text_key" or "image_key", int32 (b, 2), whose rows are equal
            for equal captions or images.

        Raises:
          UserError: arrays of other names, shapes or dtypes.
        """
        rows = max((len(x) for x in batch.values()), default=0)
        expected = {name: f"{np.dtype(dtype)} {shape}" for name, (shape, dtype) in self._transform.arrays(rows).items()}
        given = {name: f"{x.dtype} {x.shape}" for name, x in batch.items()}
        if given != expected:
            raise UserError(f"the batch has {given}; a step takes {expected}.")
        return self.experiment.compiled(state, dict(batch))

    @functools.cached_property
    def _transform(self) -> Any:
        return self.experiment.transform()

    def preprocess(self, images: Sequence[ImageLike]) -> np.ndarray:
        """Return images, resized and cropped as for evaluation, uint8 (b, size, size, 3).

        Args:
          images: paths, contents of image files, uint8 RGB arrays (h, w, 3) or Pillow images, of any size.

        Raises:
          OSError: a file that cannot be read.
          BadSample: an image that cannot be decoded.
        """
        size = self.experiment.image_size
        rows = [self.experiment.preprocessing(_content(image)) for image in images]
        return np.stack(rows) if rows else np.empty((0, size, size, 3), np.uint8)

    def transform(self, images: Sequence[ImageLike], rng: np.random.Generator) -> np.ndarray:
        """Return random crops for training (`data.crop_scale`), uint8 (b, size, size, 3); see `preprocess`."""
        size = self.experiment.image_size
        crops = np.empty((len(images), size, size, 3), np.uint8)
        for i, image in enumerate(images):
            self._transform({"image": _content(image)}, rng, {"image": crops[i : i + 1]})
        return crops

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Return token ids, int32 (b, length)."""
        return self.experiment.tokenizer(texts, self.experiment.context_length)

    def save(self, path: str | os.PathLike, state: TrainState) -> None:
        """Write a model for `xclip_jax.load`, evaluate, embed, export and serve to the folder `path`, over an old one.

        The moving average of the parameters is written if `eval.ema` is set. To resume, save the state itself.

        Raises:
          UserError: the folder has files, and no earlier model.
        """
        config = self.experiment.config
        variables = {name: x for name, x in state.variables(ema=config.eval.ema).items() if x}
        whole = jax.jit(lambda x: x, out_shardings=replicated(self.experiment.mesh))(variables)
        if jax.process_index() == 0:
            interop.write(jax.device_get(whole), schema.to_dict(config), os.fspath(path))


def create(
    size: str,
    *,
    objective: str = "xclip",
    optimizer: optax.GradientTransformation | None = None,
    devices: list[jax.Device] | None = None,
    **keys: Any,
) -> Learner:
    """Return a model with its train step, from an objective and a size, for your own loop.

    Args:
      size: preset of the towers, such as "Ti/12" or "B/16".
      objective: "clip", "siglip", "nclip" or "xclip".
      optimizer: replaces the optimizer of the config group `optim`.
      devices: devices of the mesh; by default all.
      **keys: config keys (docs/config.md): `steps` is required; others by their last part, such as `batch`, or dotted,
        `**{"optim.lr": 1e-3}`.

    Raises:
      UserError: names every unknown key and forbidden value.

    Example:
      >>> import numpy as np
      >>> import xclip_jax
      >>> learner = xclip_jax.create("Ti/12", objective="clip", steps=100, batch=16, image_size=24)
      >>> state = learner.init(seed=0)
      >>> images = np.random.default_rng(0).integers(0, 256, (16, 24, 24, 3), np.uint8)
      >>> texts = learner.tokenize([f"picture {i}" for i in range(16)])
      >>> state, metrics = learner.step(state, {"image": images, "text": texts})
      >>> int(state.step), bool(metrics["loss"] > 0)
      (1, True)
    """
    check_choice("objective", objective, OBJECTIVES)
    values = recipes.base(objective, size).to_dict()
    for name, value in keys.items():
        key = _full_key(name)
        if optimizer is not None and key.startswith("optim.") and key != "optim.microbatches":
            raise UserError(f"{key} is an option of the optimizer that optimizer= replaces; leave one of the two out.")
        *groups, last = key.split(".")
        functools.reduce(operator.getitem, groups, values)[last] = value
    return Learner(build(schema.resolve(values), devices, optimizer))


def _full_key(name: str) -> str:
    """Return the dotted config key with the last part `name`, or `name` if it is a dotted key."""
    known = schema.keys_where()
    if name in known:
        return name
    short = {key: key.rpartition(".")[2] for key in known if key.partition(".")[0] not in _UNREAD}
    matching = [key for key, last in short.items() if last == name]
    if len(matching) != 1:
        near = matching or [fields.nearest(name, (*known, *short.values()))]
        raise UserError(f"config key {name!r} names no single key; did you mean {' or '.join(map(repr, near))}?")
    return matching[0]


def _content(image: ImageLike) -> Any:
    is_path = isinstance(image, str | os.PathLike)
    return storage.read(os.path.expanduser(image), MAX_BYTES["image"]) if is_path else image
