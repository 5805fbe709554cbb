"""Which sets of icons the corpus takes, who drew them, and what their names begin and end with."""

from collections.abc import Collection, Mapping
from typing import Any


def word_set(text: str) -> frozenset[str]:
    """The words of a text, each once."""
    return frozenset(text.split())


LICENCES = ("MIT", "Apache-2.0", "CC-BY-4.0", "ISC", "CC-BY-3.0", "CC0-1.0", "Unlicense", "BSD-3-Clause")

# Trade marks: their names say nothing about the picture.
BRAND_SETS = word_set(
    "bxl cib cryptocurrency cryptocurrency-color fa7-brands fa6-brands fa-brands logos nonicons selfhst simple-icons "
    "streamline-logos thesvg thesvg-color token token-branded devicon devicon-plain skill-icons gcp k8s unjs"
)
FILE_TYPE_SETS = word_set("catppuccin file-icons material-icon-theme vscode-icons")
EMOJI_SETS = word_set(
    "emojione emojione-monotone emojione-v1 fluent-emoji fluent-emoji-flat fluent-emoji-high-contrast fxemoji noto "
    "noto-v1 openmoji streamline-emojis twemoji"
)
FLAG_SETS = word_set("cif circle-flags flag flagpack")
ANIMATED_SETS = word_set("line-md svg-spinners")
TRADE_SETS = word_set("fad geo ginetex")  # symbols that nobody else draws
LEFT_OUT: Mapping[str, Collection[str]] = {
    "brand logos": BRAND_SETS,
    "file types and programs": FILE_TYPE_SETS,
    "emoji": EMOJI_SETS,
    "flags": FLAG_SETS,
    "animated": ANIMATED_SETS,
    "symbols of a trade": TRADE_SETS,
}
# What is drawn there is a thing, whatever company took its name.
THING_SETS = EMOJI_SETS | word_set("game-icons healthicons map gis maki temaki pinhead osmic roentgen")

# A set and its siblings by the same artist, its forks and its ports.
_FAMILIES = {
    "material": "material-symbols material-symbols-light ic mdi",
    "fontawesome": "fa7-solid fa7-regular fa6-solid fa6-regular fa-solid fa-regular la",
    "streamline": "covid guidance",  # and all sets with a name that begins with it
    "boxicons": "boxicons bx bxs",
    "feather": "feather lucide lucide-lab",
    "solar": "solar reicon",
    "iconpark": "icon-park icon-park-outline icon-park-solid icon-park-twotone",
    "fluent": "fluent fluent-color",
    "pepicons": "pepicons pepicons-pop pepicons-print pepicons-pencil",
    "unicons": "uil uim uis uit",
    "heroicons": "heroicons heroicons-outline heroicons-solid sidekickicons",
    "osm": "maki temaki pinhead osmic",
    "icons8": "icons8 wpf flat-color-icons",
    "glyphs": "glyphs glyphs-poly",
    "myna": "mynaui vadivam",
    "mono": "mono-icons mi",
    "ion": "ion famicons",
}
_FAMILY = {member: family for family, members in _FAMILIES.items() for member in members.split()}

# In these sets names begin with a category, which says nothing about the single picture.
_LEADING = {
    "streamline-pixel": (
        "interface-essential construction-building-real-eastate building-real-eastate business-products "
        "business-product coding-apps-websites coding-app-website computers-devices-electronics content-files design "
        "ecology email entertainment-events-hobbies food-drink health-beauty health beauty internet-network "
        "map-navigation money-payments music pet-animals photography romance school-science shopping-shipping "
        "social-rewards technology transportation travel-wayfinding video-movies weather"
    ),
    "streamline-block": (
        "arrowheads basic-ui content devices drink-food entertainment nature other-arrows other-ui programming smileys "
        "text-formatting travel"
    ),
    "streamline-freehand": (
        "business computers-devices content-files design design-process e-commerce form-edition job "
        "multimedia-controls programming-language text-formating wayfinding"
    ),
    "covid": (
        "covid-carrier graph mutation personal-hygiene quarantine-place symptoms transmission vaccine-protection "
        "virus-lab-research"
    ),
}
_LEADING["streamline-freehand-color"] = _LEADING["streamline-freehand"]
LEADING: Mapping[str, tuple[str, ...]] = {
    name: tuple(sorted(phrases.split(), key=lambda phrase: (-len(phrase), phrase)))
    for name, phrases in _LEADING.items()
}


def family(icon_set: str) -> str:
    """The family of a set: what is held out with it."""
    if icon_set == "streamline" or icon_set.startswith("streamline-"):
        return "streamline"
    return _FAMILY.get(icon_set, icon_set)


def kept(collections: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The sets that the corpus takes, sorted.

    Args:
      collections: set -> author, licence and more; content of the package's collections.json.
    """
    dropped = frozenset().union(*LEFT_OUT.values())
    return sorted(name for name in collections if name not in dropped and licence(collections[name]) in LICENCES)


def licence(collection: Mapping[str, Any]) -> str:
    """SPDX identifier of a set's licence; "" where the set names none."""
    return collection.get("license", {}).get("spdx", "")


def describe(name: str, collection: Mapping[str, Any]) -> dict[str, str]:
    """What attribution asks for: {set, title, author, licence, address, licence_address, family}."""
    author, terms = collection.get("author", {}), collection.get("license", {})
    return {
        "set": name,
        "title": collection.get("name", name),
        "author": author.get("name", ""),
        "licence": licence(collection),
        "address": author.get("url", ""),
        "licence_address": terms.get("url", ""),
        "family": family(name),
    }
