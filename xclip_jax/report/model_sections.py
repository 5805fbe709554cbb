"""The sections of the page that show what the model makes of pictures and texts."""

import numpy as np
from PIL import Image

from xclip_jax.report.attention import Maps
from xclip_jax.report.examples import Confusion, Examples, Gallery, Prediction, SearchResult
from xclip_jax.report.markup import Images, Section, data_uri, esc, missing

FIRST = 24  # clusters shown before somebody asks for more
_DARK = np.array([17, 24, 39])
_MAP = 144  # side of an attention map, pixels


def names(examples: Examples, images: Images, why: str) -> Section:
    """Names for images, of each zero-shot set."""
    if not examples.named:
        return missing("names", "Names for images", f"No zero-shot set was looked at: {why}")
    parts = []
    for named in examples.named:
        cards = "".join(_guess(guess, images, named.num_classes) for guess in named.guesses)
        parts.append(
            f'<h3>{esc(named.title)}</h3><p class="say">{esc(named.sentence)}</p><div class="grid3">{cards}</div>'
        )
    say = "Zero-shot: each image gets the name whose text is nearest to it. The images are drawn by a seed, not picked."
    return Section("names", "Names for images", f"<p>{say}</p>{''.join(parts)}")


def _guess(guess: Prediction, images: Images, ways: int) -> str:
    """A card: an image with its best names as bars."""
    place = "right" if guess.rank == 1 else f"rank {guess.rank:,} of {ways:,}"
    bars = "".join(
        f'<li style="--v:{choice.value:.3f}"{_RIGHT if choice.right else ""}><span title="{esc(choice.name)}">'
        f"{esc(choice.name)}</span><small>{esc(choice.text)}</small></li>"
        for choice in guess.best
    )
    return (
        f'<article class="card guess"><div class="head"><b title="{esc(guess.name)}">{esc(guess.name)}</b>'
        f"<small{_OK if guess.rank <= 5 else ''}>{place}</small></div>"
        f'<div>{images.show(guess.image, guess.name)}</div><ol class="bars">{bars}</ol></article>'
    )


_RIGHT, _OK = ' class="right"', ' class="ok"'


def search(examples: Examples, images: Images, why: str) -> Section:
    """Retrieval both ways, and the demo's own queries."""
    parts, both = [], examples.retrieved
    if both:
        n = len(both.gallery.images)
        parts.append(
            f'<h3>Texts find images</h3><p class="say">Captions of {esc(both.title)} drawn by a seed, and the best '
            f"of {n:,} images, best first. Those that the caption belongs to are framed in green.</p>"
            f'<div class="grid2">{"".join(_found(f, both.gallery, images, n) for f in both.by_text)}</div>'
            f'<h3>Images find texts</h3><p class="say">The other way: the best of {both.texts:,} captions; those that '
            f"belong to the image are green. Bars: {both.meaning}.</p>"
            f'<div class="grid3">{"".join(_guess(g, images, both.texts) for g in both.by_image)}</div>'
        )
    if examples.searches:
        n = len(examples.gallery.images)
        parts.append(
            f'<h3>Search by words</h3><p class="say">The same queries for every run, and the best of {n:,} test '
            'pictures, best first.</p><div class="grid2">'
            f"{''.join(_found(f, examples.gallery, images, n) for f in examples.searches)}</div>"
        )
    if not parts:
        return missing("search", "Search both ways", f"No retrieval set was looked at: {why}")
    return Section("search", "Search both ways", "".join(parts))


def _found(found: SearchResult, gallery: Gallery, images: Images, n: int) -> str:
    right = found.right or [False] * len(found.images)
    place = ""
    if found.right:
        place = '<small class="ok">right</small>' if found.rank == 1 else f"<small>rank {found.rank:,} of {n:,}</small>"
    return (
        f'<article class="card"><div class="quote"><q title="{esc(found.text)}">{esc(found.text)}</q>{place}</div>'
        f"{_row(found.images, right, gallery, images)}</article>"
    )


def _row(picked: list[int], right: list[bool], gallery: Gallery, images: Images) -> str:
    items = "".join(
        f"<li{_RIGHT if good else ''}>{images.show(gallery.shown[i], gallery.names[i] + (', right' if good else ''))}"
        f'<span title="{esc(gallery.names[i])}" aria-hidden="true">{esc(gallery.names[i])}</span></li>'
        for i, good in zip(picked, right, strict=True)
    )
    return f'<ol class="row">{items}</ol>'


def clusters(examples: Examples, images: Images, why: str, *, has_head: bool) -> Section:
    """The most used clusters, to be searched by word."""
    found = examples.clusters
    if not found:
        if not has_head:
            why = "this objective trains no cluster heads; nclip and xclip do."
        return missing("clusters", "Clusters it has found", why)
    cards = []
    for cluster in found.most:
        words = " · ".join(cluster.words)
        own = " ".join([words, *(found.gallery.names[i] for i in cluster.images), f"cluster {cluster.number}"]).lower()
        cards.append(
            f'<article class="card" data-words="{esc(own)}"><div class="quote"><span>Cluster {cluster.number}</span>'
            f"<small>{_many(cluster.pictures, 'picture')}, {_many(cluster.texts, 'name')}</small></div>"
            f'<p class="words" title="{esc(words)}">{esc(words)}</p>'
            f"{_row(cluster.images, [False] * len(cluster.images), found.gallery, images)}</article>"
        )
    say = (
        f"Training without negatives sorts pictures and words into {found.k:,} clusters that nobody named. "
        f"{found.used:,} of them are the first choice of one of the {len(found.gallery.images):,} pictures here; these "
        f"{len(found.most)} hold the most. In green the names nearest to each, below its nearest pictures."
    )
    return Section(
        "clusters",
        "Clusters it has found",
        f"""<p>{say}</p>
<div class="find"><input id="find" type="search" data-first="{FIRST}" placeholder="cat, flag, red ..."
aria-label="Search the clusters by word" aria-controls="cards">
<output id="found" for="find" aria-live="polite"></output></div><div class="grid2" id="cards">{"".join(cards)}</div>
<button id="more" type="button" hidden>Show all {len(found.most)}</button>""",
    )


