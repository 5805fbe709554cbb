"""Dense representation: a linear probe of patch features predicts the content of each patch of an image.

The label of a patch is the share of its area covered by each class of a mask. Multinomial regression on these shares is
the cross-entropy of all pixels, each classified by the features of its patch. Intersection and union are areas: for
shares y and predicted shares p they are min(p, y) and max(p, y), summed over all patches and then divided.
Labelling a patch by its largest class would lose everything thinner than a patch, such as strokes.

The content of a patch can often be guessed from its pixels, so the same probe on pixels and the patch's position is
measured too ("pixels/miou"): the difference is the contribution of the features.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import scipy.special

from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators import logistic
from xclip_jax.evaluators.base import Column, Evaluator, Layout, joined
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.evaluators.feature_classifiers import Sweep, search
from xclip_jax.evaluators.results import Provenance, Result
from xclip_jax.evaluators.statistics import PerExample, mean_iou
from xclip_jax.evaluators.zeroshot import class_scores
from xclip_jax.models.two_towers import Variables

PROTOCOL = (
    "linear probe of patch features (last block, normalised); targets and IoU are shares of a patch's area; "
    "standardised, L-BFGS, C of 7 on validation, fit on both"
)
NO_CLASS = 255  # value of pixels without a class
MAX_PATCHES = (50_000, 10_000)  # patches to fit on, and to choose C on
_SWEEP = Sweep(tuple(10.0**e for e in range(-4, 3)), halvings=0, tolerance=1e-4)
_SAMPLES = 16  # samples of the mask along a side of a patch
_BATCH = 256  # images cut into patches at once
_COLUMNS = (
    Column("classes", "ways"),
    Column("patches", "patches"),
    Column("items", "n"),
    Column("mIoU", "miou", "mean IoU of patches", chance=True),
    Column("of pixels", "pixels/miou"),
    Column("accuracy", "accuracy", "largest class of a patch", chance=True),
    Column("zero-shot", "zeroshot/miou", "zero-shot mean IoU of pixels"),
)

# (images, index of the first image) -> batches of features, see `Encoder.patches`.
_Encode = Callable[[Sequence[np.ndarray], int], Iterator[tuple[int, np.ndarray]]]


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedImages:
    """Images with labelled pixels."""

    images: Sequence[np.ndarray]  # for `Encoder.images`
    masks: Sequence[np.ndarray]  # uint8 (h, w), class of each pixel before preprocessing, or `NO_CLASS`


@dataclasses.dataclass(frozen=True, eq=False)
class DenseSet:
    """A dense probe; without validation images C is chosen on a random tenth of the training images, with seed 0."""

    evaluator: ClassVar[str] = "dense"

    name: str
    classes: Sequence[str]  # names in the order of their numbers
    train: MaskedImages
    validation: MaskedImages
    test: MaskedImages
    prepare: Preprocessing  # already applied to images, but not to masks
    card: Provenance = dataclasses.field(default_factory=Provenance)
    prompts: Sequence[Sequence[str]] = ()  # texts of each class for zero-shot segmentation; empty for none
    together: np.ndarray | None = None  # int (n,), equal for dependent test images; None if all are independent


def areas(mask: np.ndarray, classes: int, grid: int, patch: int, prepare: Preprocessing) -> np.ndarray:
    """Return the share of each class in the labelled area of each patch, fp32 (grid, grid, classes).

    `prepare` is the preprocessing of the image, and `patch` the side of a patch in the preprocessed image, pixels. The
    remainder at the right and at the bottom belongs to no patch. Patches with less than half labelled have zeros.
    """
    # The mask sampled like the patches; rounding the side shifts each sample by at most half of one.
    side = grid * _SAMPLES
    view = prepare.with_size(round(prepare.size * _SAMPLES / patch)).mask(mask)[:side, :side]
    position = np.arange(side) // _SAMPLES
    number = position[:, None] * grid + position
    counts = np.bincount((number * 256 + view).ravel(), minlength=grid**2 * 256).reshape(grid, grid, 256)[..., :classes]
    labelled = counts.sum(axis=-1, keepdims=True)
    return np.where(2 * labelled >= _SAMPLES**2, counts / np.maximum(labelled, 1), 0).astype(np.float32)


class DenseProbe(Evaluator):
    """Dense probe: "dense/<set>/miou", "accuracy", and "iou/<class>"; see the module's docstring.

    "accuracy" is the share of patches whose largest class is predicted. The chance level is that of predicting the mean
    shares of the training patches everywhere. Metrics of the probe of pixels and positions begin with "pixels/".
    Further results are n, train, ways (number of classes), patches (per image) and log10_c. Patches without a label are
    ignored; patches of an unreadable test image count as wrong.
    A model whose default similarity compares embeddings also has "zeroshot/miou" and "zeroshot/iou/<class>", counted in
    pixels: cosines of patches with the classes' texts are interpolated bilinearly, and a pixel gets the largest.
    """

    family = "dense"
    layouts = (Layout("patch features, IoU x 100", _COLUMNS),)

    def __init__(self, encoder: Encoder, data: DenseSet) -> None:
        if not encoder.grid:
            raise UserError(
                f"{data.name}: the model's image tower has no patch features (`patch_features` of "
                "xclip_jax.models.tower.ImageTower); leave this set out."
            )
        super().__init__(encoder, data)
        # The side of a patch, pixels. Dividing is exact unless as many pixels remain as there are patches along a side,
        # for example with 223 pixels and patches of 16.
        self._patch = encoder.image_size // encoder.grid
        # The model determines the patches: `tables.compare` refuses results with other, easier or harder targets.
        prepare = data.prepare
        view = prepare.resizing.replace(f" {prepare.interpolation}", "")  # masks take the nearest pixel
        target = f"{encoder.grid} x {encoder.grid} patches of {self._patch} px in images of {prepare.size} px ({view})"
        protocol = "; ".join(filter(None, (target, data.card.protocol)))
        self.data = dataclasses.replace(data, card=dataclasses.replace(data.card, protocol=protocol))

    def measure(self, variables: Variables) -> list[Result]:
        predicted, c = self._predict(functools.partial(self.encoder.patches, variables))
        n = len(predicted)
        results = []
        for key, item in self._items(predicted).items():
            fields = {"unit": "%" if key == "accuracy" else "x 100", "n": n, "chance": self._levels[key]}
            results.append(self.result(key, item, **fields))
            results.append(self.result(f"pixels/{key}", self._of_pixels[key], **fields))
        if self.data.prompts and self.encoder.similarities and not self.encoder.similarities[0].is_distribution:
            intersection, union = self._zero_shot(variables)
            for key, some in self._tested.items():
                item = PerExample(intersection[:, some], other=union[:, some], statistic="iou")
                results.append(self.result(f"zeroshot/{key}", item, unit="x 100"))
        counts = {"n": n, "train": len(self.data.train.images) + len(self.data.validation.images)}
        counts |= {"ways": len(self.data.classes), "patches": self.encoder.grid**2}
        if c is not None:
            counts["log10_c"] = np.log10(c)
        return [*results, *(self.count(key, value) for key, value in counts.items())]

    @functools.cached_property
    def _labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Shares of classes in patches, fp32 (n, grid, grid, classes), of training and validation, and of test."""
        arguments = len(self.data.classes), self.encoder.grid, self._patch, self.data.prepare

        def shares(*parts: MaskedImages) -> np.ndarray:
            return np.stack([areas(mask, *arguments) for part in parts for mask in part.masks])

        return shares(self.data.train, self.data.validation), shares(self.data.test)

    @functools.cached_property
    def _chosen(self) -> tuple[np.ndarray, np.ndarray]:
        """Ascending indices of the patches to fit on, and to choose C on, among training and validation patches."""
        labels = self._labels[0]
        rng = np.random.default_rng(0)
        held = np.arange(len(labels)) >= len(self.data.train.images)
        if not held.any():
            held[rng.permutation(len(labels))[: max(1, len(labels) // 10)]] = True
        labelled = labels.any(axis=-1)
        chosen = []
        for side, most in zip((~held, held), MAX_PATCHES, strict=True):
            members = np.flatnonzero((labelled & side[:, None, None]).ravel())
            chosen.append(np.sort(rng.permutation(members)[:most]))
        return chosen[0], chosen[1]

    def _predict(self, encode: _Encode) -> tuple[np.ndarray, float | None]:
        """Return predicted shares of test patches, fp32 (n, grid, grid, classes), zeros if unreadable; and the C.

        If no feature is finite, the model diverged: all answers are wrong, 0, and the C is None.
        """
        classes = len(self.data.classes)
        chosen = np.concatenate(self._chosen)
        order = np.sort(chosen)
        rows = []
        for start, h in encode(joined([self.data.train.images, self.data.validation.images]), 0):
            first = start * self.encoder.grid**2
            h = h.reshape(-1, h.shape[-1])
            low, high = np.searchsorted(order, (first, first + len(h)))
            rows.append(h[order[low:high] - first])
        x = np.concatenate(rows)[np.searchsorted(order, chosen)]
        y = self._labels[0].reshape(-1, classes)[chosen]
        fitted = np.arange(len(x)) < len(self._chosen[0])
        finite = np.isfinite(x).all(axis=1)
        if not finite.any():
            return np.zeros_like(self._labels[1]), None
        if (finite & fitted).any() and (finite & ~fitted).any():  # else logistic.fit reports NaN
            x, y, fitted = x[finite], y[finite], fitted[finite]
        mean = x.mean(axis=0)
        deviation = np.maximum(x.std(axis=0), 1e-6)
        x = (x - mean) / deviation
        c = search((x[fitted], y[fitted]), (x[~fitted], y[~fitted]), classes, _SWEEP, _score)
        fit = logistic.fit(x, y, [c], classes, tolerance=_SWEEP.tolerance)
        predicted = np.zeros_like(self._labels[1])
        for start, h in encode(self.data.test.images, len(self._labels[0])):
            logits = ((h - mean) / deviation) @ fit.weights[0] + fit.bias[0]
            predicted[start : start + len(h)] = np.nan_to_num(scipy.special.softmax(logits, axis=-1))
        return predicted, c

    def _items(self, predicted: np.ndarray) -> dict[str, PerExample]:
        """Return {metric: per-image values} of predicted shares, without classes missing from the test."""
        labels = self._labels[1]
        labelled = labels.any(axis=-1)
        predicted = np.where(labels.any(axis=-1, keepdims=True), predicted, 0)
        intersection, union = (f(predicted, labels).sum(axis=(1, 2)) for f in (np.minimum, np.maximum))
        right = labelled & predicted.any(axis=-1) & (predicted.argmax(axis=-1) == labels.argmax(axis=-1))
        number = labelled.sum(axis=(1, 2))
        share = right.sum(axis=(1, 2)) / np.maximum(number, 1)
        items = {
            key: PerExample(intersection[:, some], other=union[:, some], statistic="iou")
            for key, some in self._tested.items()
        }
        return items | {"accuracy": PerExample(share, weights=number.astype(float))}

    @functools.cached_property
    def _tested(self) -> dict[str, Sequence[int] | np.ndarray]:
        """{metric: classes to average}, among those in the test's patches."""
        tested = np.flatnonzero(self._labels[1].any(axis=(0, 1, 2)))
        return {"miou": tested} | {f"iou/{self.data.classes[i]}": [i] for i in tested}

    def _zero_shot(self, variables: Variables) -> tuple[np.ndarray, np.ndarray]:
        """Return intersection and union, labelled pixels, (n, classes); unreadable images get no class."""
        encoder = self.encoder
        own = encoder.similarities[:1]
        prompts = self.data.prompts
        txt = encoder.texts(variables, [text for texts in prompts for text in texts], (own[0].feature,))
        pixels = np.arange(encoder.image_size) + 0.5  # scores are constant beyond the outermost patches' centres
        centres = (np.arange(encoder.grid) + 0.5) * self._patch
        weights = np.stack([np.interp(pixels, centres, row) for row in np.eye(encoder.grid)])
        classes = len(prompts)
        masks = self.data.test.masks
        confusions = []
        for start, z in encoder.patches(variables, self.data.test.images, len(self._labels[0]), projected=True):
            for i, image in enumerate(z):
                img = {own[0].feature: image.reshape(-1, z.shape[-1])}
                cosines = class_scores(own, img, txt, list(map(len, prompts)))[""].reshape(*image.shape[:2], classes)
                predicted = np.einsum("ip,ijc,jq->pqc", weights, cosines, weights, optimize=True).argmax(axis=-1)
                predicted = predicted if np.isfinite(cosines).all() else np.full_like(predicted, classes)
                mask = self.data.prepare.mask(masks[start + i]).astype(int)
                pairs = (mask * (classes + 1) + predicted)[mask < classes]
                confusions.append(np.bincount(pairs, minlength=classes * (classes + 1)).reshape(classes, classes + 1))
        counts = np.stack(confusions)  # true and predicted class of each pixel
        intersection = counts.diagonal(axis1=1, axis2=2)
        return intersection, counts.sum(axis=2) + counts[..., :classes].sum(axis=1) - intersection

    @functools.cached_property
    def _levels(self) -> dict[str, float]:
        """{metric: value} of predicting the mean shares of training patches everywhere."""
        learned = self._labels[0][self._labels[0].any(axis=-1)]
        constant = np.broadcast_to(learned.mean(axis=0), self._labels[1].shape)
        return {key: item.value() for key, item in self._items(constant).items()}

    @functools.cached_property
    def _of_pixels(self) -> dict[str, float]:
        """{metric: value} of the probe of pixels and positions, independent of the model."""
        return {key: item.value() for key, item in self._items(self._predict(self._pixels)[0]).items()}

    def _pixels(self, images: Sequence[np.ndarray], _: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each patch's pixels, between 0 and 1, and one-hot position, batch by batch like `Encoder.patches`."""
        grid, side = self.encoder.grid, self._patch
        position = np.eye(grid**2, dtype=np.float32).reshape(grid, grid, -1)
        for start in range(0, len(images), _BATCH):
            block = np.full((min(_BATCH, len(images) - start), grid, grid, 3 * side**2), np.nan, np.float32)
            for i in range(len(block)):
                try:
                    image = images[start + i][: grid * side, : grid * side]
                except BadSample:
                    continue
                block[i] = image.reshape(grid, side, grid, side, 3).swapaxes(1, 2).reshape(grid, grid, -1) / 255
            yield start, np.concatenate([block, np.broadcast_to(position, (len(block), *position.shape))], axis=-1)


def _score(logits: np.ndarray, shares: np.ndarray) -> float:
    """Return the mean IoU of validation patches over their classes, the criterion for C."""
    predicted = scipy.special.softmax(logits, axis=1)
    some = shares.any(axis=0)
    return mean_iou(np.minimum(predicted, shares)[:, some], np.maximum(predicted, shares)[:, some])
