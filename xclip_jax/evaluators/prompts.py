"""Class names, prompt templates and class subsets of the zero-shot sets, and the profiles of published tables.

Names and templates are those of clip-benchmark (MIT), in `data/third_party`; what differs is generated here.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence

from xclip_jax.core import storage
from xclip_jax.core.errors import UserError, check_choice
from xclip_jax.data.preprocessing import Preprocessing


@dataclasses.dataclass(frozen=True)
class Profile:
    """A project's protocol, for numbers that can be compared with its tables.

    Mean and standard deviation of pixels are not part of it: they belong to the weights.

    Attributes:
      imagenet: templates of ImageNet and its variants, "openai80" or "slip7".
      clips: whether the other sets have CLIP's own templates, which SLIP uses too, where clip-benchmark's differ.
      resample: how the shorter side is resized, "bicubic" or "bilinear"; "" to resize as the model does.
      published_prefix: text before the captions of published retrieval sets.
      prefix: text before captions of all retrieval sets in its place; None for that, and nothing before own captions.
      lower: whether captions are lower-cased, as SigLIP's are.
      captions: the number of first captions of each image that are kept; 0 for all.
      templates: of prompts for labelled images of one's own, with {c} for the class; empty for "a photo of a {c}".
      names: {label: name, or synonyms} of their classes; a label without an entry is its own name.

    Raises:
      UserError: a negative number of captions, or a template without {c}.
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

    def __post_init__(self) -> None:
        if self.captions < 0:
            raise UserError(f"--captions is {self.captions}; expected a number of captions, or 0 for all of them.")
        if wrong := [template for template in self.templates if "{c}" not in template]:
            raise UserError(f"template {wrong[0]!r} has no {{c}}, where the name of the class goes; add it.")

    def preprocessing(self, own: Preprocessing | int) -> Preprocessing:
        """Return the model's `own` preprocessing as the protocol changes it; a number is a size, with CLIP's."""
        own = Preprocessing(own) if isinstance(own, int) else own
        changed = {"resize_mode": "shortest", "resize_size": 0, "interpolation": self.resample} if self.resample else {}
        return dataclasses.replace(own, **changed)

    @property
    def caption_prefix(self) -> str:
        """Text before captions."""
        return self.published_prefix if self.prefix is None else self.prefix

    def texts(self, captions: Sequence[str]) -> list[str]:
        """Return an image's captions by the protocol."""
        kept = list(captions)[: self.captions or None]
        return [self.caption_prefix + (text.lower() if self.lower else text) for text in kept]


PROFILES = {
    "openai": Profile(published_prefix="a photo of "),  # of the CLIP paper's table 13
    "slip": Profile(imagenet="slip7", resample="bilinear"),
    "open_clip": Profile(clips=False),
}


def with_own(profile: Profile, templates: Sequence[str], class_names: str) -> Profile:
    """Return the profile with templates and a file of class names for labelled images of one's own."""
    return dataclasses.replace(profile, templates=tuple(templates), names=read_class_names(class_names))


# Indices among the 80 of the seven that forward selection chose (the CLIP repository's notebook); SLIP uses them.
_SEVEN = (73, 7, 44, 69, 35, 67, 64)

