"""Class names, prompt templates and class subsets of the zero-shot sets, and the profiles of published tables.

Names and templates come from clip-benchmark (MIT), in `data/third_party`; other templates are generated.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from xclip_jax.core import storage
from xclip_jax.core.errors import UserError
from xclip_jax.data.preprocessing import Preprocessing


def check_templates(texts: Sequence[str], origin: str = "") -> None:
    """Raise `UserError` if a template lacks {c}, the place of the class name; `origin` is their file."""
    for line, text in enumerate(texts, 1):
        if "{c}" not in text:
            place = f"{origin}, line {line}: " if origin else ""
            raise UserError(f"{place}template {text!r} has no {{c}}, where the name of the class goes; add it.")


@dataclasses.dataclass(frozen=True)
class Profile:
    """A project's protocol, for numbers comparable with its tables.

    Mean and standard deviation of pixels are not part of it: they belong to the weights.

    Attributes:
      imagenet: templates of ImageNet and its variants, "openai80" or "slip7".
      clips: whether to use CLIP's own templates, like SLIP, for sets with other templates in clip-benchmark.
      resample: resizing of the shorter side, "bicubic" or "bilinear"; "" for the model's resizing.
      published_prefix: text before the captions of published retrieval sets.
      prefix: text before the captions of all retrieval sets; None for `published_prefix`, and none for your own pairs.
      lower: whether to lower-case captions, like SigLIP.
      captions: number of captions per image to keep; 0 for all.
      templates: prompts for your own labelled images, with {c} for the class; empty for "a photo of a {c}".
      names: {label: name, or synonyms} of their classes; other classes are called by their labels.
      exif_rotation: whether to rotate images by their EXIF tag if the model does; published sets are not rotated.
    """

    imagenet: str = "openai80"
    clips: bool = True
    resample: str = ""
    published_prefix: str = ""
    prefix: str | None = None
    lower: bool = False
    captions: int = 0
    templates: Sequence[str] = ()
    names: Mapping[str, str | Sequence[str]] = dataclasses.field(default_factory=dict)
    exif_rotation: bool = False

    def __post_init__(self) -> None:
        check_templates(self.templates)

    def preprocessing(self, prepare: Preprocessing) -> Preprocessing:
        """Return the model's preprocessing with the protocol's resizing and rotation."""
        changed: dict[str, Any] = {"exif_rotation": prepare.exif_rotation and self.exif_rotation}
        if self.resample:
            changed |= {"resize_mode": "shortest", "resize_size": 0, "interpolation": self.resample}
        return dataclasses.replace(prepare, **changed)

    @property
    def caption_prefix(self) -> str:
        """Text before captions."""
        return self.published_prefix if self.prefix is None else self.prefix

    def texts(self, captions: Sequence[str]) -> list[str]:
        """Return an image's captions by the protocol."""
        kept = list(captions)[: self.captions or None]
        return [self.caption_prefix + (text.lower() if self.lower else text) for text in kept]


PROFILES = {
    "openai": Profile(published_prefix="a photo of "),  # the CLIP paper, table 13
    "slip": Profile(imagenet="slip7", resample="bilinear"),
    "open_clip": Profile(clips=False),
}


# Indices of seven templates chosen by forward selection (notebook of the CLIP repository), also in SLIP.
_SEVEN = (73, 7, 44, 69, 35, 67, 64)
# Classes of ImageNet-A, ImageNet-R and ImageNet-O among ImageNet's 1000, equal to clip_benchmark's lists of wnids
# (datasets/builder.py) and, for A and R, big_vision's indices (IMAGENET_A_LABELSET, IMAGENET_R_LABELSET).
_SUBSETS = json.loads(pathlib.Path(__file__).with_name("imagenet_subsets.json").read_text())
IMAGENET_A, IMAGENET_R, IMAGENET_O = (tuple(_SUBSETS[f"imagenet_{letter}"]) for letter in "aro")

# CLIP's own templates (prompts.md of its repository, templates.json of SLIP's), generated from their pattern, for sets
# without templates in clip-benchmark, or with other ones ("clip_...").
_VERBS = ("", "using ", "doing ", "during ", "performing ", "practicing ")
_NOUNS = ("photo", "video", "example", "demonstration")
_VIEWS = tuple(f"{how} {what}" for what in ("imagery", "photo", "view") for how in ("satellite", "aerial"))
_EXTRA = {
    "birds": ["a photo of a {c}, a type of bird."],
    "hatefulmemes": ["a {c}."],
    "ucf101": [f"a {noun} of {one} person {verb}{{c}}." for verb in _VERBS for one in ("a", "the") for noun in _NOUNS],
    "kinetics700": [f"a {noun} of {who}{{c}}." for noun in _NOUNS for who in ("", *(f"a person {v}" for v in _VERBS))],
    "clip_resisc45": [f"{view} of {article}{{c}}." for article in ("", "a ", "the ") for view in _VIEWS],
    "clip_pcam": ["this is a photo of {c}"],
}
_EXTRA_NAMES = {"hatefulmemes": ["meme", "hatespeech meme"]}
# Synonyms of FER2013's classes in CLIP and SLIP; class vectors are means over templates and synonyms.
SYNONYMS = {
    "happy": ["happy", "smiling"],
    "sad": ["sad", "depressed"],
    "surprised": ["surprised", "shocked", "spooked"],
    "neutral": ["neutral", "bored"],
}


