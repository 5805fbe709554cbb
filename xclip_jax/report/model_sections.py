"""The sections of the page that show predictions of the model on images and texts."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from xclip_jax.report.attention import Maps
from xclip_jax.report.examples import Confusion, Examples, Gallery, Prediction, ScoredLabel, SearchResult
from xclip_jax.report.markup import Images, Section, data_uri, esc, missing, wide

FIRST = 24  # clusters that are shown at first
_DARK = np.array([17, 24, 39])
_MAP = 144  # side of an attention map, pixels


def names(examples: Examples, images: Images, reason: str) -> Section:
    """Zero-shot predictions on images, of each set."""
    if not examples.named:
        return missing("names", "Zero-shot classification", f"No zero-shot set was evaluated for this page: {reason}")
    parts = []
    for named in examples.named:
        cards = "".join(_prediction(prediction, images, named.num_classes) for prediction in named.guesses)
        parts.append(
            f'<h3>{esc(named.title)}</h3><p class="intro">{esc(named.sentence)}</p><div class="grid3">{cards}</div>'
        )
    text = (
        "Each image is assigned the class name whose text embedding is most similar. Images are drawn by a seed, not "
        "selected by hand."
    )
    return Section("names", "Zero-shot classification", f"<p>{text}</p>{''.join(parts)}")


def _prediction(prediction: Prediction, images: Images, num_names: int) -> str:
    """A card: an image with its best names as bars."""
    name, rank = esc(prediction.name), place(prediction, num_names)
    return (
        f'<article class="card guess"><div class="head"><b title="{name}">{name}</b>{rank}</div>'
        f"<div>{images.show(prediction.image, prediction.name)}</div>{bars(prediction.best)}</article>"
    )


def place(prediction: Prediction, num_names: int) -> str:
    """The rank of the right name."""
    rank = "right" if prediction.rank == 1 else f"rank {prediction.rank:,} of {num_names:,}"
    return f"<small{_OK if prediction.rank == 1 else ''}>{rank}</small>"


def bars(labels: Sequence[ScoredLabel]) -> str:
    """A bar for each name."""
    items = "".join(
        f'<li style="--v:{label.value:.3f}"{_RIGHT if label.right else ""}><span title="{esc(label.name)}">'
        f"{esc(label.name)}</span><small>{esc(label.text)}</small></li>"
        for label in labels
    )
    return f'<ol class="bars">{items}</ol>'


_RIGHT, _OK = ' class="right"', ' class="ok"'


def search(examples: Examples, images: Images, reason: str) -> Section:
    """Retrieval in both directions, and the queries of the set."""
    parts, retrieved = [], examples.retrieved
    if retrieved:
        n = len(retrieved.gallery.images)
        by_text = "".join(_search_result(result, retrieved.gallery, images, n) for result in retrieved.by_text)
        by_image = "".join(_prediction(prediction, images, retrieved.texts) for prediction in retrieved.by_image)
        parts.append(
            f'<h3>Text to image</h3><p class="intro">Captions of {esc(retrieved.title)}, drawn by a seed, with the top '
            f"of {n:,} images, best first. Images of the caption have a green frame.</p>"
            f'<div class="grid2">{by_text}</div>'
            f'<h3>Image to text</h3><p class="intro">Images with the top of {retrieved.texts:,} captions; captions of '
            f"the image are green. Bars: {esc(retrieved.meaning)}.</p>"
            f'<div class="grid3">{by_image}</div>'
        )
    if examples.searches:
        n = len(examples.gallery.images)
        results = "".join(_search_result(result, examples.gallery, images, n) for result in examples.searches)
        parts.append(
            f'<h3>Search by words</h3><p class="intro">The same queries for every run, with the top of {n:,} test '
            f'images, best first.</p><div class="grid2">{results}</div>'
        )
    if not parts:
        return missing("search", "Retrieval", f"No retrieval set was evaluated for this page: {reason}")
    return Section("search", "Retrieval", "".join(parts))


def _search_result(result: SearchResult, gallery: Gallery, images: Images, n: int) -> str:
    right, rank = result.right or [False] * len(result.images), ""
    if result.right:
        place = f"<small>rank {result.rank:,} of {n:,}</small>"
        rank = '<small class="ok">right</small>' if result.rank == 1 else place
    return (
        f'<article class="card"><div class="quote"><q title="{esc(result.text)}">{esc(result.text)}</q>{rank}</div>'
        f"{row(result.images, right, gallery, images)}</article>"
    )


def row(indices: list[int], right: list[bool], gallery: Gallery, images: Images) -> str:
    """Images of a gallery in a row, with their names; those that are right have a frame."""
    items = "".join(
        f"<li{_RIGHT if good else ''}>{images.show(gallery.shown[i], gallery.names[i] + (', right' if good else ''))}"
        f'<span title="{esc(gallery.names[i])}" aria-hidden="true">{esc(gallery.names[i])}</span></li>'
        for i, good in zip(indices, right, strict=True)
    )
    return f'<ol class="row">{items}</ol>'


def clusters(examples: Examples, images: Images, reason: str) -> Section:
    """The most used clusters, with a search by word."""
    clusters = examples.clusters
    if not clusters:
        return missing("clusters", "Clusters", reason)
    cards = []
    for cluster in clusters.most:
        words = " · ".join(cluster.words)
        own = " ".join(
            [words, *(clusters.gallery.names[i] for i in cluster.images), f"cluster {cluster.number}"]
        ).lower()
        cards.append(
            f'<article class="card" data-words="{esc(own)}"><div class="quote"><span>Cluster {cluster.number}</span>'
            f"<small>{_count(cluster.pictures, 'image')}, {_count(cluster.texts, 'name')}</small></div>"
            f'<p class="words" title="{esc(words)}">{esc(words)}</p>'
            f"{row(cluster.images, [False] * len(cluster.images), clusters.gallery, images)}</article>"
        )
    text = (
        f"The non-contrastive loss assigns images and texts to {clusters.k:,} clusters without labels. "
        f"{clusters.used:,} of them are the most probable cluster of one of the {len(clusters.gallery.images):,} "
        f"images here; the {len(clusters.most)} with the most images are shown. In green the names nearest to each "
        "cluster, below them its nearest images."
    )
    return Section(
        "clusters",
        "Clusters",
        f"""<p>{text}</p>
