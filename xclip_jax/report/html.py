"""The page: one HTML file that needs nothing else, with all pictures, styles and script inside."""

from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.report import model_sections, record, run_sections, style
from xclip_jax.report.attention import Maps, attention
from xclip_jax.report.examples import Examples, collect_examples
from xclip_jax.report.markup import Images, esc
from xclip_jax.report.record import Record
from xclip_jax.train.build import Parts

NAME = "report.html"

# The browser itself holds the page to what it promises: nothing is fetched.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_HOW = "the run names none. Name some in eval.final_sets, or now: python -m xclip_jax.report {run} --sets NAME,NAME"


def make(
    run: str | epath.Path,
    parts: Parts,
    encoder: Encoder,
    variables: Any,
    specs: Sequence[str],
    *,
    data_dir: str = "",
    output: str | epath.Path = "",
    seed: int = 0,
) -> Examples:
    """Looks at a model and writes the page of its run; with several processes all call this, the first one writes.

    Args:
      run: the run's folder.
      parts, encoder, variables: the model.
      specs: evaluation sets, see `examples.collect_examples`.
      data_dir: root of the data sets, "" for that of the run.
      output: where the page goes, RUN/report.html by default.
      seed: decides which examples are shown.

    Returns:
      What the page shows of the model.
    """
    examples = collect_examples(
        encoder, variables, specs, data=parts.data, data_dir=data_dir or parts.data.dir, seed=seed
    )
    maps = None
    if examples.gallery.images:
        statistics = (parts.preprocessing.mean, parts.preprocessing.std)
        maps = attention(parts.model, variables, examples.gallery.images, statistics, parts.mesh, seed=seed)
    if jax.process_index() == 0:
        parameters = sum(x.size for x in jax.tree.leaves(parts.abstract.params))
        page = render(record.read(run), examples, maps, parameters)
        epath.Path(output or epath.Path(run) / NAME).write_text(page)
    return examples


def render(record: Record, examples: Examples, maps: Maps | None = None, parameters: int | None = None) -> str:
    """The page of a run.

    Args:
      record: what its folder tells.
      examples: what its model makes of pictures and texts; empty where there is no model to ask.
      maps: attention over images of `examples.gallery`.
      parameters: how many the model has, where that is known.
    """
    images = Images()
    why = " ".join(examples.missing) or _HOW.format(run=record.folder)
    has_head = record.config["objective"]["name"] in ("nclip", "xclip")
    sections = [
        model_sections.names(examples, images, why),
        model_sections.search(examples, images, why),
        model_sections.clusters(examples, images, why, has_head=has_head),
        model_sections.attention(examples, images, maps, why),
        model_sections.confusion(examples, images, why),
        run_sections.results(record),
        run_sections.curves(record),
        run_sections.health(record),
        run_sections.about(record),
    ]
    sections.sort(key=lambda section: section.empty)
    links = "".join(f'<li><a href="#{s.id}">{s.title}</a></li>' for s in sections)
    body = "".join(section.render() for section in sections)
    credit = "".join(f"<p>{esc(credit)}</p>" for credit in examples.credits)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{esc(run_sections.title(record))} · {esc(record.folder.name)}</title>
<style>{style.CSS}
{images.css()}</style></head><body>
<a class="skip" href="#main">Skip to content</a>
{run_sections.head(record, parameters)}
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main id="main">{body}</main>
<footer><div><p>Made by <code>python -m xclip_jax.report {esc(record.folder)}</code>. Examples are drawn by seed
{examples.seed}; none is picked by hand.</p>{credit}</div></footer>
<script>{style.SCRIPT}</script></body></html>
"""