def _many(n: int, word: str) -> str:
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def attention(examples: Examples, images: Images, maps: Maps | None, why: str) -> Section:
    """Attention over patches of some images of the gallery, `maps.picked`."""
    if maps is None:
        if examples.gallery.images:
            why = "The image tower of this model has no attention maps."
        return missing("attention", "Where it looks", why)
    cards = []
    for i, last, rollout in zip(maps.picked, maps.last, maps.rollout, strict=True):
        name, shown = examples.gallery.names[i], examples.gallery.shown[i]
        pictures = [f'<img src="{data_uri(shown)}" alt="{esc(name)}" width="{_MAP}" height="{_MAP}">']
        for kind, values in (("the last block", last), ("all blocks", rollout)):
            row, column = np.unravel_index(values.argmax(), values.shape)
            alt = f"Attention of {kind} to {name}: most on row {row + 1}, column {column + 1} of {len(values)} patches"
            picture = data_uri(_spotlight(shown, values), lossless=True)
            pictures.append(f'<img src="{picture}" alt="{esc(alt)}" width="{_MAP}" height="{_MAP}">')
        cards.append(
            f'<figure class="card look"><div>{"".join(pictures)}</div><div class="keys" aria-hidden="true">'
            "<span>image</span><span>last block</span><span>all blocks</span></div>"
            f"<figcaption>{esc(name)}</figcaption></figure>"
        )
    side = maps.last.shape[1]
    say = (
        f"The image tower sees {side} x {side} patches. Light is {esc(maps.meaning)}; “all blocks” multiplies the "
        "blocks’ maps, half of each kept for the residual path (rollout, arXiv 2005.00928). The brightest patch of "
        "a map is drawn at full light. Attention says where a model looks, not why it answers as it does."
    )
    return Section("attention", "Where it looks", f'<p>{say}</p><div class="grid3">{"".join(cards)}</div>')


def _spotlight(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The image, dark where `values` (rows, columns) are small; patches keep their edges."""
    side = max(1, _MAP // len(values)) * len(values)
    at = np.arange(side) * len(values) // side
    light = (0.1 + 0.9 * values / values.max())[at][:, at, None]
    picture = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))
    return (picture * light + _DARK * (1 - light)).astype(np.uint8)


def confusion(examples: Examples, images: Images, why: str) -> Section:
    """A heat map of classes, and the pairs that are mixed up most."""
    found = examples.confusion
    if not found:
        return missing("confusion", "What it mixes up", f"No zero-shot set was looked at: {why}")
    right = np.trace(found.counts)
    parts = []
    if found.classes:
        parts.append(
            f'<p class="say">“{esc(found.title)}”, {found.images:,} images: rows are what an image shows, columns what '
            f"the model took it for; a stronger colour is a larger share of the row. "
            f"{100 * right / found.images:.0f} % lie on the diagonal.</p>{_heat(found)}"
        )
    pairs = "".join(
        f'<article class="card pair"><div><b>{esc(mistake.name)}</b><br><small>taken for</small> '
        f'<b>{esc(mistake.taken_for)}</b> <small>{mistake.count} x</small></div><ol class="row">'
        f"{''.join(f'<li>{images.show(image, mistake.name)}</li>' for image in mistake.images)}</ol></article>"
        for mistake in found.mistakes
    )
    if pairs:
        parts.append(
            '<h3>Most frequent mistakes</h3><p class="say">One name for another, with images of the first; '
            f'the seed decides among equals.</p><div class="grid4">{pairs}</div>'
        )
    return Section("confusion", "What it mixes up", "".join(parts) or "<p>No image was misnamed.</p>")


def _heat(found: Confusion) -> str:
    dense = len(found.classes) > 24
    head = "".join(f'<th scope="col"><span>{esc(name)}</span></th>' for name in found.classes)
    rows = []
    for name, counts in zip(found.classes, found.counts, strict=True):
        total = max(counts.sum(), 1)
        cells = []
        for other, count in zip(found.classes, counts, strict=True):
            if not count:
                cells.append("<td></td>")
                continue
            share, strong = count / total, ' class="strong"' if count > 0.55 * total else ""
            title = f"{name} taken for {other}: {count} of {total}"
            cells.append(f'<td{strong} style="--v:{share:.2f}" title="{esc(title)}">{"" if dense else count}</td>')
        rows.append(f'<tr><th scope="row">{esc(name)}</th>{"".join(cells)}</tr>')
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Confusion matrix">'
        f'<table class="heat{" dense" if dense else ""}"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
