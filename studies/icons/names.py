"""Captions and concepts out of the names that icons have in their sets."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from studies.icons.families import LEADING, word_set

MAX_WORDS, MAX_DIGITS, MIN_LETTERS, MAX_WORD = 5, 2, 3, 18

# Styles and variants, wherever they end a name. "line" is none: it is a thing in "chart line".
_STYLES = word_set(
    "outline outlined filled fill solid bold light thin regular linear duotone twotone sharp rounded duo flat remix "
    "alt variant icon stroke hollow negative o"
)
_SIZE = re.compile(r"\d{1,2}|\d{2,3}px")  # and variant numbers
_NUMBERS = word_set("one two three four five six seven eight nine ten")  # variants in IconPark
_TRAILING_NUMBER = re.compile(r"([a-z]{3,})\d{1,2}x?")  # and sizes such as 2x
# Letters and digits are drawn in frames; a name that has nothing else names no thing.
_FRAMES = word_set(
    "letter number numeric alpha alphabet keycap circle square box rectangle hexagon diamond octagon triangle "
    "superscript subscript lowercase uppercase small capital"
)
_CATCH_ALL = word_set(
    "other others misc uncategorised uncategorized alphabet numeric common general regular newicons"
) | {
    "",
    "alpha numeric",
}
_BRAND_CATEGORY = re.compile("brand|social|logo", re.IGNORECASE)
_MOVING = re.compile("<(?:animate|set|text)")
_BRANDS = word_set(
    "brand logo social adobe airbnb alibaba alipay amazon amd android angular apple asana atlassian auth0 aws azure "
    "baidu behance bing bitbucket blogger bluesky bootstrap chatgpt chrome chromecast cisco claude cloudflare "
    "codepen codesandbox deepseek deviantart digg discord disqus docker dribbble dropbox drupal ebay ethereum etsy "
    "evernote facebook fedora figma firefox flickr flutter foursquare framer gemini github gitlab gmail goodreads "
    "google graphql grok hbo heroku huawei hulu ibm imdb instagram intel intercom jenkins jira joomla kickstarter "
    "kotlin kubernetes laravel lastfm linkedin linux magento mailchimp mastercard mastodon messenger meta microsoft "
    "mongodb mysql netflix nextjs nintendo nodejs notion npm nvidia openai oracle patreon paypal perplexity php "
    "pinterest playstation postgresql python qq quora react reddit redis safari salesforce samsung shopify skype "
    "slack snapchat sony soundcloud spotify stackoverflow stripe telegram tesla tiktok trello tripadvisor tumblr "
    "twitch twitter typescript uber ubuntu unsplash viber vimeo visa vscode vue wechat weibo whatsapp wikipedia "
    "windows wordpress xbox xing yahoo yandex yelp youtube"
)


def caption(name: str, icon_set: str, data: Mapping[str, Any]) -> str:
    """The name of an icon in words, without styles and variants; it may still be no caption, see `is_caption`.

    Args:
      name: as the set has it, words joined by hyphens.
      icon_set: name of the set.
      data: of the set; its "suffixes" and "prefixes" name its styles.
    """
    parts = [word for word in _without_styles(name, data).split("-") if word]
    for phrase in LEADING.get(icon_set, ()):
        leading = phrase.split("-")
        if parts[: len(leading)] == leading and len(parts) > len(leading):
            parts = parts[len(leading) :]
            break
    parts = [match[1] if (match := _TRAILING_NUMBER.fullmatch(word)) else word for word in parts]
    numbers = _NUMBERS if icon_set.startswith("icon-park") else frozenset()
    while len(parts) > 1:
        if len(parts) > 2 and parts[-2:] == ["two", "tone"]:
            parts = parts[:-2]
        elif parts[-1] in _STYLES or parts[-1] in numbers or _SIZE.fullmatch(parts[-1]):
            parts = parts[:-1]
        else:
            break
    return " ".join(parts)


def _without_styles(name: str, data: Mapping[str, Any]) -> str:
    """`name` without the longest of the set's suffixes that ends it, and without the prefix that begins it."""
    for suffix in sorted(filter(None, data.get("suffixes") or ()), key=len, reverse=True):
        if name.endswith(f"-{suffix}"):
            name = name.removesuffix(f"-{suffix}")
            break
    for prefix in sorted(filter(None, data.get("prefixes") or ()), key=len, reverse=True):
        if name.startswith(f"{prefix}-"):
            return name.removeprefix(f"{prefix}-")
    return name


