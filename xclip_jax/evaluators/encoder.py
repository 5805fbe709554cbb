"""The encoder shared by all evaluators: images and texts to features, in batches of a few fixed shapes."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

# One text, or _BATCHES batches or more, of a causal tower are cut to the longest, rounded up to a multiple of _LENGTHS.
_LENGTHS, _BATCHES = 16, 4
MAX_UNREADABLE = 0.05  # fraction of a set's images; above it the result would describe the set, not the model


class TooManyUnreadable(UserError):
    """More than `MAX_UNREADABLE` of a set's images cannot be read; all processes raise it together."""


def _limit_unreadable(bad: Sequence[str], n: int) -> None:
    """Raise `TooManyUnreadable` if `bad`, the reasons of unreadable images, are too many of `n` images."""
    if len(bad) > MAX_UNREADABLE * n:
        raise TooManyUnreadable(
            f"at least {len(bad)} of {n} images cannot be read, more than {MAX_UNREADABLE:.0%}; the first is: "
            f"{bad[0]}; see xclip-jax check"
        )


class Encoder:
    """Encode images and texts in batches of one or a few fixed shapes, each compiled once per modality.

    The last batch is padded with zeros and cut after encoding, so every item counts exactly once. Each process loads
    only its devices' rows of the batch, and gets the features of all items.

    Attributes:
      batch: the largest global batch.
      sizes: all batches, each rounded up to a multiple of the mesh's batch shards, ascending.
      similarities: comparisons of images with texts, the model's default first; empty for a fine-tuned model.
      classes: classes of a fine-tuned model's classifier, in its order; None if unknown.
      grid: patches along a side of an image, 0 if the model has no patch features.
      unreadable: {index: reason} of images unreadable for `images` and `patches`; "" if another process reported it.
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
        """Compile nothing yet. `batches` are rounded up to `sizes`; for the other arguments see the attributes."""
        shards = batch_shards(mesh)
        self.sizes = sorted({math.ceil(size / shards) * shards for size in batches})
        self.batch = self.sizes[-1]
        self.similarities = tuple(similarities)
        self._default = ("features", *(similarity.feature for similarity in similarities))
        self.preprocessing = preprocessing
        self.image_size = preprocessing.size
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
            # "valid" shows every process the unreadable rows of the others.
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

        compiled = functools.partial(jax.jit, out_shardings=replicated(mesh))
        self._scalars: Encode = compiled(scalars)
        self._encode_images: Encode = compiled(encode_images)
        self._encode_patches: Encode = compiled(encode_patches, static_argnames="projected")
        self._encode_texts: Encode = compiled(encode_texts)

    def images(self, variables: Variables, images: Rows, features: Sequence[str] | None = None) -> Features:
        """Encode `images`, a sequence of uint8 (size, size, 3).

        Args:
          variables: arguments of `TwoTowers.apply`.
          images: n images, which may be decoded on access; or one fp32 array (n, size, size, 3) of normalised pixels.
          features: names of the features to fetch; by default "features" and the inputs of the similarities.

        Returns:
          fp32 arrays, as far as the model has them: "features" (n, d), pooled; inputs of similarities, such as
          "embedding" (n, e) and "cluster_logits" (n, k); "class_logits" (n, classes) of a classifier. Images that
          raised `BadSample` have rows of NaN.
        """
        return self._run(functools.partial(self._encode_images, variables), images, self._form(images), features)

    def patches(
        self, variables: Variables, images: Rows, first: int = 0, *, projected: bool = False
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Encode the patches of images batch by batch: the features of a whole set may be too large to keep.

        Yields the index of a batch's first image, and fp32 (m, grid, grid, d) of its m images, NaN for unreadable ones.
        `first` is the offset of the images' indices in `unreadable`. If `projected`, the features pass through the head
        of the model's default similarity, which was trained on pooled features.
        """
        encode = functools.partial(self._encode_patches, variables, projected=projected)
        for start, out in self._batches(encode, images, self._form(images), ("patches",), first):
            yield start, out["patches"]

    def check_unreadable(self, first: int, last: int) -> None:
        """Raise `TooManyUnreadable` if more than `MAX_UNREADABLE` of the images `first` to `last` - 1 are unreadable.

        For sets that `images` encodes in one call, since its own limit holds for all of their images together.
        """
        bad = [reason or f"image {i}" for i, reason in sorted(self.unreadable.items()) if first <= i < last]
        _limit_unreadable(bad, last - first)

    def _form(self, images: Rows) -> jax.ShapeDtypeStruct:
        dtype = np.float32 if getattr(images, "dtype", None) == np.float32 else np.uint8
        return jax.ShapeDtypeStruct((self.image_size, self.image_size, 3), dtype)

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
        length = self._text_length
        if self._eot_id is not None and (
            len(tokens) == 1 or len(tokens) >= _BATCHES * self.batch  # a search, or enough to compile another shape
        ):
            longest = int((np.asarray(tokens) == self._eot_id).argmax(axis=1).max()) + 1
            length = min(math.ceil(longest / _LENGTHS) * _LENGTHS, length)
        rows = np.asarray(tokens)[:, :length] if length < self._text_length else tokens
        form = jax.ShapeDtypeStruct((length,), np.int32)
        return self._run(functools.partial(self._encode_texts, variables), rows, form, features)

    def logits_of(self, scores: Mapping[str, np.ndarray], variables: Variables) -> np.ndarray:
        """Return the logits (n, classes) of the model's default similarity among the `scores` of `zeroshot.compare`."""
        own = self.similarities[0]
        scale = 1.0 if own.scale is None else float(self._scalars(variables)[own.scale])
        return scale * scores[own.logits]

    def _run(self, encode: Encode, items: Rows, form: jax.ShapeDtypeStruct, names: Sequence[str] | None) -> Features:
        results: Features = {}
        for start, out in self._batches(encode, items, form, self._default if names is None else names):
            for key, value in out.items():
                if key not in results:  # allocated whole: concatenating batches would need the memory twice
                    results[key] = np.empty((len(items), *value.shape[1:]), value.dtype)
                results[key][start : start + len(value)] = value
        return results

    def _batches(
        self, encode: Encode, items: Rows, form: jax.ShapeDtypeStruct, keys: Sequence[str], offset: int = 0
    ) -> Iterator[tuple[int, Features]]:
        """Yield the first index and the features `keys` of each batch, without padding; one empty batch of no items.

        At the end `unreadable` gets the unreadable images, `offset` added to their indices.
        """
        n = len(items)
        self._reasons: dict[int, str] = {}
        unreadable: list[int] = []

        def fetch(out: dict[str, jax.Array], start: int) -> tuple[int, Features]:
            fetched = {key: np.asarray(value)[: n - start] for key, value in out.items()}
            valid = fetched.pop("valid", np.ones(0, bool))
            unreadable.extend((start + np.flatnonzero(~valid)).tolist())
            # Raised before the end: all devices would wait for each image of an unavailable store.
            _limit_unreadable([self._reasons.get(i, f"image {i}") for i in unreadable], n)
            return start, fetched

        pending: tuple[dict[str, jax.Array], int] = {}, 0
        start = 0
        ready = isinstance(items, (np.ndarray, list, tuple, ThreadPrefetcher))
        with contextlib.nullcontext() if ready else thread_pool() as threads:  # one thread per core to decode on access
            each = map if threads is None else threads.imap
            while start < max(n, 1):
                console.report_progress()
                size = next((size for size in reversed(self.sizes) if n - start > size // 2), self.sizes[0])
                out = encode(*self._place(items, each, start, size, form))
                # Fetch one batch late: the device works while the host fetches and loads.
                if pending[0]:
                    yield fetch(*pending)
                pending = {key: x for key, x in out.items() if key in ("valid", *keys)}, start
                start += size
            yield fetch(*pending)
        self.unreadable |= {i + offset: self._reasons.get(i, "") for i in unreadable}

    def _place(
        self, items: Rows, each: Callable[..., Iterable], start: int, size: int, form: jax.ShapeDtypeStruct
    ) -> tuple[jax.Array, jax.Array]:
        """Return the global batch of `size` items from `start`, padded with zeros, and bool (size,) of readable items.

        `each` is a `map` for reading this process's rows.
        """
        blocks: dict[int, np.ndarray] = {}

        def read(i: int) -> np.ndarray | BadSample:
            try:
                item = items[i]
            except BadSample as error:
                return error
            # NumPy would silently cast and broadcast it.
            if item.shape != form.shape or item.dtype != form.dtype:
                raise UserError(f"item {i} is {item.dtype} {item.shape}, not {form.dtype} {form.shape}.")
            return item

        def rows(index: Any) -> np.ndarray:
            first, stop, _ = index[0].indices(size)
            # Load rows once that devices along the mesh's model axis share.
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
