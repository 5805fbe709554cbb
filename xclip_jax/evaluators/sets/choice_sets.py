"""Sets with texts to choose from: SugarCrepe, ARO, Winoground, and your own tables; see docs/evaluate.md.

choice/SOURCE?image=COLUMN&text=RIGHT&text=WRONG    rows of a table; a second image belongs to the second text
"""

import collections
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from xclip_jax.core.console import log0
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import images, sources
from xclip_jax.data.base import LazySequence, choose
from xclip_jax.data.config import DataConfig
from xclip_jax.data.holdout import image_hash
from xclip_jax.data.labelled import Paths, file_size
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.readers.table import ColumnSource, ImageColumn
from xclip_jax.evaluators.base import SetKind, joined, pictures
from xclip_jax.evaluators.choice import ChoiceSet
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.results import Provenance, contents, digest
from xclip_jax.evaluators.sets.custom import published_layout, query_columns, read_json

PREFIX = "choice/"
_FORM = f"{PREFIX}SOURCE?image=COLUMN&text=RIGHT&text=WRONG"
_PARTS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
_ARO = {"aro/vg_relation": "visual_genome_relation.json", "aro/vg_attribution": "visual_genome_attribution.json"}
_FEWEST = 25  # ARO's mean leaves out pairs of attributes with fewer items
_WINOGROUND = "?image=image_0&image=image_1&text=caption_0&text=caption_1&group=collapsed_tag"
_AT_PATH = ("sugarcrepe", *_ARO, "winoground")


class Choices(NamedTuple):
    """Items before preprocessing; for `pictures`, `texts` and `files` see `ChoiceSet`."""

    images: Sequence[Any]  # encoded
    pictures: np.ndarray
    texts: list[list[str]]
    parts: list[str]  # name of each item's part, "" for none
    ids: Sequence[Any]  # identities of images for the set's hash
    files: np.ndarray | None = None


def sugarcrepe(folder: pathlib.Path) -> Choices:
    """Read SugarCrepe's seven types of wrong captions."""
    records = [(part, record) for part in _PARTS for record in read_json(folder / f"{part}.json").values()]
    number = {file: i for i, file in enumerate(dict.fromkeys(record["filename"] for _, record in records))}
    paths = Paths([folder / "val2017" / file for file in number])
    pictures = np.array([number[record["filename"]] for _, record in records], int)[:, None]
    texts = [[record["caption"], record["negative_caption"]] for _, record in records]
    return Choices(paths, pictures, texts, [part for part, _ in records], contents(paths))


def aro(name: str, folder: pathlib.Path) -> Choices:
    """Read ARO's relations or attributes: an image's box, its caption, and a caption with two words exchanged.

    The authors' code averages over asymmetric relations, or over pairs of attributes with 25 items.
    """
    records = read_json(folder / _ARO[name])
    if name == "aro/vg_relation":
        parts = [record["relation_name"] for record in records]
        left_out = set(read_json(pathlib.Path(__file__).with_name("aro_symmetric.json")))
    else:
        parts = ["_".join(record["attributes"][:2]) for record in records]
        left_out = {pair for pair, count in collections.Counter(parts).items() if count < _FEWEST}
    boxes = [[float(record[f"bbox_{side}"]) for side in "xywh"] for record in records]
    paths = Paths([folder / "images" / record["image_path"] for record in records])

    def crop(index: int) -> np.ndarray:  # black beyond the image
        left, top, width, height = boxes[index]
        image = PIL.Image.fromarray(images.decode(paths[index], rotate=False))
        return np.asarray(image.crop((left, top, left + width, top + height)))

    texts = [[record["true_caption"], record["false_caption"]] for record in records]
    parts = ["" if part in left_out else part for part in parts]
    number = {path: i for i, path in enumerate(dict.fromkeys(paths.paths))}
    files = np.array([number[path] for path in paths.paths])
    crops = LazySequence(len(paths), crop, paths.name)
    return Choices(crops, np.arange(len(texts))[:, None], texts, parts, [*contents(paths), *boxes], files)


