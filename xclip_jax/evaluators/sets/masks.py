"""Sets of images with masks: `dense/pets` (Oxford-IIIT Pet), and your own, `dense/folder:PATH`.

PATH has classes.txt, one class name a line in the order of the class numbers, and the folders train, test and
optionally validation. Each has the folders images and masks; an image and its mask have the same name except for the
suffix. A mask is a PNG with one channel or a palette, as large as the image; its pixels are class numbers from 0, or
255 for no class.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image

from xclip_jax.core.errors import UserError
from xclip_jax.data.base import IMAGE_SUFFIXES
from xclip_jax.data.config import DataConfig
from xclip_jax.data.labelled import Field, Paths
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.readers.tfds import open_tfds
from xclip_jax.evaluators.base import Pictures, SetKind, closest
from xclip_jax.evaluators.dense import NO_CLASS, PROTOCOL, DenseSet, MaskedImages, check_mask
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.results import Provenance, contents, digest

_FOLDER, _PETS = "dense/folder:", "dense/pets"
_MODES = ("1", "L", "P")  # Pillow's modes of masks
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


class MaskFiles(Sequence):
    """Masks in PNG files, checked and decoded on access."""

    def __init__(self, paths: Sequence[pathlib.Path], classes: int) -> None:
        """`classes` is the number of classes."""
        self.paths, self._classes = paths, classes

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:  # ty: ignore[incompatible-method-override] no slices
        path = self.paths[index]
        try:
            with PIL.Image.open(path) as image:
                mask = np.asarray(image).astype(np.uint8)
        except Exception as error:  # Pillow's readers raise errors of any class for damaged files
            raise UserError(f"mask {str(path)!r} cannot be read ({error}); save it again as PNG.") from error
        return check_mask(mask, self._classes, f"mask {str(path)!r}")


class TrimapMasks(Sequence):
    """Masks of Oxford-IIIT Pet: 1 is the pet, 2 the background, 3 the outline, which has no class."""

    def __init__(self, source: Any) -> None:
        """Records of `source` have the feature segmentation_mask (h, w, 1)."""
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> np.ndarray:  # ty: ignore[incompatible-method-override] no slices
        trimap = np.asarray(self._source[index]["segmentation_mask"])[..., 0]
        mask = np.where(trimap == 3, NO_CLASS, trimap - np.uint8(1)).astype(np.uint8)
        return check_mask(mask, 2, f"mask of record {index}")


def _by_stem(name: str, folder: pathlib.Path, suffixes: tuple[str, ...]) -> dict[str, pathlib.Path]:
    """Return {name without suffix: path} for the files in `folder`."""
    if not folder.is_dir():
        raise UserError(f"{name}: folder {str(folder)!r} does not exist; a part has the folders images and masks.")
    files: dict[str, pathlib.Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.lower().endswith(suffixes):
            continue
        if path.stem in files:
            raise UserError(f"{name}: {str(files[path.stem])!r} and {path.name!r} have one name; rename one of them.")
        files[path.stem] = path
    if not files:
        raise UserError(f"{name}: folder {str(folder)!r} contains no files that end in {', '.join(suffixes)}.")
    return files


def _check_header(name: str, image: pathlib.Path, mask: pathlib.Path) -> None:
    """Raise `UserError` if a mask has several channels or another size than its image, which may be damaged."""
    try:
        with PIL.Image.open(mask) as opened:
            size, mode = opened.size, opened.mode
    except Exception as error:
        raise UserError(f"{name}: mask {str(mask)!r} cannot be read ({error}); save it again as PNG.") from error
    if mode not in _MODES:
        raise UserError(
            f"{name}: mask {str(mask)!r} has pixels of mode {mode}; save class numbers as one channel of 8 bits."
        )
    try:
        with PIL.Image.open(image) as opened:
            expected = opened.size[::-1] if opened.getexif().get(0x0112) in _TURNED else opened.size
    except Exception:  # counted as unreadable when it is read
        return
    if size != expected:
        raise UserError(
            f"{name}: mask {str(mask)!r} has {size[0]} x {size[1]} pixels and its image {expected[0]} x {expected[1]}; "
            "save it in the image's size."
        )


def _read_part(name: str, folder: pathlib.Path, classes: int) -> tuple[Paths, MaskFiles]:
    images = _by_stem(name, folder / "images", tuple(IMAGE_SUFFIXES))
    masks = _by_stem(name, folder / "masks", (".png",))
    for stem in sorted(images.keys() ^ masks.keys()):
        path, other = (images[stem], "mask") if stem in images else (masks[stem], "image")
        raise UserError(f"{name}: {str(path)!r} has no {other} of its name; add it, or move the file away.")
    for stem, image in images.items():
        _check_header(name, image, masks[stem])
    return Paths(list(images.values()), folder), MaskFiles([masks[stem] for stem in images], classes)


def _read_classes(name: str, path: pathlib.Path) -> list[str]:
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{name}: {str(path)!r} cannot be read ({error}); write the names of the classes into it, one a line, in "
            "the order of their numbers in masks."
        ) from error
    if len(set(names)) != len(names) or not 2 <= len(names) <= NO_CLASS:
        raise UserError(f"{name}: {str(path)!r} has {len(names)} names; expected 2 to {NO_CLASS} different ones.")
    return names


def _folder(spec: str, prepare: Preprocessing) -> DenseSet:
    root = pathlib.Path(spec.removeprefix(_FOLDER)).expanduser()
    if not root.is_dir():
        raise UserError(f"{spec}: folder {str(root)!r} does not exist.")
    classes = _read_classes(spec, root / "classes.txt")
    parts = [
        _read_part(spec, root / part, len(classes))
        if part != "validation" or (root / part).is_dir()
        else (Paths([]), MaskFiles([], len(classes)))
        for part in ("train", "validation", "test")
    ]
    files = [[contents(images), [(path.name, path.stat().st_size) for path in masks.paths]] for images, masks in parts]
    card = Provenance(str(root), split="test", split_hash=digest([classes, *files]))
    return _set(spec, prepare, classes, parts, card)


def _pets(prepare: Preprocessing, data_dir: str | None) -> DenseSet:
    parts: list[tuple[Sequence[Any], Sequence[np.ndarray]]] = []
    version = ""
    for split in ("train", "test"):
        source, info = open_tfds("oxford_iiit_pet", split, data_dir)
        version = str(info.version)
        parts.append((Field(source, "image"), TrimapMasks(source)))
    sizes = [len(images) for images, _ in parts]
    parts.insert(1, ([], []))
    card = Provenance("oxford_iiit_pet", version, "test", digest(["oxford_iiit_pet", version, *sizes]))
    return _set(_PETS, prepare, ["pet", "background"], parts, card)


def _set(
    name: str,
    prepare: Preprocessing,
    classes: Sequence[str],
    parts: Sequence[tuple[Sequence[Any], Sequence[np.ndarray]]],
    card: Provenance,
) -> DenseSet:
    masked = [MaskedImages(Pictures(images, prepare), masks) for images, masks in parts]
    card = dataclasses.replace(card, protocol=PROTOCOL, preprocessing=prepare.resizing, metric="miou")
    return DenseSet(name, classes, *masked, prepare, card)


class DenseSets(SetKind):
    """`dense/pets` and `dense/folder:PATH`."""

    prefixes = ("dense",)
    names = (_PETS,)
    usage = f"masks: {_FOLDER}PATH, PATH/classes.txt and PATH/train, PATH/test with images and masks"

    @classmethod
    def knows(cls, spec: str) -> bool:
        """Whether the name is known."""
        return spec == _PETS or (spec.startswith(_FOLDER) and spec != _FOLDER)

    @classmethod
    def closest(cls, spec: str) -> list[str]:
        """Return similar names."""
        return closest(spec, (_PETS, f"{_FOLDER}PATH"), ())

    @classmethod
    def load(cls, spec: str, prepare: Preprocessing | int, data: DataConfig, profile: Profile) -> DenseSet:
        """Open the set `spec`.

        Raises:
          UserError: a file or folder that is missing or has another layout.
        """
        prepare = profile.preprocessing(prepare)
        return _pets(prepare, data.dir or None) if spec == _PETS else _folder(spec, prepare)