# Classes of ImageNet-A and ImageNet-R among ImageNet's 1000. The lists of wnids of clip_benchmark (datasets/builder.py)
# and those of big_vision (IMAGENET_A_LABELSET, IMAGENET_R_LABELSET) both give these.
# fmt: off
IMAGENET_A = (
    6, 11, 13, 15, 17, 22, 23, 27, 30, 37, 39, 42, 47, 50, 57, 70, 71, 76, 79, 89, 90, 94, 96, 97, 99, 105, 107, 108,
    110, 113, 124, 125, 130, 132, 143, 144, 150, 151, 207, 234, 235, 254, 277, 283, 287, 291, 295, 298, 301, 306, 307,
    308, 309, 310, 311, 313, 314, 315, 317, 319, 323, 324, 326, 327, 330, 334, 335, 336, 347, 361, 363, 372, 378, 386,
    397, 400, 401, 402, 404, 407, 411, 416, 417, 420, 425, 428, 430, 437, 438, 445, 456, 457, 461, 462, 470, 472, 483,
    486, 488, 492, 496, 514, 516, 528, 530, 539, 542, 543, 549, 552, 557, 561, 562, 569, 572, 573, 575, 579, 589, 606,
    607, 609, 614, 626, 627, 640, 641, 642, 643, 658, 668, 677, 682, 684, 687, 701, 704, 719, 736, 746, 749, 752, 758,
    763, 765, 768, 773, 774, 776, 779, 780, 786, 792, 797, 802, 803, 804, 813, 815, 820, 823, 831, 833, 835, 839, 845,
    847, 850, 859, 862, 870, 879, 880, 888, 890, 897, 900, 907, 913, 924, 932, 933, 934, 937, 943, 945, 947, 951, 954,
    956, 957, 959, 971, 972, 980, 981, 984, 986, 987, 988,
)
IMAGENET_R = (
    1, 2, 4, 6, 8, 9, 11, 13, 22, 23, 26, 29, 31, 39, 47, 63, 71, 76, 79, 84, 90, 94, 96, 97, 99, 100, 105, 107, 113,
    122, 125, 130, 132, 144, 145, 147, 148, 150, 151, 155, 160, 161, 162, 163, 171, 172, 178, 187, 195, 199, 203, 207,
    208, 219, 231, 232, 234, 235, 242, 245, 247, 250, 251, 254, 259, 260, 263, 265, 267, 269, 276, 277, 281, 288, 289,
    291, 292, 293, 296, 299, 301, 308, 309, 310, 311, 314, 315, 319, 323, 327, 330, 334, 335, 337, 338, 340, 341, 344,
    347, 353, 355, 361, 362, 365, 366, 367, 368, 372, 388, 390, 393, 397, 401, 407, 413, 414, 425, 428, 430, 435, 437,
    441, 447, 448, 457, 462, 463, 469, 470, 471, 472, 476, 483, 487, 515, 546, 555, 558, 570, 579, 583, 587, 593, 594,
    596, 609, 613, 617, 621, 629, 637, 657, 658, 701, 717, 724, 763, 768, 774, 776, 779, 780, 787, 805, 812, 815, 820,
    824, 833, 847, 852, 866, 875, 883, 889, 895, 907, 928, 931, 932, 933, 934, 936, 937, 943, 945, 947, 948, 949, 951,
    953, 954, 957, 963, 965, 967, 980, 981, 983, 988,
)
# fmt: on

# CLIP's own templates (its repository's prompts.md; SLIP's templates.json has the same) of sets that clip-benchmark
# lacks, or has other templates of ("clip_..."): generated from the pattern that they follow.
_VERBS = ("", "using ", "doing ", "during ", "performing ", "practicing ")
_NOUNS = ("photo", "video", "example", "demonstration")
_VIEWS = tuple(f"{how} {what}" for what in ("imagery", "photo", "view") for how in ("satellite", "aerial"))
_OWN = {
    "birds": ["a photo of a {c}, a type of bird."],
    "hatefulmemes": ["a {c}."],
    "ucf101": [f"a {noun} of {one} person {verb}{{c}}." for verb in _VERBS for one in ("a", "the") for noun in _NOUNS],
    "kinetics700": [f"a {noun} of {who}{{c}}." for noun in _NOUNS for who in ("", *(f"a person {v}" for v in _VERBS))],
    "clip_resisc45": [f"{view} of {article}{{c}}." for article in ("", "a ", "the ") for view in _VIEWS],
    "clip_clevr_count_all": ["a photo of {c} objects."],
    "clip_pcam": ["this is a photo of {c}"],
}
_OWN_NAMES = {"hatefulmemes": ["meme", "hatespeech meme"]}
# Of FER2013's classes, in CLIP and SLIP; the mean is over templates and synonyms.
SYNONYMS = {
    "happy": ["happy", "smiling"],
    "sad": ["sad", "depressed"],
    "surprised": ["surprised", "shocked", "spooked"],
    "neutral": ["neutral", "bored"],
}


@functools.cache
def _read(name: str) -> dict[str, list[str]]:
    """Return the content of clip-benchmark's file en_NAME.json."""
    return json.loads(storage.third_party(f"en_{name}.json"))


def templates(name: str) -> list[str]:
    """Return the templates `name`, with {c} for the class: "openai80", "slip7", or a set's own by clip-benchmark's key.

    Raises:
      UserError: an unknown name; the message lists the known ones.
    """
    known = _read("zeroshot_classification_templates")
    if name in ("openai80", "slip7"):
        texts = known["imagenet1k"]
        return [texts[i] for i in _SEVEN] if name == "slip7" else texts
    check_choice("the name of templates", name, ["openai80", "slip7", *_OWN, *known])
    return _OWN.get(name) or known[name]