def read_rows(spec: str, data: DataConfig) -> Choices:
    """Read "SOURCE?image=COLUMN&text=RIGHT&text=WRONG"; with &group=COLUMN, a row's part is the text in that column."""
    name, columns = query_columns(spec)
    keys = columns.get("text", list(DataConfig.text_columns))
    group, *others = columns.get("group", [""])
    if others or columns.keys() - {"image", "text", "group"}:
        raise UserError(f"{spec}: its keys are image, text and one group; write {_FORM}.")
    options = dataclasses.replace(sources.source_options(data), text_columns=tuple(keys), tags_key=group)
    each = [dataclasses.replace(options, image_column=key) for key in columns.get("image", [DataConfig.image_column])]
    tables: list[Any] = [sources.open_pairs(sources.spec_from_path(name), of_image) for of_image in each]
    if not isinstance(tables[0], ColumnSource):
        raise UserError(f"{spec}: {name!r} has no columns, unlike csv:, parquet: and hf:; write {_FORM}.")
    rows = [tables[0].texts(i) for i in range(len(tables[0]))]
    right = keys[: len(tables)]  # rows may differ in the number of wrong texts
    wrong = [(i, key) for i, row in enumerate(rows) for key, cell in zip(right, row, strict=False) if len(cell) != 1]
    if wrong:
        number, key = wrong[0]
        raise UserError(f"{spec}: row {number} must have one text in column {key!r}; correct or delete the row.")
    named = [table.images.path(i) for table in tables for i in range(len(rows))]
    cells = [table.images for table in tables]
    same = [name or _content(cells[i // len(rows)], i % len(rows)) or i for i, name in enumerate(named)]
    first = {key: i for i, key in reversed(list(enumerate(same)))}  # rows may share an image
    used, pictures = np.unique([first[key] for key in same], return_inverse=True)
    texts = [[text for cell in row for text in cell] for row in rows]
    parts = [", ".join(tables[0].values(group, i)) if group else "" for i in range(len(rows))]
    sizes = [size for column in cells for size in column.sizes()]
    ids = [(size[0], file_size(path)) if path else size for size, path in zip(sizes, named, strict=True)]
    return Choices(choose(joined(cells), used.tolist()), pictures.reshape(len(tables), -1).T, texts, parts, ids)


def _content(column: ImageColumn, index: int) -> str:
    """Return the hash of an image in a table; "" if the row has none."""
    try:
        return image_hash(column.read(index)[0])
    except BadSample:
        return ""


def _answerable(data: ChoiceSet) -> ChoiceSet:
    """Leave out items whose right text is also a wrong one, with a warning."""
    kept = [i for i, (right, *wrong) in enumerate(data.texts) if right not in wrong]
    n = len(data.texts)
    if len(kept) == n:
        return data
    first = min(set(range(n)).difference(kept))
    log0(
        f"WARNING: {data.name}: {n - len(kept):,} of the {n:,} rows left out: the right text is among the wrong ones, "
        f"first in row {first}, {data.texts[first][0]!r}"
    )
    card = dataclasses.replace(data.card, split_hash=digest([data.card.split_hash, *kept]))
    groups = {part: mask[kept] for part, mask in data.groups.items() if mask[kept].any()}
    texts = [data.texts[i] for i in kept]
    return dataclasses.replace(data, pictures=data.pictures[kept], texts=texts, groups=groups, card=card)


class ChoiceSets(SetKind):
    """`sugarcrepe@`, `aro/NAME@`, `winoground` and `choice/SOURCE`."""

    prefixes = ("sugarcrepe", "aro", "winoground", PREFIX.rstrip("/"))

    @classmethod
    def load(cls, spec: str, prepare: Preprocessing, data: DataConfig, profile: Profile) -> ChoiceSet:
        """Open the set `spec`, see the module's docstring; texts get the command's prefix, not the published sets'."""
        name, _, location = spec.partition("@")
        own = spec.startswith(PREFIX)
        if name == "winoground" or own:
            rows = f"{location or 'hf:facebook/winoground/test'}{_WINOGROUND}" if name == "winoground" else spec
            items = read_rows(rows.removeprefix(PREFIX), data)
        else:
            with published_layout(name, location):
                folder = pathlib.Path(location).expanduser()
                items = aro(name, folder) if name in _ARO else sugarcrepe(folder)
        profile = dataclasses.replace(profile, prefix=profile.prefix or "", captions=0, exif_rotation=own)
        prepare = profile.preprocessing(prepare)
        texts = [profile.texts(item) for item in items.texts]
        metric = "macro_accuracy" if name in _ARO else "accuracy"
        if items.pictures.shape[1] == 2:
            metric = "group_score"
        card = Provenance(
            data=name.removeprefix(PREFIX),
            split_hash=digest([*items.ids, *texts, *items.parts]),
            protocol="right texts and images of an item score higher than its others; equal scores are wrong",
            templates=f"{profile.caption_prefix}TEXT",
            preprocessing=prepare.resizing,
            metric=metric,
        )
        parts = np.array(items.parts, object)
        groups = {part: parts == part for part in dict.fromkeys(items.parts) if part}
        loaded = ChoiceSet(spec, pictures(items.images, prepare), items.pictures, texts, groups, card, items.files)
        return _answerable(loaded) if own else loaded

    @classmethod
    def knows(cls, spec: str) -> bool:
        if spec.startswith(PREFIX):
            return bool(sources.spec_from_path(query_columns(spec.removeprefix(PREFIX))[0]))
        name, _, path = spec.partition("@")
        return spec == "winoground" or (bool(path) and name in _AT_PATH)

    @classmethod
    def extras(cls, spec: str) -> tuple[str, ...]:
        return ("datasets",) if spec == "winoground" else ()
