"""Which icons are in the corpus, and in which of its splits: by sha256 of names, so that no result can influence it."""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from studies.icons.families import family
from studies.icons.names import concept as concept_of
from studies.icons.package import Icon

SALT = "xclip_jax icons 2026"
PER_SET = 2  # drawings of one concept by one set
MIN_FAMILIES, UNSEEN_FAMILIES = 2, 4  # that draw a concept of the corpus; one that may be unseen
TEST_CONCEPTS, VALIDATION_CONCEPTS = 455, 200
TEST_FAMILIES, VALIDATION_FAMILIES, FAMILY_DRAWINGS = 8, 4, (150, 1200)
MIN_TESTED = 3  # drawings of an unseen concept
# Signatures are 256 bytes; they are the same drawing below a root mean square of 0.05 of the whole range.
LIMIT = (0.05 * 255) ** 2 * 256
UNSEEN = ("test_concepts", "validation_concepts")
RENDERING = ("test_rendering", "validation_rendering")
SPLITS = ("train", *UNSEEN, *RENDERING)
_BLOCK = 512


def hash_rank(what: str, name: str) -> str:
    """The place of a name in the order by which `what` is drawn, as a string that sorts."""
    return hashlib.sha256(f"{SALT}/{what}/{name}".encode()).hexdigest()


def digest(names: Iterable[str]) -> str:
    """Hex sha256 of names, one a line, in their order."""
    return hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The corpus.

    Attributes:
      splits: split -> indices of its drawings, ascending.
      roles: of every concept, "train", "test_concepts" or "validation_concepts".
      families: of every family, "train", "test_rendering" or "validation_rendering".
      aliases: of each drawing in a split, by its index, without those that name an unseen concept.
      counts: of drawings by what became of them, in the order of the rules.
    """

    splits: Mapping[str, Sequence[int]]
    roles: Mapping[str, str]
    families: Mapping[str, str]
    aliases: Mapping[int, Sequence[str]]
    counts: Mapping[str, int]


def limit_per_set(icons: Sequence[Icon]) -> list[Icon]:
    """At most `PER_SET` icons of a set and concept, the first by hash of their ids, in the order of `icons`."""
    groups = collections.defaultdict(list)
    for icon in icons:
        groups[icon.icon_set, icon.concept].append(icon.id)
    kept = {i for ids in groups.values() for i in sorted(ids, key=lambda name: hash_rank("variant", name))[:PER_SET]}
    return [icon for icon in icons if icon.id in kept]


def families_of(icons: Iterable[Icon], family_of: Callable[[str], str] = family) -> dict[str, set[str]]:
    """Concept -> families that draw it; `family_of` returns the family of a set."""
    drawn = collections.defaultdict(set)
    for icon in icons:
        drawn[icon.concept].add(family_of(icon.icon_set))
    return dict(drawn)


def concepts_of_two_families(icons: Sequence[Icon]) -> list[Icon]:
    """Icons of the concepts that `MIN_FAMILIES` families or more draw, in their order."""
    drawn = families_of(icons)
    return [icon for icon in icons if len(drawn[icon.concept]) >= MIN_FAMILIES]


def near_duplicates(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether signatures uint8 (n, 256) and (m, 256) belong to the same drawing: bool (n, m).

    The products are whole numbers below 2 ** 24, so that fp32 has them exactly, whatever the order of the sums.
    """
    lengths = [np.square(x, dtype=np.int32).sum(axis=1, dtype=np.int32) for x in (a, b)]
    product = (a.astype(np.float32) @ b.astype(np.float32).T).astype(np.int32)
    return lengths[0][:, None] + lengths[1] - 2 * product < LIMIT


def near_any(a: np.ndarray, b: np.ndarray, labels: tuple[Sequence[str], Sequence[str]] | None = None) -> np.ndarray:
    """Whether each of `a` is the same drawing as any of `b`, bool (n,); with labels, as any of another label."""
    if not len(b):
        return np.zeros(len(a), bool)
    hits = []
    for start in range(0, len(a), _BLOCK):
        same = near_duplicates(a[start : start + _BLOCK], b)
        if labels is not None:
            same &= np.asarray(labels[0])[start : start + _BLOCK, None] != np.asarray(labels[1])
        hits.append(same.any(axis=1))
    return np.concatenate(hits) if hits else np.zeros(0, bool)


def first_drawings(icons: Sequence[Icon], signatures: np.ndarray) -> list[int]:
    """Indices of the icons that repeat no other drawing of their concept; of equal ones the first by hash stays."""
    groups = collections.defaultdict(list)
    for i, icon in enumerate(icons):
        groups[icon.concept].append(i)
    kept: list[int] = []
    for members in groups.values():
        members = sorted(members, key=lambda i: hash_rank("duplicate", icons[i].id))
        same = near_duplicates(signatures[members], signatures[members])
        chosen: list[int] = []
        for place in range(len(members)):
            if not same[place, chosen].any():
                chosen.append(place)
        kept += [members[place] for place in chosen]
    return sorted(kept)


