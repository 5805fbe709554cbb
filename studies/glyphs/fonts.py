"""Glyphs of the fonts in pinned npm packages, as outlines in SVG.

Packages of Fontsource have a WOFF file for each weight and subset of a typeface; `typefaces.tsv` lists the packages.
"""

import dataclasses
import io
import math
import pathlib
import re
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any

from studies.glyphs.characters import Character
from studies.icons.package import Icon, Package
from xclip_jax.core.errors import UserError

WEIGHTS = (400, 700)
# What a picture shows, in em from the baseline; a glyph that goes beyond widens it.
BOTTOM, TOP, MARGIN = -0.25, 0.95, 0.04
UNITS = 1000  # of a drawing, an em
_SCOPE = "@fontsource"
_PROJECT = "https://fontsource.org/fonts"
_COPYRIGHT, _TITLE = 0, 1  # ids of a font's name table


@dataclasses.dataclass(frozen=True, slots=True)
class Typeface:
    """A typeface of the corpus.

    Attributes:
      name: as in the package's: "noto-sans".
      family: of its foundry or designer, who is held out with all of their typefaces.
      package: that has it.
    """

    name: str
    family: str
    package: Package


@dataclasses.dataclass(frozen=True, slots=True)
class Glyph(Icon):
    """A character as a typeface draws it; `icon_set` is the typeface and `name` the code point and weight.

    Attributes:
      code: code point of the character.
      weight: 400 is regular, 700 bold.
      place: width, lowest and highest point, in em.
    """

    code: int
    weight: int
    place: tuple[float, float, float]


def typefaces() -> list[Typeface]:
    """The pinned typefaces, sorted by name."""
    lines = pathlib.Path(__file__).with_name("typefaces.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return sorted(
        (
            Typeface(name, family, Package(f"{_SCOPE}/{name}", version, integrity))
            for name, version, family, integrity in rows
        ),
        key=lambda typeface: typeface.name,
    )


def check() -> None:
    """Raise `UserError` where fontTools is missing."""
    try:
        import fontTools  # noqa: F401
    except ImportError as error:
        raise UserError("the glyphs need the package 'fonttools': pip install 'xclip_jax[glyphs]'.") from error


def read(
    path: pathlib.Path, typeface: Typeface, characters: Mapping[int, Character]
) -> tuple[list[Glyph], dict[str, str]]:
    """Glyphs of a package's upright fonts, in order of weight and code point, and what attribution asks for.

    Args:
      path: of the package.
      typeface: that it has.
      characters: those that are drawn, by code point.

    Raises:
      UserError: fontTools is missing, or the package is damaged.
    """
    glyphs: dict[tuple[int, int], Glyph] = {}
    about = {"set": typeface.name, "title": typeface.name, "author": "", "licence": "", "licence_address": ""}
    about |= {"address": f"{_PROJECT}/{typeface.name}", "family": typeface.family}
    try:
        for weight, content in sorted(_files(path, typeface.name), key=lambda item: item[0]):
            if not weight:
                about["licence"] = content.decode()
                continue
            font = open_font(content)
            if not about["author"]:
                about["author"] = _text(font, _COPYRIGHT)
                about["title"] = _text(font, _TITLE) or typeface.name
            for glyph in outlines(font, typeface, weight, characters):
                glyphs.setdefault((weight, glyph.code), glyph)  # subsets overlap
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise UserError(f"package {str(path)!r} is damaged ({error}); delete it to download it again.") from error
    return [glyphs[key] for key in sorted(glyphs)], about


def open_font(content: bytes) -> Any:
    """A font of fontTools."""
    check()
    from fontTools.ttLib import TTFont, TTLibError

    try:
        return TTFont(io.BytesIO(content), lazy=True)
    except TTLibError as error:
        raise ValueError(str(error)) from error


def _files(path: pathlib.Path, name: str) -> Iterator[tuple[int, bytes]]:
    """Weight and content of the WOFF files of `WEIGHTS`, by name; and 0 with the licence's identifier."""
    font = re.compile(rf"package/files/{re.escape(name)}-[a-z-]+-(\d+)-normal\.woff")
    with tarfile.open(path, "r:gz") as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            file = archive.extractfile(member)
            if member.name == "package/package.json" and file:
                licence = re.search(r'"license":\s*"([^"]+)"', file.read().decode())
                yield 0, (licence[1] if licence else "").encode()
            if file and (match := font.fullmatch(member.name)) and int(match[1]) in WEIGHTS:
                yield int(match[1]), file.read()


def _text(font: Any, number: int) -> str:
    """A text of a font's name table on one line."""
    return " ".join((font["name"].getDebugName(number) or "").split())


def outlines(font: Any, typeface: Typeface, weight: int, characters: Mapping[int, Character]) -> Iterator[Glyph]:
    """The glyphs of a font that have an outline, one for each character."""
    from fontTools.pens.boundsPen import BoundsPen
    from fontTools.pens.svgPathPen import SVGPathPen

    drawn, em = font.getGlyphSet(), font["head"].unitsPerEm
    for code, name in sorted((font.getBestCmap() or {}).items()):
        if code not in characters:
            continue
        path, bounds = SVGPathPen(drawn, ntos=lambda x: format(x, "g")), BoundsPen(drawn)
        drawn[name].draw(path)
        drawn[name].draw(bounds)
        if bounds.bounds is None:
            continue
        character, (left, bottom, right, top) = characters[code], (x / em for x in bounds.bounds)
        # In a font the y axis points up, in an SVG down.
        scale = UNITS / em
        body = f'<path transform="scale({scale:g} {-scale:g})" d="{path.getCommands()}"/>'
        yield Glyph(
            typeface.name, f"{code:04X}-{weight}", character.name, character.concept, character.aliases,
            [character.label], body, box(left, bottom, right, top), code, weight, (right - left, bottom, top),
        )  # fmt: skip


def box(left: float, bottom: float, right: float, top: float) -> tuple[float, float, float, float]:
    """Left, top, width and height of what a picture shows of a glyph with these bounds, y pointing down.

    The glyph stands in the middle, on the same baseline in all pictures, so that size and height tell "o" from "O".
    Bounds are in em; the box is in whole thousandths, since the renderer rounds the size of a drawing.
    """
    low, high = min(BOTTOM, bottom - MARGIN), max(TOP, top + MARGIN)
    height = math.ceil(UNITS * (high - low))
    width = max(height, math.ceil(UNITS * (right - left + 2 * MARGIN)))
    return round(UNITS * (left + right) / 2 - width / 2), -round(UNITS * high), width, height
