"""Which glyphs are in the corpus, and in which of its splits: by sha256 of names, as for the icons.

Beside concepts and families of artists combinations are held out: "latin small letter r with caron", where training
has "latin small letter r" and other letters with caron.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from studies.glyphs.characters import concept, parts, without_case
from studies.glyphs.fonts import Glyph
from studies.icons.splits import (
    MIN_FAMILIES,
    RENDERING,
    UNSEEN,
    Corpus,
    families_of,
    first_by_hash,
    first_drawings,
    hash_rank,
    near_duplicates,
    separate,
)

COMBINATIONS = ("test_combinations", "validation_combinations")
SPLITS = ("train", *UNSEEN, *COMBINATIONS, *RENDERING)
UNSEEN_FAMILIES = 4  # that draw a concept which may be unseen
CONCEPTS, COMBINED, FAMILIES = (400, 200), (300, 150), (8, 4)  # for tests and for validation
PER_CHARACTER = 24  # drawings; a hundred typefaces have the letters of Latin
FAMILY_DRAWINGS = (100, 2500)  # of a family that may be held out
MIN_BASES = 4  # that training has with the mark of an unseen combination
SAME_PLACE = 1 / 24  # of an em, up to which two drawings have one size and height
_BLOCK = 512


def limit(glyphs: Sequence[Glyph]) -> list[Glyph]:
    """At most `PER_CHARACTER` glyphs of a character, the first by hash of their ids, in the order of `glyphs`."""
    groups: dict[int, list[str]] = collections.defaultdict(list)
    for glyph in glyphs:
        groups[glyph.code].append(glyph.id)
    ranked = (sorted(ids, key=lambda name: hash_rank("glyph variant", name)) for ids in groups.values())
    kept = {name for ids in ranked for name in ids[:PER_CHARACTER]}
    return [glyph for glyph in glyphs if glyph.id in kept]


def repeated(glyphs: Sequence[Glyph], signatures: np.ndarray) -> np.ndarray:
    """Whether a font draws another character, with a lower code point, the same: bool (n,).

    The same is the icons' rule for signatures, and the same width, lowest and highest point: fonts have one outline for
    latin, greek and cyrillic a, but "o" and "O" differ in size, and a full stop and a middle dot in height.

    Args:
      glyphs: of all fonts.
      signatures: of their drawings, uint8 (n, 256).
    """
    fonts: dict[tuple[str, int], list[int]] = collections.defaultdict(list)
    for i, glyph in enumerate(glyphs):
        fonts[glyph.icon_set, glyph.weight].append(i)
    places, result = np.array([glyph.place for glyph in glyphs], np.float32), np.zeros(len(glyphs), bool)
    for members in fonts.values():
        ordered = np.array(sorted(members, key=lambda i: glyphs[i].code))
        for start in range(0, len(ordered), _BLOCK):
            some, lower = ordered[start : start + _BLOCK], ordered[: start + _BLOCK]
            same = near_duplicates(signatures[some], signatures[lower])
            same &= (np.abs(places[some][:, None] - places[lower]) < SAME_PLACE).all(axis=-1)
            same &= np.arange(len(lower)) < start + np.arange(len(some))[:, None]
            result[some] = same.any(axis=1)
    return result


def distinct(glyphs: Sequence[Glyph], repeats: np.ndarray) -> list[int]:
    """Indices of the glyphs that repeat none, of characters that at least half of the fonts draw differently."""
    drawn, again = collections.Counter(g.concept for g in glyphs), collections.Counter[str]()
    again.update(glyph.concept for glyph, repeat in zip(glyphs, repeats, strict=True) if repeat)
    return [i for i, g in enumerate(glyphs) if not repeats[i] and 2 * again[g.concept] <= drawn[g.concept]]


def held_out_combinations(names: Iterable[str], eligible: Iterable[str], numbers: Sequence[int]) -> dict[str, str]:
    """Name -> split of held-out combinations, as many for each of `COMBINATIONS` as `numbers` has, or few more.

    A capital letter is held out with its small one. Bases stay in training, and every mark stays there on `MIN_BASES`.

    Args:
      names: of all characters of the corpus.
      eligible: those that may be held out, for the number of their drawings.
      numbers: of names of each split.
    """
    known, bases = set(names), collections.Counter[str]()
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for name in sorted(known):
        base, mark = parts(name)
        bases[mark] += bool(mark)
        if mark and base in known and not parts(base)[1]:
            groups[without_case(name)].append(name)
    allowed, held = set(eligible), {}
    order = sorted(groups, key=lambda group: hash_rank("glyph combination", group))
    for split, number in zip(COMBINATIONS, numbers, strict=True):
        left = number
        for group in order:
            members = [name for name in groups[group] if name in allowed]
            mark = parts(group)[1]
            if left > 0 and members and groups[group][0] not in held and bases[mark] - len(groups[group]) >= MIN_BASES:
                held |= dict.fromkeys(groups[group], split)
                bases[mark] -= len(groups[group])
                left -= len(members)
    return held


def roles_of(glyphs: Sequence[Glyph], family_of: Mapping[str, str]) -> dict[str, str]:
    """Concept -> split of what training lacks: whole characters that no name builds on, and combinations.

    Args:
      glyphs: of the corpus.
      family_of: family of each typeface.
    """
    drawn = families_of(glyphs, family_of.__getitem__)
    names = {glyph.caption for glyph in glyphs}
    enough = sorted(name for name in names if len(drawn[concept(name)]) >= UNSEEN_FAMILIES)
    bases = {parts(name)[0] for name in names if parts(name)[1]}
    whole = [name for name in enough if not parts(name)[1] and name not in bases]
    unseen = first_by_hash(whole, "glyph", dict(zip(UNSEEN, CONCEPTS, strict=True)))
    unseen |= held_out_combinations(names, enough, COMBINED)
    return {concept(name): role for name, role in unseen.items()}


def assign(glyphs: Sequence[Glyph], signatures: np.ndarray, family_of: Mapping[str, str]) -> Corpus:
    """The corpus of drawn glyphs.

    Args:
      glyphs: that could be drawn, in order of id.
      signatures: of their drawings, uint8 (n, 256); see `drawing.signature`.
      family_of: family of each typeface.
    """
    counts = {"drawn": len(glyphs)}
    kept = distinct(glyphs, repeated(glyphs, signatures))
    counts["as the font draws another character, or half of the fonts do"] = len(glyphs) - len(kept)
    first = [kept[i] for i in first_drawings([glyphs[i] for i in kept], signatures[kept])]
    counts["duplicates within a character"] = len(kept) - len(first)
    drawn = families_of((glyphs[i] for i in first), family_of.__getitem__)
    pool = [i for i in first if len(drawn[glyphs[i].concept]) >= MIN_FAMILIES]
    counts["of one family after that"] = len(first) - len(pool)
    unseen = roles_of([glyphs[i] for i in pool], family_of)
    low, high = FAMILY_DRAWINGS
    sizes = collections.Counter(family_of[glyphs[i].icon_set] for i in pool)
    middling = sorted(name for name, size in sizes.items() if low <= size <= high)
    held = first_by_hash(middling, "glyph family", dict(zip(RENDERING, FAMILIES, strict=True)))
    splits: dict[str, list[int]] = {split: [] for split in SPLITS}
    for i in pool:
        splits[unseen.get(glyphs[i].concept) or held.get(family_of[glyphs[i].icon_set]) or "train"].append(i)
    counts |= separate(splits, glyphs, signatures, (*UNSEEN, *COMBINATIONS))
    counts["combinations without their parts in training"] = _with_parts(splits, glyphs)
    counts["corpus"] = sum(map(len, splits.values()))
    aliases = {i: glyphs[i].aliases for members in splits.values() for i in members}
    present = {glyphs[i].concept for members in splits.values() for i in members}
    roles = {name: unseen.get(name, "train") for name in sorted(present)}
    return Corpus(splits, roles, {name: held.get(name, "train") for name in sorted(sizes)}, aliases, counts)


def _with_parts(splits: dict[str, list[int]], glyphs: Sequence[Glyph]) -> int:
    """Take combinations out of `splits` whose base or mark has no drawing in training; the number of drawings."""
    names = {glyphs[i].caption for i in splits["train"]}
    marks = {parts(name)[1] for name in names}
    gone = 0
    for split in COMBINATIONS:
        kept = [i for i in splits[split] if (p := parts(glyphs[i].caption))[0] in names and p[1] in marks]
        gone += len(splits[split]) - len(kept)
        splits[split] = kept
    return gone