def first_by_hash(names: Iterable[str], what: str, roles: Mapping[str, int]) -> dict[str, str]:
    """Name -> role of the first names by hash, as many of each role as `roles` has."""
    order, assigned = sorted(names, key=lambda name: hash_rank(what, name)), {}
    for role, number in roles.items():
        assigned |= dict.fromkeys(order[:number], role)
        order = order[number:]
    return assigned


def assign(icons: Sequence[Icon], signatures: np.ndarray) -> Corpus:
    """The corpus of drawn icons.

    Args:
      icons: of `shared`, those that could be drawn, sorted by id.
      signatures: uint8 (n, 256), see `drawing.signature`.
    """
    signatures = np.asarray(signatures, np.uint8)
    counts = {"drawn": len(icons)}
    first = first_drawings(icons, signatures)
    drawn = families_of(icons[i] for i in first)
    pool = [i for i in first if len(drawn[icons[i].concept]) >= MIN_FAMILIES]
    counts["duplicates within a concept"] = len(icons) - len(first)
    counts["of one family after that"] = len(first) - len(pool)
    unseen = first_by_hash(
        sorted(concept for concept, families in drawn.items() if len(families) >= UNSEEN_FAMILIES),
        "concept",
        dict(zip(UNSEEN, (TEST_CONCEPTS, VALIDATION_CONCEPTS), strict=True)),
    )
    counts["concepts of four families"] = sum(len(families) >= UNSEEN_FAMILIES for families in drawn.values())
    low, high = FAMILY_DRAWINGS
    sizes = collections.Counter(family(icons[i].icon_set) for i in pool)
    held = first_by_hash(
        sorted(name for name, size in sizes.items() if low <= size <= high),
        "family",
        dict(zip(RENDERING, (TEST_FAMILIES, VALIDATION_FAMILIES), strict=True)),
    )
    splits: dict[str, list[int]] = {split: [] for split in SPLITS}
    for i in pool:
        splits[unseen.get(icons[i].concept) or held.get(family(icons[i].icon_set)) or "train"].append(i)
    counts |= separate(splits, icons, signatures)
    aliases, dropped = _aliases(splits, icons, unseen)
    counts["aliases of training drawings that name an unseen concept"] = dropped
    counts["corpus"] = sum(map(len, splits.values()))
    present = {icons[i].concept for split in splits.values() for i in split}
    roles = {concept: unseen.get(concept, "train") for concept in sorted(present)}
    return Corpus(splits, roles, {name: held.get(name, "train") for name in sorted(sizes)}, aliases, counts)


def separate(
    splits: dict[str, list[int]], icons: Sequence[Icon], signatures: np.ndarray, unseen: Sequence[str] = UNSEEN
) -> dict[str, int]:
    """Take out of `splits` what two of them share, and what cannot be tested; the counts of what is taken out.

    Args:
      splits: indices of drawings, of training, `RENDERING` and `unseen`; those that are taken out leave it.
      icons: all of the drawings.
      signatures: of them, uint8 (n, 256).
      unseen: splits of concepts that training lacks.
    """

    def drop(split: str, dropped: Iterable[bool]) -> int:
        kept = [i for i, gone in zip(splits[split], dropped, strict=True) if not gone]
        number = len(splits[split]) - len(kept)
        splits[split] = kept
        return number

    counts = {}
    tested = [i for split in unseen for i in splits[split]]
    counts["training drawings that equal an unseen concept's"] = drop(
        "train", near_any(signatures[splits["train"]], signatures[tested])
    )
    concepts = [icons[i].concept for i in tested]
    ambiguous = dict(zip(tested, near_any(*[signatures[tested]] * 2, (concepts, concepts)), strict=True))
    counts["drawings that two unseen concepts share"] = sum(
        drop(split, [ambiguous[i] for i in splits[split]]) for split in unseen
    )
    counts["held-out families' drawings that equal a training drawing"] = sum(
        drop(split, near_any(signatures[splits[split]], signatures[splits["train"]])) for split in RENDERING
    )
    known = {icons[i].concept for i in splits["train"]}
    counts["held-out families' drawings of concepts that training lacks"] = sum(
        drop(split, [icons[i].concept not in known for i in splits[split]]) for split in RENDERING
    )
    few = 0
    for split in unseen:
        drawings = collections.Counter(icons[i].concept for i in splits[split])
        few += drop(split, [drawings[icons[i].concept] < MIN_TESTED for i in splits[split]])
    counts["drawings of unseen concepts with fewer than three"] = few
    return counts


def _aliases(
    splits: Mapping[str, Sequence[int]], icons: Sequence[Icon], unseen: Mapping[str, str]
) -> tuple[dict[int, list[str]], int]:
    """Aliases of each drawing, and how many of training drawings name an unseen concept and are left out."""
    aliases = {i: list(icons[i].aliases) for members in splits.values() for i in members}
    dropped = 0
    for i in splits["train"]:
        allowed = [text for text in aliases[i] if concept_of(text) not in unseen]
        dropped += len(aliases[i]) - len(allowed)
        aliases[i] = allowed
    return aliases, dropped
