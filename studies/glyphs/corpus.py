"""Glyphs as image-text pairs: characters as typefaces draw them, with their names, from pinned npm packages.

Rules, counts and licences are in docs/glyphs.md. The parts: `characters` (names), `fonts` (typefaces and outlines),
`splits` (duplicates and splits); pictures, records and files are made as the icons' are.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import tensorflow_datasets as tfds

from studies.glyphs import characters, fonts, splits
from studies.glyphs.fonts import Glyph
from studies.icons import corpus, package
from studies.icons import splits as icon_splits
from studies.icons.corpus import Built, IconPairs

MIN_INK = 0.002  # a full stop has little
WHAT = "glyphs"

_DESCRIPTION = """\
Characters of Unicode {version} as typefaces of the npm scope @fontsource draw them, with captions made of the
characters' names. 64 x 64 RGB, black on white, all on one baseline. Typefaces are under the SIL Open Font License,
Apache-2.0 and others; LICENCES.md beside the data has copyright, licence and address of each. Names are under the
Unicode License. Drawn with fontTools (MIT) and resvg-py (MIT).
"""


@dataclasses.dataclass(frozen=True)
class Source:
    """Everything that a build reads.

    Attributes:
      glyphs: of all typefaces, sorted by id.
      sets: of every typeface, what attribution asks for; see `families.describe`.
      families: of each typeface.
      counts: of glyphs, fonts and characters.
    """

    glyphs: Sequence[Glyph]
    sets: Sequence[Mapping[str, str]]
    families: Mapping[str, str]
    counts: Mapping[str, int]


def read(typefaces: Sequence[fonts.Typeface] | None = None) -> Source:
    """Read names and typefaces from their packages, which are downloaded on first use.

    A build that was interrupted goes on with the packages that are there.

    Args:
      typefaces: by default all that are pinned.

    Raises:
      UserError: a package cannot be downloaded, or is damaged; fontTools is missing.
    """
    typefaces = fonts.typefaces() if typefaces is None else typefaces
    paths = [package.fetch(typeface.package) for typeface in typefaces]
    names = characters.read(package.fetch(characters.UCD), package.fetch(characters.CLDR))
    corpus.step(f"reading {len(typefaces)} typefaces, for {len(names):,} characters", WHAT)
    glyphs, sets = [], []
    for typeface, path in zip(typefaces, paths, strict=True):
        some, about = fonts.read(path, typeface, names)
        glyphs += some
        sets.append(about)
    glyphs.sort(key=lambda glyph: glyph.id)
    families = {typeface.name: typeface.family for typeface in typefaces}
    counts = {
        "characters with a name": len(names),
        "typefaces": len(families),
        "fonts": len({(glyph.icon_set, glyph.weight) for glyph in glyphs}),
        "glyphs": len(glyphs),
        "characters": len({glyph.code for glyph in glyphs}),
    }
    return Source(glyphs, sets, families, counts)


def build(source: Source) -> Built:
    """Draw the glyphs of `source`, take out duplicates and assign splits.

    Raises:
      UserError: resvg-py is missing.
    """
    drawn = icon_splits.families_of(source.glyphs, source.families.__getitem__)
    shared = [glyph for glyph in source.glyphs if len(drawn[glyph.concept]) >= icon_splits.MIN_FAMILIES]
    candidates = splits.limit(shared)
    counts = dict(source.counts) | {
        "of characters of two families": len(shared),
        "characters of two families": len({glyph.code for glyph in shared}),
        f"at most {splits.PER_CHARACTER} of a character": len(candidates),
    }
    glyphs, pictures, signatures = corpus.draw(candidates, WHAT, MIN_INK)
    counts["blank, full or broken"] = len(candidates) - len(glyphs)
    corpus.step("looking for duplicates", WHAT)
    made = splits.assign(glyphs, signatures, source.families)
    title = f"{characters.UCD.name} {characters.UCD.version}, {len(source.sets)} packages of fonts"
    report = corpus.make_report(glyphs, made, counts, source.sets, title, source.families.__getitem__)
    return Built(glyphs, pictures, made, report, source.sets)


class GlyphPairs(IconPairs):
    """TFDS builder `glyph_pairs`; its records have the icons' features.

    The id is "noto-sans/0159-400" (typeface, code point, weight), the set a typeface, the family its foundry or
    designer, name and aliases those of the character, and category its script, or its block in Unicode.

    Splits: train; test_concepts and validation_concepts, characters that are not in training at all;
    test_combinations and validation_combinations, letters with marks that training has on other letters;
    test_rendering and validation_rendering, known characters as drawn by families that are not in training.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None
    what, licences_title = WHAT, "Typefaces and their licences"

    @classmethod
    def check(cls) -> None:
        """Raise `UserError` where a package that a build needs is missing."""
        corpus.resvg_version()
        fonts.check()

    def describe(self) -> str:
        """What the data set is."""
        return _DESCRIPTION.format(version=characters.UCD.version)

    def build(self) -> Built:
        """The corpus of `source`."""
        source = self.source or read()
        self.family_of = source.families.__getitem__
        return build(source)


def prepare(data_dir: str | os.PathLike | None = None, source: Source | None = None) -> IconPairs:
    """The builder, ready to be read; see `studies.icons.corpus.prepare`."""
    return corpus.prepare(data_dir, source, GlyphPairs)
