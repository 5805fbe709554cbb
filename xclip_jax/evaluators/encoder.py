"""The encoder shared by all evaluators: images and texts to features, in batches of a few fixed shapes."""

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xclip_jax.core import console
from xclip_jax.core.errors import BadSample, UserError, describe
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.records import ThreadPrefetcher, thread_pool
from xclip_jax.data.transforms import normalize
from xclip_jax.models.two_towers import TwoTowers, Variables
from xclip_jax.objectives.similarity import Similarity
from xclip_jax.parallel.mesh import batch_sharding, batch_shards, replicated

Features = dict[str, np.ndarray]
Rows = Sequence[np.ndarray] | np.ndarray
Encode = Callable[..., dict[str, jax.Array]]

# Texts of a causal tower are cut to the longest, a multiple of _LENGTHS tokens, if there are _BATCHES batches or more.
_LENGTHS, _BATCHES = 16, 4
MAX_UNREADABLE = 0.05  # share of a set's images; above it the result would describe the set, not the model


class TooManyUnreadable(UserError):
    """More images of a set cannot be read than `MAX_UNREADABLE` allows; all processes of a run raise it together."""


class Encoder:
    """Encode images and texts in batches of one or a few fixed shapes, each compiled once per modality.

    The last batch is padded with zeros and cut after encoding, so every item counts exactly once. Each process loads
    only the rows of the batch that its devices hold; every process gets the features of all items.

    Attributes:
      batch: the largest global batch.
      sizes: all batches, each rounded up to a multiple of the mesh's batch shards, ascending.
      similarities: comparisons of images with texts, the model's own first; empty for a fine-tuned model.
      classes: classes of a fine-tuned model's classifier, in its order; None if unknown.
      grid: patches along a side of an image, 0 if the model has no patch features.
      unreadable: {index: reason} of images that `images` and `patches` could not read; "" if another process tried.
    """

    def __init__(
        self,
        model: TwoTowers,
        tokenizer: Callable[[Sequence[str], int], np.ndarray],
        preprocessing: Preprocessing,
        mesh: Mesh,
        similarities: Sequence[Similarity] = (),
        *,
        batches: Sequence[int] = (256,),
        classes: Sequence[str] | None = None,
    ) -> None:
        """Compile nothing yet; `batches` are rounded up to `sizes`, other arguments are as the attributes."""
        if min(batches) < 1:
            raise UserError(f"expected evaluation batches of 1 item or more (eval.batch); got {min(batches)}.")
        shards = batch_shards(mesh)
        self.sizes = sorted({math.ceil(size / shards) * shards for size in batches})
        self.batch = self.sizes[-1]
        self.similarities = tuple(similarities)
        self._default = ("features", *(similarity.feature for similarity in similarities))
        self.preprocessing, self.image_size = preprocessing, preprocessing.size
        self.classes = None if classes is None else tuple(classes)
        self.grid = model.img.grid if "img" in model.towers else 0
        self.unreadable = dict[int, str]()
        self._eot_id = model.eot_id if "txt" in model.towers and model.txt.cuttable else None
        self._tokenizer = tokenizer
        self._text_length = model.txt.context_length
        self._sharding = batch_sharding(mesh)

        def encode(variables: Variables, x: jax.Array, modality: str) -> dict[str, jax.Array]:
            if modality not in model.towers:
                raise UserError(f"the model was fine-tuned and has no {modality} tower; evaluate finetuned/SET.")
            h: Any = model.apply(variables, x, method="encode_image" if modality == "img" else "encode_text")
            heads: Any = model.apply(variables, *((h, None) if modality == "img" else (None, h)), method="project")
            outputs = {"features": h} | {s.feature: heads[f"{s.output}_{modality}"] for s in self.similarities}
            if "logits" in heads:
                outputs["class_logits"] = heads["logits"]
            return {key: value.astype(jnp.float32) for key, value in outputs.items()}

        def to_pixels(images: jax.Array) -> jax.Array:
            return normalize(images, preprocessing.mean, preprocessing.std) if images.dtype == jnp.uint8 else images

        def encode_images(variables: Variables, images: jax.Array, valid: jax.Array) -> dict[str, jax.Array]:
            features = encode(variables, to_pixels(images), "img")
            # Tells every process which rows the others could not read.
            return {key: jnp.where(valid[:, None], x, jnp.nan) for key, x in features.items()} | {"valid": valid}

        def encode_patches(variables: Variables, images: jax.Array, valid: jax.Array, projected: bool) -> dict:
            h = model.img.patch_features(variables["params"]["img"], to_pixels(images), model.dtype)
            if projected:
                heads: Any = model.apply(variables, h.reshape(-1, h.shape[-1]), None, method="project")
                h = heads[f"{self.similarities[0].output}_img"].reshape(*h.shape[:-1], -1)
            return {"patches": jnp.where(valid[:, None, None, None], h.astype(jnp.float32), jnp.nan), "valid": valid}

        def encode_texts(variables: Variables, tokens: jax.Array, _: jax.Array) -> dict[str, jax.Array]:
            return encode(variables, tokens, "txt")

        def scalars(variables: Variables) -> Any:
            return model.apply(variables, None, None, method="project")

        self._scalars: Encode = jax.jit(scalars, out_shardings=replicated(mesh))
        self._encode_images: Encode = jax.jit(encode_images, out_shardings=replicated(mesh))
        self._encode_patches: Encode = jax.jit(encode_patches, static_argnums=3, out_shardings=replicated(mesh))
        self._encode_texts: Encode = jax.jit(encode_texts, out_shardings=replicated(mesh))

    def images(self, variables: Variables, images: Rows, features: Sequence[str] | None = None) -> Features:
        """Encode `images`, a sequence of uint8 (size, size, 3).

        Args:
          variables: arguments of `TwoTowers.apply`.
          images: n images, decoded on access if need be; or one fp32 array (n, size, size, 3) of normalised pixels.
          features: names of the features to fetch; by default "features" and the inputs of the similarities.

        Returns:
          fp32 arrays of the features that the model has: "features" (n, d), pooled; inputs of similarities, such as
          "embedding" (n, e) and "cluster_logits" (n, k); "class_logits" (n, classes) of a classifier. The rows of an
          image that raised `BadSample` are NaN.
        """
        features_of = self._run(self._encode_images, variables, images, self._form(images), features)
        self._count_unreadable(features_of.pop("valid"))
        return features_of

    def patches(
        self, variables: Variables, images: Rows, first: int = 0, *, projected: bool = False
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Encode the patches of images batch by batch: the features of a whole set may be too large to keep.

        Yields the index of a batch's first image, and fp32 (m, grid, grid, d) of its m images, NaN where unreadable.
        `first` is the offset of the images' indices in `unreadable`. If `projected`, the features are outputs of the
        head that the model's own similarity reads, which was trained on pooled features.
        """

        def encode(*arguments: Any) -> dict[str, jax.Array]:
            return self._encode_patches(*arguments, projected)

        valid = []
        form = self._form(images)
        for start, out in self._batches(encode, variables, images, form, ("patches", "valid")):
            valid.append(out["valid"])
            yield start, out["patches"]
        self._count_unreadable(np.concatenate(valid), first)

    def _form(self, images: Rows) -> jax.ShapeDtypeStruct:
        """Return shape and dtype of one image."""
        dtype = np.float32 if getattr(images, "dtype", None) == np.float32 else np.uint8
        return jax.ShapeDtypeStruct((self.image_size, self.image_size, 3), dtype)

    def _count_unreadable(self, valid: np.ndarray, offset: int = 0) -> None:
        """Record the unreadable images of the last pass."""
        self.unreadable |= {i + offset: self._reasons.get(i, "") for i in np.flatnonzero(~valid).tolist()}

    def _check_readable(self, unreadable: Sequence[int], tried: int, n: int) -> None:
        """Raise `TooManyUnreadable` if more than `MAX_UNREADABLE` of `n` images are unreadable among those `tried`.

        Otherwise an unavailable store would keep all devices waiting for each of its images.
        """
        if len(unreadable) > MAX_UNREADABLE * n:
            first = self._reasons.get(unreadable[0], f"image {unreadable[0]}")
            read = f"{n}" if tried == n else f"the first {tried} of {n}"
            raise TooManyUnreadable(
                f"{len(unreadable)} of {read} images cannot be read, more than {MAX_UNREADABLE:.0%}; "
                f"the first is: {first}; see xclip-jax check"
            )

    def texts(self, variables: Variables, texts: Sequence[str], features: Sequence[str] | None = None) -> Features:
        """Encode `texts`, see `images`. Equal texts are encoded once, so their features are equal."""
        rows = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        tokens: Rows = self._tokenizer(list(rows), self._text_length) if rows else []
        features_of = self.tokens(variables, tokens, features)
        if len(rows) == len(texts):
            return features_of
        return {key: value[[rows[text] for text in texts]] for key, value in features_of.items()}

    def tokens(self, variables: Variables, tokens: Rows, features: Sequence[str] | None = None) -> Features:
        """Encode rows of tokens, int32 (n, text_length), see `images`."""
        length = self._length(tokens)
        rows = np.asarray(tokens)[:, :length] if length < self._text_length else tokens
        return self._run(self._encode_texts, variables, rows, jax.ShapeDtypeStruct((length,), np.int32), features)

    def _length(self, tokens: Rows) -> int:
        """Return the length of the longest text if there are enough batches to compile for it, else the context."""
        if self._eot_id is None or len(tokens) < _BATCHES * self.batch:
            return self._text_length
        longest = int((np.asarray(tokens) == self._eot_id).argmax(axis=1).max()) + 1
        return min(math.ceil(longest / _LENGTHS) * _LENGTHS, self._text_length)

    def logits_of(self, scores: Mapping[str, np.ndarray], variables: Variables) -> np.ndarray:
        """Return the logits (n, classes) of the model's own similarity among the `scores` of `zeroshot.compare`."""
        own = self.similarities[0]
        scale = 1.0 if own.scale is None else float(self._scalars(variables)[own.scale])
        return scale * scores[own.logits]

    def _run(
        self, encode: Encode, variables: Variables, items: Rows, form: jax.ShapeDtypeStruct, names: Sequence[str] | None
    ) -> Features:
        """Return the features of all items."""
        results: Features = {}
        keys = {"valid", *(self._default if names is None else names)}
        for start, out in self._batches(encode, variables, items, form, keys):
            for key, value in out.items():
                if key not in results:  # whole from the beginning: joined batches would need the memory twice
                    results[key] = np.empty((len(items), *value.shape[1:]), value.dtype)
                results[key][start : start + len(value)] = value
        return results

    def _batches(
        self, encode: Encode, variables: Variables, items: Rows, form: jax.ShapeDtypeStruct, keys: Collection[str]
    ) -> Iterator[tuple[int, Features]]:
        """Yield the first index and the features `keys` of each batch, without padding; one empty batch of no items."""

        self._reasons: dict[int, str] = {}
        unreadable: list[int] = []

        def fetch(out: dict[str, jax.Array], start: int) -> tuple[int, Features]:
            fetched = {key: np.asarray(value)[: len(items) - start] for key, value in out.items()}
            valid = fetched.get("valid", np.ones(0, bool))
            unreadable.extend((start + np.flatnonzero(~valid)).tolist())
            self._check_readable(unreadable, start + len(valid), len(items))
            return start, fetched

        pending: tuple[dict[str, jax.Array], int] = {}, 0
        start = 0
        with _reading(items) as each:
            while start < max(len(items), 1):
                console.report_progress()
                size = self._size(len(items) - start)
                out = encode(variables, *self._place(items, each, start, size, form))
                # One batch behind: the device works while the host fetches and loads.
                if pending[0]:
                    yield fetch(*pending)
                pending = {key: x for key, x in out.items() if key in keys}, start
                start += size
            yield fetch(*pending)

    def _size(self, left: int) -> int:
        """Return the largest batch that `left` items fill at least half, or the smallest batch."""
        return next((size for size in reversed(self.sizes) if left > size // 2), self.sizes[0])

    def _place(
        self, items: Rows, each: Callable[..., Iterable], start: int, size: int, form: jax.ShapeDtypeStruct
    ) -> tuple[jax.Array, jax.Array]:
        """Return the global batch of `size` items from `start`, padded with zeros, and bool (size,) of readable items.

        Each process loads its own rows, by `each`, see `_reading`.
        """
        blocks: dict[int, np.ndarray] = {}

        def read(i: int) -> np.ndarray | BadSample:
            try:
                item = items[i]
            except BadSample as error:
                return error
            # NumPy would cast and broadcast a wrong one silently.
            if item.shape != form.shape or item.dtype != form.dtype:
                raise UserError(f"item {i} is {item.dtype} {item.shape}, not {form.dtype} {form.shape}.")
            return item

        def rows(index: Any) -> np.ndarray:
            first, stop, _ = index[0].indices(size)
            # Devices along the mesh's model axis share rows: load them once.
            if first not in blocks:
                block = blocks[first] = np.zeros((stop - first, *form.shape), form.dtype)
                indices = range(start + first, min(start + stop, len(items)))
                for row, (i, item) in enumerate(zip(indices, each(read, indices), strict=True)):
                    if isinstance(item, BadSample):
                        self._reasons[i] = describe(item)
                    else:
                        block[row] = item
            return blocks[first]

        def valid(index: Any) -> np.ndarray:
            return np.array([start + i not in self._reasons for i in range(*index[0].indices(size))])

        batch = jax.make_array_from_callback((size, *form.shape), self._sharding, rows)
        return batch, jax.make_array_from_callback((size,), self._sharding, valid)


@contextlib.contextmanager
def _reading(items: Rows) -> Iterator[Callable[..., Iterable]]:
    """Give a `map` for reading `items`: in one thread per core if they are decoded on access and not ahead."""
    if isinstance(items, (np.ndarray, list, tuple, ThreadPrefetcher)):
        yield map
        return
    with thread_pool() as threads:
        yield threads.imap