def is_caption(text: str) -> bool:
    """Whether words say what a picture shows: not a brand, a letter or a number, and neither too long nor too short."""
    words, letters = text.split(), sum(char.isalpha() for char in text)
    signs = [word for word in words if len(word) == 1 or word in _NUMBERS]
    return (
        0 < len(words) <= MAX_WORDS
        and sum(char.isdigit() for char in text) <= MAX_DIGITS
        and letters >= MIN_LETTERS
        and max(map(len, words)) <= MAX_WORD
        and words[0] not in _BRANDS
        and not (signs and all(word in signs or word in _FRAMES for word in words))
    )


def brands(brand_names: Iterable[str], thing_names: Iterable[str]) -> frozenset[str]:
    """Captions among `brand_names` that share no word with the captions `thing_names`."""
    things = {word for text in thing_names for word in text.split()}
    return frozenset(text for text in brand_names if things.isdisjoint(text.split()))


def concept(text: str) -> str:
    """Id of the concept that a caption names: its words in the singular, each once, sorted, joined by hyphens."""
    return "-".join(sorted({_singular(word) for word in text.split()}))


def _singular(word: str) -> str:
    """A word without the s of the plural; the result need not be a word: it only has to be the same for both forms."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("sses", "shes", "ches", "xes", "zes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def moves(body: str) -> bool:
    """Whether an SVG body is animated, or has text that would need a font."""
    return bool(_MOVING.search(body))


def branded(data: Mapping[str, Any]) -> frozenset[str]:
    """Icons of a set that are in one of its categories of brands or social media."""
    categories = data.get("categories") or {}
    return frozenset(name for title, names in categories.items() if _BRAND_CATEGORY.search(title) for name in names)


def categories(data: Mapping[str, Any]) -> dict[str, list[str]]:
    """Icon -> its categories in words ("AudioVideo" is "audio video"), without those for what fits no other."""
    by_name: dict[str, list[str]] = {}
    for title, names in (data.get("categories") or {}).items():
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", title)
        text = " ".join(re.sub(r"[^a-z0-9]+", " ", words.lower()).split())
        if text not in _CATCH_ALL:
            for name in names:
                by_name.setdefault(name, []).append(text)
    return by_name


def aliases(data: Mapping[str, Any]) -> dict[str, list[str]]:
    """Icon -> other names of the same picture, without the set's own name before them.

    An alias that turns or mirrors the picture is another picture.
    """
    table: Mapping[str, Mapping[str, Any]] = data.get("aliases") or {}
    by_name: dict[str, list[str]] = {}
    for name in table:
        target, chain = name, set()
        while target in table and target not in chain and table[target].keys() <= {"parent"}:
            chain.add(target)
            target = table[target]["parent"]
        if target in data["icons"]:
            by_name.setdefault(target, []).append(name.removeprefix(f"{data.get('prefix')}-"))
    return by_name


def other_captions(texts: Iterable[str], own: str, brand_names: Collection[str]) -> Sequence[str]:
    """Captions among `texts` whose concept differs from the caption `own`'s, one for each concept.

    The same words written as one are no other name.
    """
    others: dict[str, str] = {}
    for text in texts:
        if is_caption(text) and text not in brand_names and text.replace(" ", "") != own.replace(" ", ""):
            others.setdefault(concept(text), text)
    others.pop(concept(own), None)
    return list(others.values())