def chosen(name: str, profile: Profile) -> str:
    """Return the name of a set's templates under a profile; `name` is that of its own, "imagenet" for ImageNet's."""
    if name == "imagenet":
        return profile.imagenet
    return f"clip_{name}" if profile.clips and f"clip_{name}" in _OWN else name


def prompts(names: Sequence[str | Sequence[str]], templates_of: str | Sequence[str]) -> list[list[str]]:
    """Return each class's prompts: every template with its name, or with each of its synonyms.

    Args:
      names: of the classes.
      templates_of: name of the templates, see `templates`, or the templates themselves.
    """
    texts = templates(templates_of) if isinstance(templates_of, str) else templates_of
    synonyms = [[name] if isinstance(name, str) else list(name) for name in names]
    # str.format fails on braces in a name.
    return [[text.replace("{c}", word) for word in words for text in texts] for words in synonyms]


def read_class_names(path: str) -> dict[str, str | list[str]]:
    """Read names of classes from a JSON file, {label: name} or {label: [name, synonym, ...]}; {} where path is "".

    Raises:
      UserError: no such file, or another content.
    """
    if not path:
        return {}
    try:
        content = json.loads(pathlib.Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"class names {path!r} cannot be read ({error}); expected a JSON file {{label: name}}."
        ) from error
    if not isinstance(content, dict) or not all(
        words and (isinstance(words, str) or (isinstance(words, list) and all(isinstance(w, str) for w in words)))
        for words in content.values()
    ):
        raise UserError(f"class names {path!r} are not {{label: name}} or {{label: [name, synonym, ...]}}.")
    return content


def readable(label: str) -> str:
    """Return the class name in a label of CUB-200, SUN397 or UCF101, such as "001.Black_footed_Albatross".

    The others are like "/a/airplane_cabin" and "ApplyEyeMakeup". Not for labels of other sets.
    """
    label = re.sub(r"^/\w/|^\d+\.", "", label)
    return spaced(re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", label.replace("/", " ")))


def spaced(label: str) -> str:
    """Return `label` with spaces for underscores."""
    return " ".join(label.replace("_", " ").split())


def published(key: str) -> list[str]:
    """Return the class names that clip-benchmark calls `key`."""
    return list(_OWN_NAMES.get(key) or _read("classnames")[key])


def _comparable(label: str) -> str:
    """Return `label` without case, spaces and punctuation, or as a number without leading zeros."""
    return str(int(label)) if label.isascii() and label.isdigit() else re.sub(r"\W|_", "", label.lower())


def match(labels: Sequence[str], *spellings: Sequence[str]) -> list[int]:
    """Return each label's position in the first of `spellings` that has all of `labels`.

    Case, spaces, punctuation and leading zeros do not count. Names that a spelling has twice match nothing.

    Raises:
      KeyError: the label that is missing from the most likely spelling, or is one class with another label.
    """
    unmatched: list[tuple[int, str]] = []
    for spelling in spellings:
        plain = [_comparable(name) for name in spelling]
        index = {name: i for i, name in enumerate(plain) if plain.count(name) == 1}
        positions: dict[int, str] = {}
        for label in labels:
            position = index.get(_comparable(label))
            if position is None or position in positions:
                unmatched.append((len(positions), label))
                break
            positions[position] = label
        else:
            return list(positions)
    # The most likely spelling is the one with the most labels before its first unmatched one.
    raise KeyError(max(unmatched, key=lambda item: item[0])[1])


def class_names(key: str, labels: Sequence[str]) -> list[str]:
    """Return the names of a TFDS data set's classes, in the order of its own `labels`.

    Args:
      key: clip-benchmark's key of the names.
      labels: the data set's labels, in its order.

    Raises:
      UserError: the number of names and of labels, or their order, differs.
    """
    names = published(key)
    if len(names) != len(labels):
        raise UserError(f"{key} has {len(names)} class names and the data set {len(labels)} labels; use another split.")
    theirs, ours = [_comparable(name) for name in names], [_comparable(label) for label in labels]
    if set(theirs) == set(ours) and len(set(ours)) == len(ours):
        return [names[theirs.index(name)] for name in ours]
    # Labels without meaning (numbers, wnids), or in other words: the order is the same, as those with equal spelling
    # show.
    moved = [name for i, name in enumerate(ours) if name in theirs and theirs[i] != name and theirs.count(name) == 1]
    if moved:
        raise UserError(f"the labels of {key} are in another order than its class names ({moved[0]!r} is one of them).")
    return list(names)