<div class="find"><input id="find" type="search" data-first="{FIRST}" placeholder="cat, flag, red ..."
aria-label="Search the clusters by word" aria-controls="cards">
<output id="found" for="find" aria-live="polite"></output></div><div class="grid2" id="cards">{"".join(cards)}</div>
<button id="more" type="button" hidden>Show all {len(clusters.most)}</button>""",
    )


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def attention(examples: Examples, images: Images, maps: Maps | None, reason: str) -> Section:
    """Attention over patches of some images of the gallery."""
    if maps is None:
        if examples.gallery.images:
            reason = "The image tower of this model has no attention maps."
        return missing("attention", "Attention", reason)
    cards = []
    for i, last, rollout in zip(maps.indices, maps.last, maps.rollout, strict=True):
        name, shown = examples.gallery.names[i], examples.gallery.shown[i]
        pictures = [f'<img src="{data_uri(shown)}" alt="{esc(name)}" width="{_MAP}" height="{_MAP}">']
        for blocks, values in (("the last block", last), ("all blocks", rollout)):
            row, column = np.unravel_index(values.argmax(), values.shape)
            alt = (
                f"Attention of {blocks} to {name}: most on row {row + 1}, column {column + 1} of {len(values)} patches"
            )
            picture = data_uri(_spotlight(shown, values), lossless=True)
            pictures.append(f'<img src="{picture}" alt="{esc(alt)}" width="{_MAP}" height="{_MAP}">')
        cards.append(
            f'<figure class="card look"><div>{"".join(pictures)}</div><div class="keys" aria-hidden="true">'
            "<span>image</span><span>last block</span><span>all blocks</span></div>"
            f"<figcaption>{esc(name)}</figcaption></figure>"
        )
    side = maps.last.shape[1]
    text = (
        f"The image tower divides an image into {side} x {side} patches. Brightness is {esc(maps.meaning)}; “all "
        "blocks” multiplies the maps of all blocks, half of each kept for the residual path (rollout, arXiv "
        "2005.00928). Each map is scaled to its brightest patch. Attention shows which patches are read, not why a "
        "prediction is made."
    )
    return Section("attention", "Attention", f'<p>{text}</p><div class="grid3">{"".join(cards)}</div>')


def _spotlight(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The image, dark where `values` (rows, columns) are small; patches keep their edges."""
    side = max(1, _MAP // len(values)) * len(values)
    patch = np.arange(side) * len(values) // side
    light = (0.1 + 0.9 * values / values.max())[patch][:, patch, None]
    picture = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))
    return (picture * light + _DARK * (1 - light)).astype(np.uint8)


def confusion(examples: Examples, images: Images, reason: str) -> Section:
    """The confusion matrix, and the most frequent mistakes."""
    confusion = examples.confusion
    if not confusion:
        return missing("confusion", "Confusions", f"No zero-shot set was evaluated for this page: {reason}")
    right = np.trace(confusion.counts)
    parts = []
    if confusion.classes:
        parts.append(
            f'<p class="intro">“{esc(confusion.title)}”, {confusion.images:,} images: rows are the right classes, '
            "columns the predictions; a stronger colour is a larger share of the row. "
            f"{100 * right / confusion.images:.0f} % are on the diagonal.</p>{_heat(confusion)}"
        )
    pairs = "".join(
        f'<article class="card pair"><div><b>{esc(mistake.name)}</b><br><small>predicted as</small> '
        f'<b>{esc(mistake.taken_for)}</b> <small>{mistake.count} x</small></div><ol class="row">'
        f"{''.join(f'<li>{images.show(image, mistake.name)}</li>' for image in mistake.images)}</ol></article>"
        for mistake in confusion.mistakes
    )
    if pairs:
        parts.append(
            '<h3>Most frequent mistakes</h3><p class="intro">A class and the class predicted in its place, with images '
            f'of the first; the seed decides among equally frequent ones.</p><div class="grid4">{pairs}</div>'
        )
    return Section("confusion", "Confusions", "".join(parts) or "<p>All images are classified correctly.</p>")


def _heat(confusion: Confusion) -> str:
    dense = len(confusion.classes) > 24
    head = "".join(f'<th scope="col"><span>{esc(name)}</span></th>' for name in confusion.classes)
    rows = []
    for name, counts in zip(confusion.classes, confusion.counts, strict=True):
        total = max(counts.sum(), 1)
        cells = []
        for other, count in zip(confusion.classes, counts, strict=True):
            if not count:
                cells.append("<td></td>")
                continue
            title = f"{name} predicted as {other}: {count} of {total}"
            cells.append(f'<td style="--v:{count / total:.2f}" title="{esc(title)}">{"" if dense else count}</td>')
        rows.append(f'<tr><th scope="row">{esc(name)}</th>{"".join(cells)}</tr>')
    return wide(
        "Confusion matrix",
        f'<table class="heat{" dense" if dense else ""}"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>",
    )
