"""Predictions of several models on the same images and texts, side by side."""

from collections.abc import Sequence

from xclip_jax.core.console import command
from xclip_jax.report.examples import Examples, Gallery, Prediction, SearchResult
from xclip_jax.report.markup import Images, Section, esc, missing
from xclip_jax.report.model_sections import bars, place, row

BEST = 3  # names of an image, of each run

Models = Sequence[tuple[str, Examples]]  # label of the run, HTML, and predictions of its model


def predictions(models: Models, images: Images) -> Section:
    """Names for the same images by each run's model."""
    parts = []
    panels = {named.title: named for named in models[0][1].named}
    for title, first in panels.items():
        others = [next((named for named in examples.named if named.title == title), None) for _, examples in models]
        columns = [
            (label, named.guesses, named.num_classes)
            for (label, _), named in zip(models, others, strict=True)
            if named and _names(named.guesses) == _names(first.guesses)
        ]
        parts += [f'<h3>{esc(title)}</h3><p class="intro">{esc(first.sentence)}</p>{_cards(columns, images)}']
    retrieved = [(label, e.retrieved) for label, e in models if e.retrieved]
    if retrieved and len(retrieved) == len(models):
        columns = [(label, r.by_image, r.texts) for label, r in retrieved]
        same = [column for column in columns if _names(column[1]) == _names(columns[0][1])]
        parts.append(
            f'<h3>Image to text, {esc(retrieved[0][1].title)}</h3><p class="intro">Images with the top of '
            f"{retrieved[0][1].texts:,} captions. Bars: {esc(retrieved[0][1].meaning)}.</p>{_cards(same, images)}"
        )
    if not parts:
        return missing("names", "Images side by side", _reason(models))
    text = "The same images, drawn by a seed, with the best names of each run. Right ones are green."
    return Section("names", "Images side by side", f"<p>{text}</p>{''.join(parts)}")


def _names(guesses: Sequence[Prediction]) -> list[str]:
    return [guess.name for guess in guesses]


def _reason(models: Models) -> str:
    sentences = dict.fromkeys(sentence for _, examples in models for sentence in examples.missing)
    return " ".join(sentences) or (
        f"the runs have no evaluation set of images in common. Name some: {command('report')} RUN RUN --sets NAME"
    )


def _cards(columns: Sequence[tuple[str, Sequence[Prediction], int]], images: Images) -> str:
    """A card for each image, with a block for each run.

    Args:
      columns: label of the run, its predictions on the same images, and the number of names that it chose from.
      images: of the page.
    """
    cards = []
    for of_runs in zip(*(guesses for _, guesses, _ in columns), strict=True):
        blocks = "".join(
            f'<div class="by"><div class="head">{label}{place(guess, n)}</div>{bars(guess.best[:BEST])}</div>'
            for (label, _, n), guess in zip(columns, of_runs, strict=True)
        )
        name = esc(of_runs[0].name)
        cards.append(
            f'<article class="card guess"><div class="head"><b title="{name}">{name}</b></div>'
            f"<div>{images.show(of_runs[0].image, of_runs[0].name)}</div><div>{blocks}</div></article>"
        )
    return f'<div class="grid3">{"".join(cards)}</div>'


def searches(models: Models, images: Images) -> Section:
    """The images that each run's model ranks first for the same texts."""
    parts = []
    retrieved = [(label, e.retrieved) for label, e in models if e.retrieved]
    if retrieved and len(retrieved) == len(models):
        asked = [(label, r.gallery, r.by_text) for label, r in retrieved]
        parts.append(
            f'<h3>Captions of {esc(retrieved[0][1].title)}</h3><p class="intro">Drawn by a seed. Images of the caption '
            f"have a green frame.</p>{_queries(asked, images)}"
        )
    if all(examples.searches for _, examples in models):
        asked = [(label, examples.gallery, examples.searches) for label, examples in models]
        n = len(models[0][1].gallery.images)
        parts.append(
            f'<h3>Search by words</h3><p class="intro">The same queries for every run, with the top of {n:,} images, '
            f"best first.</p>{_queries(asked, images)}"
        )
    if not parts:
        return missing("search", "Texts side by side", _reason(models))
    return Section("search", "Texts side by side", "".join(parts))


def _queries(asked: Sequence[tuple[str, Gallery, Sequence[SearchResult]]], images: Images) -> str:
    """A card for each text that all runs were asked, with a row of images for each run."""
    by_text = [{result.text: result for result in results} for _, _, results in asked]
    cards = []
    for text in by_text[0]:
        if not all(text in own for own in by_text):
            continue
        rows = []
        for (label, gallery, _), own in zip(asked, by_text, strict=True):
            result, n = own[text], len(gallery.images)
            rank = f"<small>rank {result.rank:,} of {n:,}</small>" if result.right and result.rank > 1 else ""
            rank = '<small class="ok">right</small>' if result.rank == 1 else rank
            rows.append(
                f'<div class="by"><div class="head">{label}{rank}</div>'
                f"{row(result.images, result.right or [False] * len(result.images), gallery, images)}</div>"
            )
        cards.append(f'<article class="card"><div class="quote"><q>{esc(text)}</q></div>{"".join(rows)}</article>')
    return f'<div class="grid2">{"".join(cards)}</div>'
