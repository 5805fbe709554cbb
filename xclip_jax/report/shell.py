"""The HTML around the sections of a page: policy, styles, navigation and script, all inside the one file."""

from collections.abc import Sequence

from xclip_jax.report import style
from xclip_jax.report.markup import Images, Section, esc

# The browser enforces that the page loads nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(
    title: str, head: str, sections: Sequence[Section], images: Images, *, notes: Sequence[str] = (), footer: str
) -> str:
    """Return a page.

    Args:
      title: of the window.
      head: HTML of its <header>.
      sections: in their order; empty ones go to the end.
      images: that the sections show.
      notes: sentences before the sections.
      footer: HTML of its <footer>.
    """
    sections = sorted(sections, key=lambda section: section.empty)
    links = "".join(f'<li><a href="#{s.id}">{s.title}</a></li>' for s in sections)
    body = "".join(f'<p class="none">{esc(note)}</p>' for note in notes)
    body += "".join(section.render() for section in sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{esc(title)}</title>
<style>{style.CSS}
{images.css()}</style></head><body>
<a class="skip" href="#main">Skip to content</a>
<header><div>{head}</div></header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main id="main">{body}</main>
<footer><div>{footer}</div></footer>
<script>{style.SCRIPT}</script></body></html>
"""