@functools.cache
def _read(name: str) -> dict[str, list[str]]:
    """Read clip-benchmark's file en_NAME.json."""
    return json.loads(storage.third_party(f"en_{name}.json"))


def templates(name: str) -> list[str]:
    """Return the templates `name`, with {c} for the class: "openai80", "slip7", or clip-benchmark's key of a set."""
    known = _read("zeroshot_classification_templates")
    if name == "slip7":
        return [known["imagenet1k"][i] for i in _SEVEN]
    return known["imagenet1k"] if name == "openai80" else _EXTRA.get(name) or known[name]


def chosen(name: str, profile: Profile) -> str:
    """Return the name of a set's templates under a profile; `name` is the one in the table of sets."""
    if name == "imagenet":
        return profile.imagenet
    return f"clip_{name}" if profile.clips and f"clip_{name}" in _EXTRA else name


def prompts(names: Sequence[str | Sequence[str]], templates_of: str | Sequence[str]) -> list[list[str]]:
    """Return the prompts of each class: every template with its name, or with each of its synonyms.

    `templates_of` are the templates, or their name, see `templates`.
    """
    texts = templates(templates_of) if isinstance(templates_of, str) else templates_of
    synonyms = [[name] if isinstance(name, str) else list(name) for name in names]
    return [[text.replace("{c}", word) for word in words for text in texts] for words in synonyms]


def read_class_names(path: str) -> dict[str, str | list[str]]:
    """Read class names from a JSON file, {label: name} or {label: [name, synonym, ...]}; {} if `path` is ""."""
    if not path:
        return {}
    form = "{label: name} or {label: [name, ...]}"
    with storage.unreadable_as(f"class names {path!r} cannot be read; expected JSON, {form}"):
        content = json.loads(pathlib.Path(path).expanduser().read_text(encoding="utf-8"))
        words = [x if isinstance(x, list) else [x] for x in content.values()]
        if not all(names and all(name and isinstance(name, str) for name in names) for names in words):
            raise ValueError("a name is empty, or not a text")
    return content


def readable(label: str) -> str:
    """Return the class name in "001.Black_footed_Albatross", "/a/airplane_cabin" or "ApplyEyeMakeup".

    These are labels of CUB-200, SUN397 and UCF101.
    """
    label = re.sub(r"^/\w/|^\d+\.", "", label)
    return spaced(re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", label.replace("/", " ")))


def spaced(label: str) -> str:
    """Return `label` with spaces for underscores."""
    return " ".join(label.replace("_", " ").split())


def published(key: str) -> list[str]:
    """Return clip-benchmark's class names `key`."""
    return list(_EXTRA_NAMES.get(key) or _read("classnames")[key])


def _comparable(label: str) -> str:
    """Return `label` without case, spaces and punctuation, or as a number without leading zeros."""
    return str(int(label)) if label.isascii() and label.isdigit() else re.sub(r"\W|_", "", label.lower())


def match(labels: Sequence[str], *spellings: Sequence[str]) -> list[int]:
    """Return each label's position in the first spelling with all labels.

    Case, spaces, punctuation and leading zeros are ignored. A name that occurs twice in a spelling matches nothing.
    Raises `KeyError` with an unknown label, or one that equals another label.
    """
    known: set[str] = set()
    for spelling in spellings:
        plain = [_comparable(name) for name in spelling]
        index = {name: i for i, name in enumerate(plain) if plain.count(name) == 1}
        known |= index.keys()
        positions = [index.get(_comparable(label)) for label in labels]
        if None not in positions and len(set(positions)) == len(positions):
            return [position for position in positions if position is not None]
    raise KeyError(next((label for label in labels if _comparable(label) not in known), labels[-1]))


def class_names(key: str, labels: Sequence[str]) -> list[str]:
    """Return clip-benchmark's class names `key` in the order of a TFDS data set's labels.

    If the spelling differs, such as numbers, wnids or paraphrases, the orders are equal.
    """
    names = published(key)
    if len(names) != len(labels):
        raise UserError(f"{key} has {len(names)} class names and the data set {len(labels)} labels; use another split.")
    with contextlib.suppress(KeyError):
        return [names[i] for i in match(labels, names)]
    return names
